"""Parts of ``oppu up``: the settings file it writes, its key, and workers that die with their parent."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from oppu.cli import Session, operation, stack_settings, up
from oppu.cli.stack_settings import write_config
from oppu.cli.up import Child, Stack
from oppu.clock import ManualClock
from oppu.errors import ConfigError, FatalError
from oppu.health import Health, serve
from oppu.kafka import embedded
from oppu.metrics import fresh
from oppu.settings import InferenceSettings, ServiceSettings, Settings
from tests.oppu.cli.conftest import Run

pytestmark = pytest.mark.usefixtures("run")  # away from the settings of whoever runs the tests


def written(folder: Path, servers: str, overrides: str = "", own: Path | None = None) -> Path:
    """Write a stack's settings file."""
    return write_config(Session(own), folder, servers, overrides)


def test_the_written_file_is_read_back(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        '[kafka]\nsecurity_protocol = "SASL_SSL"\nsasl_mechanism = "PLAIN"\nsasl_username = "u"\nsasl_password = "p"\n'
        'group_prefix = "\\u00e9\\U0001F600-"\n'
        '[updater]\nreplay = 7\n[model]\nlora_targets = ["query", "val\\"ue"]\n'
        '[service]\nlog_level = "DEBUG"\ndeployment_key = "ignored"\n',
        encoding="utf-8",
    )
    folder = tmp_path / "a b \U0001f600"
    folder.mkdir()
    path = written(folder, "127.0.0.1:1234", "[updater]\nreplay = 8\ndropout = 0.25\n", own=own)
    settings = Settings.load(path)
    assert (settings.updater.replay, settings.updater.dropout) == (8, 0.25)
    assert settings.model.lora_targets == ("query", 'val"ue')
    assert settings.service.log_level == "DEBUG"
    assert settings.kafka.bootstrap_servers == "127.0.0.1:1234"
    assert settings.kafka.security_protocol == "PLAINTEXT"
    assert settings.kafka.group_prefix == "\u00e9\U0001f600-"
    assert settings.kafka.replication == settings.kafka.min_insync_replicas == 1
    assert settings.store.url == f"sqlite:///{folder}/history.db"
    assert settings.service.state_dir == folder / "state"


def test_files_with_the_key_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "127.0.0.1:1234")
    secret = tmp_path / "deployment.key"
    assert [file.stat().st_mode & 0o777 for file in (path, secret)] == [0o600, 0o600]
    assert len(secret.read_text()) == 64
    assert Settings.load(path).service.deployment_key.get_secret_value() == secret.read_text()


def test_the_key_is_made_once(tmp_path: Path) -> None:
    first = Settings.load(written(tmp_path, "127.0.0.1:1")).service.deployment_key
    second = Settings.load(written(tmp_path, "127.0.0.1:2")).service.deployment_key
    assert first.get_secret_value() == second.get_secret_value()
    (tmp_path / "other").mkdir()
    other = Settings.load(written(tmp_path / "other", "127.0.0.1:1")).service.deployment_key
    assert other.get_secret_value() != first.get_secret_value()


def test_an_interrupted_key_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "deployment.part").touch()
    key = Settings.load(written(tmp_path, "127.0.0.1:1")).service.deployment_key
    assert len(key.get_secret_value()) == 64


class Nobody:
    """Stands where the embedded broker would."""

    bootstrap_servers = "127.0.0.1:1"

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir

    def __enter__(self) -> "Nobody":
        return self

    def __exit__(self, *_raised: object) -> None:
        return None


def worker_environment(folder: Path) -> dict[str, str]:
    """The environment of a worker that prints it."""
    deadline = time.monotonic() + 30
    while "DONE" not in (said := (folder / "ingest.log").read_text().splitlines()):
        assert time.monotonic() < deadline, said
        time.sleep(0.02)
    return dict(line.split("=", 1) for line in said[: said.index("DONE")] if "=" in line)


def test_variables_of_another_stack_reach_neither_this_one_nor_its_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    printing = tmp_path / "printing"
    printing.write_text("#!/bin/sh\nenv\necho DONE\n")
    printing.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(printing))
    monkeypatch.setattr(embedded, "EmbeddedBroker", Nobody)
    monkeypatch.setattr(operation, "create_topics", lambda _settings: [])
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "stack"
    elsewhere.mkdir()
    others = {
        "OPPU_KAFKA__BOOTSTRAP_SERVERS": "elsewhere:9092",
        "OPPU_KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
        "OPPU_KAFKA__SASL_MECHANISM": "PLAIN",
        "OPPU_KAFKA__SASL_USERNAME": "another",
        "OPPU_KAFKA__SASL_PASSWORD": "another",
        "oppu_store__url": f"sqlite:///{elsewhere / 'history.db'}",
        "OPPU_Registry__Url": str(elsewhere / "adapters"),
        "OPPU_SERVICE": json.dumps({"state_dir": str(elsewhere / "state"), "log_level": "DEBUG"}),
        "OPPU_SERVICE__DEPLOYMENT_KEY": "another",
        "OPPU_UPDATER__INTERVAL_SECONDS": "99",
    }
    kept = {"OPPU_MODEL__THREADS": "3", "OPPU_UPDATER__REPLAY": "5", "OPPU_KAFKA__TOPIC_PREFIX": "t."}
    for name, value in {**others, **kept}.items():
        monkeypatch.setenv(name, value)
    overrides = "[updater]\ninterval_seconds = 1.5\n"
    with (
        caplog.at_level(logging.WARNING),
        up.stack(Session(None), folder, workers=["ingest"], overrides=overrides) as s,
    ):
        told = worker_environment(folder)
    assert s.settings.kafka.bootstrap_servers == Nobody.bootstrap_servers
    assert s.settings.kafka.security_protocol == "PLAINTEXT"
    assert s.settings.store.url == f"sqlite:///{folder / 'history.db'}"
    assert s.settings.registry.url == str(folder / "adapters")
    assert s.settings.service.state_dir == folder / "state"
    assert s.settings.service.deployment_key.get_secret_value() != "another"
    assert (s.settings.updater.interval_seconds, s.settings.updater.replay) == (1.5, 5)
    assert (s.settings.model.threads, s.settings.kafka.topic_prefix) == (3, "t.")
    assert {name for name in told if name.lower().startswith("oppu_")} == {*kept, "OPPU_PARENT", "OPPU_SERVICE"}
    assert json.loads(told["OPPU_SERVICE"]) == {"log_level": "DEBUG"} and s.settings.service.log_level == "DEBUG"
    warned = [r.getMessage() for r in caplog.records if r.name == stack_settings.__name__]
    assert sorted(message.partition(":")[0] for message in warned) == sorted(others)
    assert not any("elsewhere" in message or "another" in message for message in warned)
    assert not list(elsewhere.iterdir())
    assert {name: os.environ[name] for name in others} == others  # the shell of the caller is as it was


