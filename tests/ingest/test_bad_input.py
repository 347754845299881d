"""Bad input through the whole loop: each record ends in exactly one dead letter and never stops the others."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from oppu.effects import perform
from oppu.errors import DeadLetterLimitReached, Reason, TransientError
from oppu.loop import LoopState
from oppu.settings import IngestSettings, LimitsSettings
from oppu.store.records import IngestBatch, IngestResult
from oppu.values import Record
from tests.ingest.world import TOPICS, World, event_bytes, event_fields

DEEP = b"[" * 3000 + b"]" * 3000
FIELDS = event_fields("e1")

BAD: list[tuple[str, bytes | None, bytes | None, Reason]] = [
    ("invalid JSON", b"{not json", b"u1", Reason.INVALID_JSON),
    ("no value", None, b"u1", Reason.INVALID_JSON),
    ("not an object", b"[1]", b"u1", Reason.INVALID_JSON),
    ("deeply nested", b'{"x":' + DEEP + b"}", b"u1", Reason.LIMIT_EXCEEDED),
    ("NaN", b'{"x": NaN}', b"u1", Reason.INVALID_JSON),
    ("huge int", b'{"schema_version": 1' + b"0" * 3000 + b"}", b"u1", Reason.UNSUPPORTED_VERSION),
    ("invalid UTF-8", b'{"user_id": "\xff"}', b"u1", Reason.INVALID_UTF8),
    ("wrong type", event_bytes("e1", input=7), b"u1", Reason.INVALID_RECORD),
    (
        "missing field",
        json.dumps({k: v for k, v in FIELDS.items() if k != "task"}).encode(),
        b"u1",
        Reason.INVALID_RECORD,
    ),
    ("unknown task", event_bytes("e1", task="nonsense"), b"u1", Reason.UNKNOWN_TASK),
    ("future version", event_bytes("e1", schema_version=2), b"u1", Reason.UNSUPPORTED_VERSION),
    ("oversized", event_bytes("e1", input="x" * 5000), b"u1", Reason.LIMIT_EXCEEDED),
    ("1 MB text", event_bytes("e1", input="x" * 1_000_000), b"u1", Reason.LIMIT_EXCEEDED),
    ("empty text", event_bytes("e1", input=""), b"u1", Reason.INVALID_RECORD),
    ("empty output", event_bytes("e1", output=""), b"u1", Reason.INVALID_RECORD),
    ("blank text output", event_bytes("e1", task="headline", output=" \t"), b"u1", Reason.INVALID_RECORD),
    ("blank bare input", event_bytes("e1", task="tweet", input=" ", output=""), b"u1", Reason.INVALID_RECORD),
    ("naive time", event_bytes("e1", occurred_at="2025-12-31T12:00:00"), b"u1", Reason.INVALID_TIME),
    ("numeric time", event_bytes("e1", occurred_at=1767225600), b"u1", Reason.INVALID_TIME),
    ("absurd time", event_bytes("e1", occurred_at="9999-12-31T23:59:59Z"), b"u1", Reason.INVALID_TIME),
    ("missing key", event_bytes("e1"), None, Reason.KEY_MISMATCH),
    ("different key", event_bytes("e1"), b"u2", Reason.KEY_MISMATCH),
    ("NUL in user id", event_bytes("e1", "u\0"), b"u\0", Reason.INVALID_RECORD),
    ("lone surrogate in user id", event_bytes("e1", "u\ud800"), b"u\xed\xa0\x80", Reason.INVALID_RECORD),
    ("NUL in text", event_bytes("e1", input="a\0b"), b"u1", Reason.INVALID_RECORD),
    ("unknown label", event_bytes("e1", output="gardening"), b"u1", Reason.UNKNOWN_LABEL),
    ("label outside choices", event_bytes("e1", task="quote", choices=["a", "b"]), b"u1", Reason.UNKNOWN_LABEL),
    ("no choices", event_bytes("e1", task="quote"), b"u1", Reason.INVALID_RECORD),
]


@pytest.mark.parametrize(("value", "key", "reason"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_records_are_dead_lettered_unchanged(
    world: World, value: bytes | None, key: bytes | None, reason: Reason
) -> None:
    produced = world.send(value, key)
    world.event("good", "u9")
    world.turn()
    (letter,) = world.letters()
    assert (letter.reason, letter.key, letter.value) == (reason, key, value)
    assert (letter.origin, letter.origin_offset) == (produced.partition, produced.offset)
    assert world.ids("u9") == ["good"]
    assert world.ids("u1") == []
    assert world.outcomes() == {"refused": 1, "written": 1}
    assert world.value("oppu_ingest_dead_letters_total", reason=reason) == 1
    assert world.store.outbox(10) == []
    world.restart()
    world.turn(6, seconds=1.0)
    assert len(world.letters()) == 1, "its offset is durable"


@pytest.mark.parametrize(
    "user_id", ["é", "e\u0301", "用户", "👩‍👩‍👧", " ", "../x", "'\"\\%_", "\u202e", "\U0010ffff"], ids=ascii
)
def test_user_ids_with_any_unicode_are_stored_exactly(world: World, user_id: str) -> None:
    world.event("e1", user_id)
    world.turn()
    assert world.ids(user_id) == ["e1"]
    assert world.letters() == []


def test_user_ids_that_look_alike_are_different_users(world: World) -> None:
    for name in ("é", "e\u0301", "E\u0301", "É"):
        world.event(f"of {ascii(name)}", name)
    world.turn()
    for name in ("é", "e\u0301", "E\u0301", "É"):
        assert world.ids(name) == [f"of {ascii(name)}"]


def test_a_large_text_within_configured_limits_is_stored(make_world: Callable[..., World]) -> None:
    world = make_world(limits=LimitsSettings(record_bytes=2_000_000, text_characters=1_000_000))
    world.turn()
    world.event("e1", input="x" * 1_000_000)
    world.turn()
    assert len(world.stored()[0].input) == 1_000_000


def test_the_same_event_with_the_same_content_is_a_counted_duplicate(world: World) -> None:
    world.event("e1")
    world.event("e1")
    world.turn()
    world.event("e1")
    world.turn()
    assert world.ids() == ["e1"]
    assert world.letters() == []
    assert world.outcomes() == {"written": 1, "duplicate": 2}


def test_the_same_event_with_other_content_is_dead_lettered(world: World) -> None:
    world.event("e1")
    world.turn()
    clash = world.event("e1", output="sports")
    world.turn(3, seconds=1.0)
    assert [event.output for event in world.stored()] == ["politics"]
    (letter,) = world.letters()
    assert (letter.reason, letter.origin_offset) == (Reason.DUPLICATE_CONFLICT, clash.offset)
    assert world.outcomes() == {"written": 1, "conflict": 1}
    assert world.value("oppu_ingest_dead_letters_total", reason="duplicate_conflict") == 1


def test_the_same_event_id_of_another_user_is_another_event(world: World) -> None:
    world.event("e1", "u1")
    world.event("e1", "u2", output="sports")
    world.turn()
    assert [world.stored(user)[0].output for user in ("u1", "u2")] == ["politics", "sports"]


LIMITED = IngestSettings(dead_letter_share=0.5, dead_letter_window_records=10, dead_letter_min_users=3)


def test_too_many_refusals_of_many_users_stop_the_worker_before_anything_is_written(
    make_world: Callable[..., World],
) -> None:
    world = make_world(ingest=LIMITED)
    world.turn()
    for n in range(20):
        world.send(b"{", f"u{n}".encode())
    with pytest.raises(DeadLetterLimitReached):
        world.loop.run()
    assert world.loop.state is LoopState.CLOSED
    assert world.letters() == []
    assert world.store.outbox(10) == []
    assert world.next_offsets() == {}


def test_refusals_of_one_user_never_stop_the_worker(make_world: Callable[..., World]) -> None:
    world = make_world(ingest=LIMITED)
    world.turn()
    for _ in range(30):
        world.send(b"{", b"u1")
    world.turn()
    assert len(world.letters()) == 30


def test_without_a_limit_nothing_stops_the_worker(world: World) -> None:
    for n in range(50):
        world.send(b"{", f"u{n}".encode())
    world.turn()
    assert len(world.letters()) == 50


def test_few_refusals_among_many_records_do_not_stop_the_worker(make_world: Callable[..., World]) -> None:
    world = make_world(ingest=LIMITED)
    world.turn()
    for n in range(40):
        world.event(f"e{n}", f"u{n}")
        if n % 8 == 0:
            world.send(b"{", f"u{n}".encode())
    world.turn()
    assert len(world.letters()) == 5


def test_a_write_that_is_tried_again_counts_its_refusals_once(
    make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(ingest=LIMITED)
    world.turn()
    write, failures = world.store.write_events, iter([True] * 3)

    def failing(batch: IngestBatch) -> IngestResult:
        if next(failures, False):
            raise TransientError("away")
        return write(batch)

    monkeypatch.setattr(world.store, "write_events", failing)
    for n in range(4):  # of a window of ten: too few, unless counted three times
        world.send(b"{", f"u{n}".encode())
    world.turn(60, seconds=0.1)
    assert len(world.letters()) == 4


KILLER = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path

    import numpy as np

    from oppu.crash_guard import CrashGuard
    from oppu.embedder import HashEmbedder
    from tests.ingest.world import World, event_bytes

    class Embedder(HashEmbedder):
        def embed(self, texts):
            if any("kill" in text for text in texts):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().embed(texts)

    database, notes = Path(sys.argv[1]), Path(sys.argv[2])
    world = World(database, guard=CrashGuard(notes))
    world.worker._embedder = Embedder()
    # the in-memory broker dies with the process, so the same records are sent again: offsets are in the store
    for name in ("e1", "e2", "kill", "e4"):
        world.event(name, input=f"text {name}")
    world.turn(8, seconds=1.0)
    print([letter.reason for letter in world.letters()], world.ids(), world.outcomes())
""")


