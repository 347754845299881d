"""Lines of events: what `oppu produce` refuses before it sends anything, and how it reads what it is given."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.oppu.cli.conftest import MOOD, Run
from tests.oppu.cli.test_faults import GOOD, NOBODY, write_events

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "wrong label": ({"output": "FISHING"}, "output: expected one of "),
    "blank output": ({"output": " "}, "output: expected text that is not blank"),
    "far future": ({"occurred_at": "2999-01-01T00:00:00Z"}, "occurred_at: expected at most "),
    "long text": ({"input": "x" * 30_000}, "input: at most 20000 characters allowed, got 30000"),
    "large record": ({"input": "x" * 3_000_000}, "record: at most 262144 bytes allowed, got "),
    "long id": ({"user_id": "\U0001f600" * 200}, "user_id: at most 512 bytes allowed, got 800"),
    "newer schema": ({"schema_version": 2}, "schema_version: at most 1 is understood"),
    "equal choices": ({"choices": ["politics", "politics"]}, "choices: expected distinct texts"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_produce_sends_nothing_that_ingest_would_refuse(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.setenv("OPPU_KAFKA__BOOTSTRAP_SERVERS", NOBODY)  # reaching for it would be exit 1
    changed, said = REFUSED[kind]
    file = write_events(tmp_path / "e.jsonl", GOOD, {**GOOD, **changed})
    done = run("produce", file)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"oppu: {file}:2: {said}"), done.err[:300]


def test_produce_checks_against_the_settings(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mood.toml").write_text(MOOD, encoding="utf-8")
    monkeypatch.setenv("OPPU_SERVICE__TASKS_DIR", str(tmp_path))
    monkeypatch.setenv("OPPU_LIMITS__TEXT_CHARACTERS", "5")
    file = write_events(
        tmp_path / "e.jsonl", *({**GOOD, "task": "mood", "output": "sad", "input": x} for x in ("it is", "it rains"))
    )
    assert run("produce", file).err == f"oppu: {file}:2: input: at most 5 characters allowed, got 8\n"


def test_a_task_that_is_not_known_here_is_left_to_ingest(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPPU_KAFKA__BOOTSTRAP_SERVERS", NOBODY)
    monkeypatch.setenv("OPPU_KAFKA__REQUEST_TIMEOUT_SECONDS", "2")
    file = write_events(tmp_path / "e.jsonl", {**GOOD, "task": "elsewhere"}, {**GOOD, "task": "elsewhere"})
    assert run("produce", file).code == 1  # it got as far as the broker that is not there
    assert [r.getMessage().split(":")[0] for r in caplog.records if "elsewhere" in r.getMessage()] == [
        "task elsewhere is not known here"
    ]


NOT_JSON = {"bytes": b'{"event_id": "\xff"}', "nested": b'{"more":' + b"[" * 200_000, "text": b"a"}


@pytest.mark.parametrize("kind", NOT_JSON)
@pytest.mark.parametrize("source", ["file", "standard input"])
@pytest.mark.parametrize("command", [["produce"], ["adapt"]])
def test_lines_that_are_no_json_are_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, source: str, command: list[str]
) -> None:
    content = json.dumps(GOOD).encode() + b"\n" + NOT_JSON[kind] + b"\n"
    file = tmp_path / "e.jsonl" if source == "file" else Path("-")
    if source == "file":
        file.write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))  # as with LC_ALL=C
    done = run(*command, file, *([tmp_path / "out"] if command == ["adapt"] else []))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"oppu: {file}:2: expected one JSON object in UTF-8: ")
    assert len(done.err.splitlines()) == 1
