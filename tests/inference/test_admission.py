"""Which records become asks, when they are late, and how long one waits for its history."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from inference.admission import Ask, HistoryGate, Refusal, Verdict, admit, refuse
from oppu.errors import Reason
from oppu.settings import InferenceSettings, LimitsSettings, Settings
from oppu.store.records import StoredOffset
from oppu.tasks import Task, Tasks
from oppu.values import Partition, Record

START = datetime(2026, 1, 1, tzinfo=UTC)
START_MS = int(START.timestamp() * 1000)
TASKS = Tasks(
    {
        "label": Task("label", "choice", "{input}", "is", labels=("a", "b")),
        "cite": Task("cite", "choice", "{input}", "is"),
        "rate": Task("rate", "rating", "{input}", "is", labels=("1", "2", "3")),
        "write": Task("write", "text", "{input}", "is"),
    }
)
EVENTS = "oppu.behavior-events"


def _fields(**changes: Any) -> dict[str, Any]:
    fields = {"request_id": "r1", "user_id": "anna", "task": "label", "input": "some words"}
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def _record(
    value: bytes | dict[str, Any] | None, *, key: bytes | None = b"anna", offset: int = 0, at: int = START_MS
) -> Record:
    raw = json.dumps(value).encode() if isinstance(value, dict) else value
    return Record(Partition("oppu.prediction-requests", 0), offset, at, key, raw)


def _ask(settings: Settings | None = None, offset: int = 0, at: int = START_MS, **changes: Any) -> Ask:
    item = admit(_record(_fields(**changes), offset=offset, at=at), TASKS, settings or Settings())
    assert isinstance(item, Ask)
    return item


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "nope"}, Reason.UNKNOWN_TASK),
        ({"task": "cite"}, Reason.INVALID_RECORD),
        ({"task": 3}, Reason.INVALID_RECORD),
        ({"input": None}, Reason.INVALID_RECORD),
        ({"input": "  "}, Reason.INVALID_RECORD),
        ({"input": "x" * 200}, Reason.LIMIT_EXCEEDED),
        ({"input": "x" * 3000}, Reason.LIMIT_EXCEEDED),
        ({"schema_version": 2}, Reason.UNSUPPORTED_VERSION),
        ({"deadline": "2026-01-01T00:00:00"}, Reason.INVALID_TIME),
        ({"options": {"retrieve": 65}}, Reason.LIMIT_EXCEEDED),
        ({"options": {"max_new_tokens": 1000}}, Reason.LIMIT_EXCEEDED),
        ({"choices": ["a", "a"]}, Reason.INVALID_RECORD),
        ({"choices": [str(i) for i in range(20)]}, Reason.LIMIT_EXCEEDED),
        ({"task": "rate", "choices": ["1", "good"]}, Reason.INVALID_RECORD),
        ({"task": "rate", "choices": ["1", "nan"]}, Reason.INVALID_RECORD),
    ],
)
def test_bad_requests_are_refused_to_their_sender(changes: dict[str, Any], reason: Reason) -> None:
    settings = Settings(limits=LimitsSettings(record_bytes=2048, text_characters=100, choices=10))
    item = admit(_record(_fields(**changes)), TASKS, settings)
    assert isinstance(item, Refusal)
    assert (item.reason, item.to) == (reason, ("r1", "anna"))


@pytest.mark.parametrize(
    ("value", "key", "reason"),
    [
        (None, b"anna", Reason.INVALID_JSON),
        (b"", b"anna", Reason.INVALID_JSON),
        (b"{", b"anna", Reason.INVALID_JSON),
        (b"[1]", b"anna", Reason.INVALID_JSON),
        (b'"\xff"', b"anna", Reason.INVALID_UTF8),
        (json.dumps(_fields(request_id=None)).encode(), b"anna", Reason.INVALID_RECORD),
        (json.dumps(_fields(user_id=None)).encode(), b"anna", Reason.INVALID_RECORD),
        (json.dumps(_fields(request_id=7)).encode(), b"anna", Reason.INVALID_RECORD),
        (json.dumps(_fields(request_id="\ud800")).encode(), b"anna", Reason.INVALID_RECORD),
    ],
)
def test_records_that_name_nobody_are_for_the_dead_letters(
    value: bytes | None, key: bytes | None, reason: Reason
) -> None:
    item = admit(_record(value, key=key), TASKS, Settings())
    assert isinstance(item, Refusal)
    assert (item.reason, item.to) == (reason, None)


@pytest.mark.parametrize("key", [None, b"", b"bert"])
@pytest.mark.parametrize("task", ["pick", "nope"])
def test_a_request_with_a_wrong_key_is_refused_to_the_user_it_names(key: bytes | None, task: str) -> None:
    item = admit(_record(json.dumps(_fields(task=task)).encode(), key=key), TASKS, Settings())
    assert isinstance(item, Refusal)
    assert (item.reason, item.to) == (Reason.KEY_MISMATCH, ("r1", "anna"))


def test_a_refusal_is_short_however_many_faults_there_are() -> None:
    assert len(refuse(_record(_fields()), Reason.INVALID_RECORD, "choices.1: wrong; " * 5000).message) == 1000


def test_choices_come_from_the_request_or_the_task() -> None:
    assert _ask().choices == ("a", "b")
    assert _ask(choices=["x", "y"]).choices == ("x", "y")
    assert _ask(task="write", choices=["x", "y"]).choices == ()


def test_default_deadline_counts_from_the_records_time() -> None:
    ask = _ask(Settings(inference=InferenceSettings(default_deadline_seconds=30)))
    assert not ask.late(START + timedelta(seconds=29.9))
    assert ask.late(START + timedelta(seconds=30))


def test_an_own_deadline_wins_over_the_default_either_way() -> None:
    early = _ask(deadline=(START + timedelta(seconds=1)).isoformat())
    late = _ask(deadline=(START + timedelta(hours=1)).isoformat())
    assert early.late(START + timedelta(seconds=2))
    assert not late.late(START + timedelta(minutes=59))


@pytest.mark.parametrize(("default", "at"), [(0.0, START_MS), (30.0, -1)])
def test_no_deadline_where_none_is_set_or_the_record_has_no_time(default: float, at: int) -> None:
    ask = _ask(Settings(inference=InferenceSettings(default_deadline_seconds=default)), at=at)
    assert not ask.late(START + timedelta(days=400))


def test_the_farthest_deadlines_do_not_overflow() -> None:
    assert not _ask(deadline="9999-12-31T23:59:59-12:00").late(START)
    assert _ask(deadline="0001-01-01T00:00:00+14:00").late(START)
    assert not _ask(at=2**62).late(START)


class TestHistoryGate:
    def _judge(self, gate: HistoryGate, ask: Ask, reached: int | None, *, at: float, now: datetime = START) -> Verdict:
        stored = {} if reached is None else {Partition(EVENTS, 3): StoredOffset(reached, None)}
        return gate.judge(ask, stored, EVENTS, now=now, at=at)

    def test_ready_once_ingest_is_past_the_event(self) -> None:
        gate, ask = HistoryGate(0.5), _ask(after={"partition": 3, "offset": 7})
        assert self._judge(gate, ask, None, at=0) is Verdict.HOLD
        assert self._judge(gate, ask, 7, at=0) is Verdict.HOLD
        assert self._judge(gate, ask, 8, at=0) is Verdict.READY
        assert self._judge(gate, _ask(), None, at=0) is Verdict.READY

    def test_waits_no_longer_than_it_may(self) -> None:
        gate, ask = HistoryGate(0.5), _ask(after={"partition": 3, "offset": 7})
        gate.hold([ask.record], 10.0)
        gate.hold([ask.record], 10.3)
        assert self._judge(gate, ask, None, at=10.49) is Verdict.HOLD
        assert self._judge(gate, ask, None, at=10.5) is Verdict.BEHIND

    def test_those_behind_a_waiting_one_wait_with_it_not_after_it(self) -> None:
        gate = HistoryGate(0.5)
        first, second = (_ask(offset=i, after={"partition": 3, "offset": 7}) for i in range(2))
        gate.hold([first.record, second.record], 0.0)
        gate.release([first.record])
        assert self._judge(gate, second, None, at=0.5) is Verdict.BEHIND

    def test_stops_waiting_a_little_before_the_deadline(self) -> None:
        gate = HistoryGate(100)
        ask = _ask(after={"partition": 3, "offset": 7}, deadline=(START + timedelta(seconds=1)).isoformat())
        assert self._judge(gate, ask, None, at=0) is Verdict.HOLD
        assert self._judge(gate, ask, None, at=0, now=START + timedelta(seconds=0.95)) is Verdict.BEHIND

    def test_forgets_partitions_that_left(self) -> None:
        gate, ask = HistoryGate(0.5), _ask(after={"partition": 3, "offset": 7})
        gate.hold([ask.record], 0.0)
        gate.keep_only([])
        assert self._judge(gate, ask, None, at=9) is Verdict.HOLD

    def test_a_wait_of_zero_never_holds(self) -> None:
        assert self._judge(HistoryGate(0), _ask(after={"partition": 3, "offset": 7}), None, at=0) is Verdict.BEHIND
