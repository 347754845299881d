"""``oppu up`` as a user has it: started, asked, killed with kill -9, started again."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oppu.cli.demo import read_sample

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(600)]


def oppu(folder: Path, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command against the stack in ``folder``."""
    command = [sys.executable, "-m", "oppu", "--config", str(folder / "oppu.toml"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@contextmanager
def up(folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``oppu up`` and wait until it says where Kafka is."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "oppu", "up", "--dir", str(folder)], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 90
        while b"Kafka at" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def await_inference(folder: Path, seconds: float = 90) -> None:
    """Wait until the inference worker of the stack says that it is ready."""
    deadline, reached = time.monotonic() + seconds, ""
    while True:
        try:
            reached = (folder / "state" / "inference-0.url").read_text().strip()
            with urllib.request.urlopen(f"{reached}/readyz", timeout=2):
                return
        except OSError as error:
            assert time.monotonic() < deadline, f"{reached}: {error}"
        time.sleep(0.2)


def _await_events(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while True:
        shown = oppu(folder, "store", "info", "--json")
        if shown.returncode == 0 and json.loads(shown.stdout)["events"] >= count:
            assert json.loads(shown.stdout)["events"] == count
            return
        assert time.monotonic() < deadline, shown.stdout + shown.stderr
        time.sleep(0.5)


def _alive(name: str, folder: Path) -> list[str]:
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in shown.splitlines() if str(folder) in line and name in line]


def test_killed_and_started_again(tmp_path: Path, kafka_classpath: list[Path]) -> None:
    folder, file = tmp_path / "stack", tmp_path / "events.jsonl"
    events = read_sample().history[:80]
    file.write_text("".join(event.model_dump_json() + "\n" for event in events), encoding="utf-8")
    user = events[0].user_id
    with up(folder, tmp_path / "first.log") as process:
        assert oppu(folder, "produce", str(file)).returncode == 0
        _await_events(folder, len(events))
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    deadline = time.monotonic() + 20
    while _alive("oppu --config", folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _alive("oppu --config", folder), "workers outlived their parent"
    with up(folder, tmp_path / "second.log"):
        await_inference(folder)
        answer = oppu(folder, "ask", "--user", user, "--task", events[0].task, "--json", "The Senate voted.")
        assert answer.returncode == 0, answer.stderr
        prediction = json.loads(answer.stdout)
        assert prediction["status"] == "ok"
        assert set(prediction["provenance"]["used"]) >= {"retrieval", "profile"}
        assert prediction["provenance"]["history_sequence"] == sum(event.user_id == user for event in events)
        assert oppu(folder, "produce", str(file)).returncode == 0  # sent again: nothing doubles
        time.sleep(2)
        _await_events(folder, len(events))
        shown = oppu(folder, "history", user, "--json")
        assert len(shown.stdout.splitlines()) == sum(event.user_id == user for event in events)
    assert not _alive("kafka.Kafka", folder), "the broker outlived oppu up"


def _await_log(path: Path, text: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text() if path.exists() else f"no {path}"
        time.sleep(0.1)


def _pid_of(name: str, folder: Path) -> int:
    deadline = time.monotonic() + 30
    while True:
        shown = subprocess.run(["ps", "-eo", "pid,args", "-ww"], capture_output=True, text=True, check=True).stdout
        found = [line for line in shown.splitlines() if str(folder) in line and line.endswith(name)]
        if found:
            return int(found[0].split()[0])
        assert time.monotonic() < deadline, shown
        time.sleep(0.1)


def test_a_second_inference_worker_of_the_same_settings_shares_the_work(
    tmp_path: Path, kafka_classpath: list[Path]
) -> None:
    folder = tmp_path / "stack"
    with up(folder, tmp_path / "up.log"):
        command = [sys.executable, "-m", "oppu", "--config", str(folder / "oppu.toml"), "infer"]
        with (tmp_path / "second.log").open("wb") as output:
            second = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _await_log(tmp_path / "second.log", "placed")
            _await_log(folder / "infer.log", "placed")
            addresses = {path.read_text() for path in (folder / "state").glob("inference-0*.url")}
            for user in range(6):
                shown = oppu(folder, "ask", "--user", f"u{user}", "--task", "news_categorize", "--json", "It rains.")
                assert json.loads(shown.stdout)["status"] == "ok", shown.stderr
        finally:
            second.terminate()
            second.wait(30)
    said = (tmp_path / "second.log").read_text() + (folder / "infer.log").read_text()
    assert "Fenced" not in said
    assert said.count("taking 0.1") == 1  # whichever of the two came second
    assert len(addresses) == 2


def test_what_dies_is_started_again_and_drains_all_the_same(tmp_path: Path, kafka_classpath: list[Path]) -> None:
    folder, file = tmp_path / "stack", tmp_path / "events.jsonl"
    events = read_sample().history[:20]
    file.write_text("".join(event.model_dump_json() + "\n" for event in events), encoding="utf-8")
    with up(folder, tmp_path / "up.log") as process:
        assert folder.stat().st_mode & 0o077 == 0  # it holds users' texts
        os.kill(_pid_of(" ingest", folder), signal.SIGKILL)
        os.kill(_pid_of("server.properties", folder), signal.SIGKILL)
        _await_log(tmp_path / "up.log", "Kafka ended by itself")
        deadline = time.monotonic() + 60
        while oppu(folder, "produce", str(file)).returncode != 0:
            assert time.monotonic() < deadline, (tmp_path / "up.log").read_text()
        _await_events(folder, len(events))
        process.terminate()
        assert process.wait(60) == 0
    assert (folder / "ingest.log").read_text().rstrip().endswith("ingest drained")
    assert not _alive("kafka.Kafka", folder), "the broker outlived oppu up"