PARENT = """
import os, subprocess, sys, time
code = "from oppu.cli.up import die_with_parent as d; d(); print('up', flush=True); import time; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OPPU_PARENT": str(os.getpid())},
                         stdout=subprocess.PIPE, text=True, start_new_session=True)
assert child.stdout.readline() == "up\\n"
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends children with their parent")
def test_a_child_dies_with_its_parent() -> None:
    root = str(Path(__file__).parents[3])
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=root)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(child, 0)  # it lives
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(10)
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while _lives(child):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ends children with their parent")
def test_a_child_whose_parent_died_before_it_asked_ends() -> None:
    code = "from oppu.cli.up import die_with_parent; die_with_parent(); print('lives')"
    environment = {**os.environ, "OPPU_PARENT": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_nothing_else_is_needed_to_run_a_worker_by_hand(run: Run, tmp_path: Path) -> None:
    """Without a parent named, a worker is nobody's child: it gets as far as its settings."""
    (tmp_path / "file").touch()
    environment = {"OPPU_SERVICE__STATE_DIR": str(tmp_path / "file" / "state"), "PATH": os.environ["PATH"]}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "oppu", "ingest"], env=environment, capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 2
    assert "oppu: service.state_dir: cannot make " in done.stderr


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    """Return a stack of ended workers, two of which infer."""
    settings = Settings(service=ServiceSettings(state_dir=tmp_path), inference=InferenceSettings(slot="eu"))
    stack = Stack("127.0.0.1:1", settings, tmp_path / "oppu.toml", tmp_path, {}, None)  # type: ignore[arg-type]
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(30)
    for name in ("ingest", "update", "infer", "infer-2"):
        stack.children[name] = Child(name, name.partition("-")[0], process, 0.0)
    return stack


WORKERS = ("ingest", "updater", "inference-eu", "inference-eu.1")


def test_it_says_where_every_worker_listens_once_all_are_ready(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "READY_SECONDS", 0.0)
    health = {name: Health(ManualClock(), live_within_seconds=10) for name in WORKERS}
    with ExitStack() as servers:
        urls = {}
        for name in WORKERS:
            server = serve("127.0.0.1", 0, fresh().registry, health[name])
            servers.callback(server.close)
            urls[name] = f"http://127.0.0.1:{server.port}"
        for name in WORKERS[:3]:
            (tmp_path / f"{name}.url").write_text(f"{urls[name]}\n")
        with pytest.raises(FatalError, match=r"0 s: inference-eu\.1; see .*infer-2\.log$"):
            stack.addresses()
        (tmp_path / "inference-eu.1.url").write_text(urls["inference-eu.1"])
        assert stack.addresses() == urls
        health["updater"].not_ready("loop", "waits for the store")
        with pytest.raises(FatalError, match=r"0 s: updater; see .*update\.log$"):
            stack.addresses()


@pytest.mark.parametrize("content", ["", "http://127.0.0.1:", "rubbish"])
def test_an_address_that_is_not_one_yet_is_waited_for(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(up, "READY_SECONDS", 0.0)
    for name in WORKERS:
        (tmp_path / f"{name}.url").write_text(content)
    with pytest.raises(FatalError, match="0 s: ingest, updater, inference-eu, inference-eu.1;"):
        stack.addresses()


def test_somebody_else_at_a_worker_s_address_is_not_ready(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "READY_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=_greet, args=(listener, len(WORKERS)))
        answering.start()
        for name in WORKERS:
            (tmp_path / f"{name}.url").write_text(f"http://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(FatalError, match="not ready within 0 s"):
            stack.addresses()
        answering.join(10)


def _greet(listener: socket.socket, times: int) -> None:
    for _ in range(times):
        connection, _address = listener.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"220 not http\r\n\r\n")


def test_up_starts_whatever_the_environment_says_of_another_cluster(
    monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path
) -> None:
    def started(*_: object, **__: object) -> None:
        raise ConfigError("got as far as the stack")

    monkeypatch.setattr(up, "stack", started)
    for name, value in {
        "OPPU_KAFKA__SASL_PASSWORD": "hush",
        "OPPU_KAFKA__SSL_CAFILE": "/nope",
        "OPPU_KAFKA__BOOTSTRAP_SERVERS": "garbage",
    }.items():
        monkeypatch.setenv(name, value)
    assert run("up", "--dir", tmp_path / "stack").err.endswith("oppu: got as far as the stack\n")
