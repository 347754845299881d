"""What is wrong before anything starts: exit 2, all faults at once, each by its name; what breaks later: exit 1."""

import gzip
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from oppu.cli import cli, compose
from oppu.cli.contracts import generate
from oppu.errors import OppuError
from oppu.settings import ServiceSettings, Settings
from tests.oppu.cli.conftest import Done, Run

GOOD = {"event_id": "a", "user_id": "u", "task": "news_categorize", "occurred_at": "2026-01-01T00:00:00Z",
        "input": "x", "output": "politics"}  # fmt: skip
NOBODY = "127.0.0.1:9"
REQUEST_SECONDS = 3


def write_events(path: Path, *lines: object) -> Path:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


# --- settings
def test_every_fault_is_listed(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "oppu.toml"
    file.write_text("[kafka]\npartitions = 0\n[nonsense]\na = 1\n[retriever]\nmode = 'magic'\n", encoding="utf-8")
    monkeypatch.setenv("OPPU_UPDATER__HOLDOUT_SHARE", "2")
    done = run("--config", file, "store", "info")
    assert done.code == 2
    for name in ("kafka.partitions", "nonsense", "retriever.mode", "updater.holdout_share"):
        assert f"oppu: {name} (or OPPU_{name.replace('.', '__').upper()})" in done.err
    assert not done.out


@pytest.mark.parametrize("source", ["file", "environment"])
def test_a_setting_that_is_no_more_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    file = tmp_path / "oppu.toml"
    file.write_text("[updater]\nevidence = true\n" if source == "file" else "", encoding="utf-8")
    if source == "environment":
        monkeypatch.setenv("OPPU_UPDATER__EVIDENCE", "true")
    done = run("--config", file, "store", "info")
    said = "updater.evidence (or OPPU_UPDATER__EVIDENCE): Extra inputs are not permitted"
    if source == "environment":
        said = "OPPU_UPDATER__EVIDENCE: no such setting; "
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert done.err.startswith(f"oppu: {said}")


def test_config_file_from_the_environment(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPPU_CONFIG", str(tmp_path / "gone.toml"))
    assert run("store", "info").err == f"oppu: --config: no such file: {tmp_path / 'gone.toml'}\n"


@pytest.mark.parametrize("content", [None, "[kafka", "kafka = 3"])
def test_config_file_that_cannot_be_used(run: Run, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "oppu.toml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    done = run("--config", file, "store", "info")
    assert done.code == 2
    assert done.err.startswith("oppu: kafka" if content == "kafka = 3" else "oppu: --config: ")


def test_secrets_are_not_repeated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPPU_KAFKA__SECURITY_PROTOCOL", "SASL_SSL")
    monkeypatch.setenv("OPPU_KAFKA__SASL_PASSWORD", "hunter2")
    done = run("topics", "list")
    assert done.code == 2 and "sasl_username" in done.err
    assert "hunter2" not in done.out + done.err


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "oppu", "up", "--dir", str(tmp_path / "file" / "inside")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.startswith("oppu: --dir: cannot make ")) == (2, True)


# --- files of events
def test_produce_lists_faulty_lines_and_sends_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPPU_KAFKA__BOOTSTRAP_SERVERS", NOBODY)  # reaching for it would be exit 1
    bad = {**GOOD, "occurred_at": "yesterday", "input": 3}
    file = write_events(tmp_path / "e.jsonl", GOOD, bad, "", "not json", [1])
    done = run("produce", file)
    assert done.code == 2
    assert [line.split(": ")[1] for line in done.err.splitlines()] == [f"{file}:2", f"{file}:4", f"{file}:5"]
    assert "occurred_at" in done.err and "input" in done.err
    assert not done.out


def test_produce_lists_the_first_faults_only(run: Run, tmp_path: Path) -> None:
    done = run("produce", write_events(tmp_path / "e.jsonl", *["x"] * 30))
    assert (done.code, len(done.err.splitlines())) == (2, 11)
    assert done.err.endswith("and 20 more\n")


@pytest.mark.parametrize("kind", ["missing", "folder", "not gzip", "cut gzip", "broken gzip"])
def test_produce_from_a_file_that_cannot_be_read(run: Run, tmp_path: Path, kind: str) -> None:
    file = tmp_path / ("e.jsonl.gz" if "gzip" in kind else "e.jsonl")
    whole = gzip.compress(json.dumps(GOOD).encode() * 99)
    broken = whole[:30] + bytes(255 - byte for byte in whole[30:])
    content = {"not gzip": b"plain", "cut gzip": whole[:-20], "broken gzip": broken}.get(kind)
    if kind == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    done = run("produce", file)
    assert (done.code, done.err.startswith(f"oppu: {file}: cannot be read: ")) == (2, True), done.err


def test_adapt_refuses_what_does_not_fit_its_task(run: Run, tmp_path: Path) -> None:
    file = write_events(tmp_path / "e.jsonl", {**GOOD, "output": "NO SUCH LABEL"}, {**GOOD, "task": "nope"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    done = run("adapt", file, tmp_path / "out")
    assert (done.code, len(done.err.splitlines())) == (2, 2)
    assert run("adapt", file, tmp_path / "full").err.startswith("oppu: OUT: ")
    assert run("adapt", write_events(tmp_path / "none.jsonl"), tmp_path / "out").code == 2


def test_distill_refuses_what_teaches_nothing(run: Run, tmp_path: Path) -> None:
    file = write_events(tmp_path / "e.jsonl", GOOD, GOOD)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for out, named in (("full", ["OUT"]), ("new", ["EVENTS"]), ("e.jsonl", ["OUT", "EVENTS"])):  # the last is a file
        done = run("distill", file, tmp_path / out)
        assert (done.code, [line.split(": ")[1] for line in done.err.splitlines()]) == (2, named)
    wrong = (
        ("--layers", "0"),
        ("--neurons", "0"),
        ("--neurons", "1.1"),
        ("--neurons", "nan"),
        ("--learning-rate", "nan"),
    )
    for option, value in wrong:
        done = run("distill", file, tmp_path / "out", option, value)
        assert done.code == 2 and option in done.err
    assert run("distill", tmp_path / "none.jsonl", tmp_path / "out").code == 2
    assert not (tmp_path / "out").exists()


# --- requests
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--after", "3"], "--after"),
        (["--after", "-1:3"], "--after"),
        (["--choice", "one"], "choices"),
        (["--after", f"0:{2**70}"], "offset"),
    ],
)
def test_ask_names_the_faulty_option(run: Run, options: list[str], named: str) -> None:
    done = run("ask", "--user", "u", "--task", "t", *options, "text")
    assert done.code == 2
    assert named in done.err


def test_dead_letter_commands_check_their_arguments(run: Run) -> None:
    assert run("dead-letters", "show", "nonsense").code == 2
    assert run("dead-letters", "replay").err == "oppu: AT or --reason: give one of them\n"
    assert run("dead-letters", "replay", "0:0", "--reason", "invalid_json").code == 2
    for command in ("list", "replay"):
        done = run("dead-letters", command, "--reason", "invalid-json")
        assert done.code == 2 and "'invalid-json' is not one of 'invalid_utf8', 'invalid_json'" in done.err


# --- contracts
def test_contracts_are_written_checked_and_found_stale(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "contracts"
    assert run("contracts", "check", folder).code == 2
    assert run("contracts", "write", folder).code == 0
    assert run("contracts", "check", folder).out == "all current\n"
    (folder / "settings.md").write_text("old", encoding="utf-8")
    (folder / "predictions.schema.json").unlink()
    done = run("contracts", "check", folder)
    assert done.code == 2
    assert {Path(line.split(": ")[1]).name for line in done.err.splitlines()} == {
        "settings.md",
        "predictions.schema.json",
    }
    assert set(generate()) >= {"asyncapi.json", "settings.md", "behavior-events.schema.json"}


@pytest.mark.parametrize("inside", ["", "nested"])
def test_contracts_are_not_written_where_they_cannot_be(run: Run, tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    done = run("contracts", "write", tmp_path / "file" / inside)
    assert (done.code, done.err.startswith("oppu: FOLDER: cannot write ")) == (2, True), done.err


# --- doctor
@pytest.mark.parametrize("name", ["fusion", "text_fusion"])
@pytest.mark.parametrize("content", [None, "{}"], ids=["missing", "unfit"])
def test_doctor_reads_the_files_of_calibrate(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: str | None
) -> None:
    file = tmp_path / "fitted.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    monkeypatch.setenv("OPPU_KAFKA__BOOTSTRAP_SERVERS", NOBODY)
    for made in ("embedder", "model"):
        monkeypatch.setattr(compose, made, lambda *_args, **_named: SimpleNamespace(fingerprint="f", base="b"))
    assert fusion(run("doctor", "--json"))["ok"]
    monkeypatch.setenv(f"OPPU_MODEL__{name.upper()}", str(file))
    found = fusion(run("doctor", "--json"))
    assert not found["ok"] and str(file) in found["found"]


def fusion(done: Done) -> dict[str, Any]:
    """What doctor says of the fitted files."""
    [line] = [line for line in done.lines if line["check"] == "fusion"]
    return line


# --- what is away
@pytest.mark.parametrize(
    "command",
    [
        ["topics", "create"],
        ["topics", "list"],
        ["dead-letters", "list"],
        ["watch"],
        ["ask", "--user", "u", "--task", "news_categorize", "text"],
        ["topics", "adopt", "oppu.behavior-events", "0", "--offset", "1"],
        ["produce", "good.jsonl"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_broker_that_cannot_be_reached(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    write_events(tmp_path / "good.jsonl", GOOD)
    monkeypatch.setenv("OPPU_KAFKA__BOOTSTRAP_SERVERS", NOBODY)
    monkeypatch.setenv("OPPU_KAFKA__REQUEST_TIMEOUT_SECONDS", str(REQUEST_SECONDS))
    started = time.monotonic()
    done = run(*command)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(f"oppu: no Kafka broker can be reached: {NOBODY}")
    assert time.monotonic() - started < REQUEST_SECONDS + 5


@pytest.mark.parametrize(
    "command",
    [
        ["history", "u"],
        ["user"],
        ["profile", "u", "--task", "news_categorize"],
        ["adapters", "list"],
        ["adapters", "rollback", "u"],
        ["store", "info"],
        ["erase", "u", "--yes"],
    ],
    ids=" ".join,
)
def test_store_that_was_never_migrated(run: Run, command: list[str]) -> None:
    done = run(*command)
    assert done.code == 2
    assert "`oppu store migrate`" in done.err


def test_folders_that_hold_users_text_are_ours_alone(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        monkeypatch.setenv("OPPU_STORE__URL", f"sqlite:///{tmp_path}/store/history.db")
        assert run("store", "migrate").code == 0
        made = [tmp_path / "store", compose.state_dir(Settings(service=ServiceSettings(state_dir=tmp_path / "state")))]
        (tmp_path / "theirs").mkdir(mode=0o755)
        compose.state_dir(Settings(service=ServiceSettings(state_dir=tmp_path / "theirs")))
    finally:
        os.umask(before)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (*made, tmp_path / "theirs")] == [0o700, 0o700, 0o755]


def test_migrate_makes_the_store_usable(run: Run) -> None:
    assert run("store", "migrate").code == run("store", "migrate").code == 0
    assert run("store", "info", "--json").lines[0]["users"] == 0
    assert run("user").out == ""


# --- exit codes
@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (OppuError("it broke"), 1, "oppu: it broke\n"),
        (KeyboardInterrupt(), 130, None),
        (click.exceptions.Exit(3), 3, ""),
        (click.UsageError("which?"), 2, None),
    ],
    ids=["ours", "interrupt", "exit", "usage"],
)
def test_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, shown: str | None
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "get_command", lambda _ctx, _name: click.Command("fail", callback=fail))
    done = run("fail")
    assert done.code == code
    if shown is not None:
        assert done.err == shown