def test_a_record_that_kills_the_process_is_set_aside(template: Path, tmp_path: Path) -> None:
    database, root = tmp_path / "history.db", Path(__file__).resolve().parents[2]
    database.write_bytes(template.read_bytes())
    ends = []
    for _ in range(5):
        run = subprocess.run(
            [sys.executable, "-W", "error", "-c", KILLER, str(database), str(tmp_path / "notes.json")],
            capture_output=True,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            timeout=60,
        )
        ends.append(run.returncode)
    assert ends == [-9, -9, -9, -9, 0], run.stderr
    assert run.stdout.startswith("['worker_crashed'] ['e1', 'e2', 'e4']"), run.stdout


def test_poison_is_set_aside_without_being_looked_into(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    produced = world.event("e1")
    consumer = world.worker.consumer
    records: list[Record] = []
    while not records:
        records = consumer.poll(0, 10)
    monkeypatch.setattr(world.worker, "_embedder", None)
    perform(world.worker.poison(records[0], world.clock.now()))
    assert perform(world.worker.poison(records[0], world.clock.now())).handled == 1
    world.turn(3, seconds=1.0)
    assert [letter.reason for letter in world.letters()] == [Reason.WORKER_CRASHED]
    assert world.next_offsets()[produced.partition] == produced.offset + 1
    assert world.ids() == []


def test_a_damaged_prediction_is_counted_and_skipped(world: World) -> None:
    for value in (b"{", b"{}", b"\xff", None, b'{"status": "ok"}', b'{"x":' + DEEP + b"}"):
        world.send(value, b"u1", TOPICS.predictions)
    world.turn()
    assert world.outcomes() == {"skipped": 6}
    assert world.letters() == []


@pytest.mark.parametrize("output", ["", " "])
def test_a_bare_text_is_stored_where_the_task_takes_it(world: World, output: str) -> None:
    world.send(event_bytes("e1", task="tweet", output=output), b"u1")
    world.turn()
    assert world.letters() == []
    assert world.ids("u1") == ["e1"]
    assert world.outcomes() == {"written": 1}
