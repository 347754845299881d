"""The ingest worker through its loop: exactly-once writes, answers, relay, gauges, faults between effects."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import numpy as np
import pytest

from ingest import relay
from ingest.step import RELAY_EVERY_SECONDS
from oppu.effects import Effect, Steps, T, perform
from oppu.errors import FatalError, InvalidRecord, Reason, TransientError
from oppu.health import Health
from oppu.loop import LoopState
from oppu.store.records import IngestBatch, IngestResult, NewRefusal
from oppu.values import OutRecord, Partition, RequestId, UserId
from tests.ingest.world import TOPICS, World


def test_an_event_is_stored_in_full(world: World) -> None:
    sent_at = world.clock.now()
    world.event("e1", task="quote", choices=["a", "b"], output="b", in_reply_to="r1", input="some words")
    world.clock.advance(0.5)
    world.turn()
    (event,) = world.stored()
    assert (event.event_id, event.seq, event.task, event.input, event.output) == ("e1", 1, "quote", "some words", "b")
    assert (event.choices, event.in_reply_to) == (("a", "b"), RequestId("r1"))
    assert event.occurred_at == datetime(2025, 12, 31, 12, tzinfo=UTC)
    assert event.recorded_at == sent_at
    assert event.embedding is not None
    np.testing.assert_allclose(event.embedding, world.embedder.embed(["some words"])[0], atol=1e-3)


def test_sequences_have_no_gaps_and_follow_arrival(world: World) -> None:
    for n in range(7):
        world.event(f"e{n}", "u1" if n % 2 else "u2")
    world.turn()
    assert [(e.seq, e.event_id) for e in world.stored("u1")] == [(1, "e1"), (2, "e3"), (3, "e5")]
    assert [(e.seq, e.event_id) for e in world.stored("u2")] == [(1, "e0"), (2, "e2"), (3, "e4"), (4, "e6")]


def test_staleness_and_embedding_time_are_measured(world: World) -> None:
    world.event("e1")
    world.clock.advance(2.0)
    world.turn()
    assert world.value("oppu_ingest_event_to_retrievable_seconds_sum") == pytest.approx(2.0)
    assert world.value("oppu_ingest_event_to_retrievable_seconds_count") == 1
    assert world.value("oppu_ingest_embed_duration_seconds_count") == 1


def test_a_clock_that_jumps_back_makes_no_negative_staleness(world: World) -> None:
    world.event("e1")
    world.clock.jump(-3600)
    world.turn()
    assert world.value("oppu_ingest_event_to_retrievable_seconds_sum") == 0
    assert world.stored()[0].recorded_at == world.clock.now()


def test_a_restart_goes_on_where_the_store_says(world: World) -> None:
    world.event("e1")
    world.turn()
    world.restart()
    world.event("e2")
    world.turn(6, seconds=1.0)
    assert world.ids() == ["e1", "e2"]
    assert world.outcomes() == {"written": 2}


class Crash(BaseException):
    """The process ends here."""


def crashing(at: int, *, after: bool) -> Callable[[Steps[T]], T]:
    """Return a driver that ends the process before, or right after, the effect numbered ``at``."""
    numbers = iter(range(10**6))

    def drive(steps: Steps[T]) -> T:
        def run(effect: Effect) -> object:
            number = next(numbers)
            if number == at and not after:
                raise Crash(effect.name)
            result = effect.run()
            if number == at:
                raise Crash(effect.name)
            return result

        try:
            effect = next(steps)
            while True:
                effect = steps.send(run(effect))
        except StopIteration as stop:
            value: T = stop.value
            return value

    return drive


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(8))
def test_a_crash_between_any_two_effects_loses_and_doubles_no_event(world: World, at: int, after: bool) -> None:
    world.loop.close()
    world.worker = world.new_worker()
    world.loop = world.new_loop(crashing(at, after=after))
    world.event("e1")
    world.send(b"{", b"u1")
    world.event("e2", "u2")
    try:
        world.turn(4, seconds=1.0)
    except Crash:
        pass
    world.restart()
    world.event("e3")
    world.turn(8, seconds=1.0)
    assert world.ids() == ["e1", "e3"]
    assert world.ids("u2") == ["e2"]
    letters = world.letters()
    assert len({(letter.origin, letter.origin_offset) for letter in letters}) == 1
    assert 1 <= len(letters) <= 2, "at least once, told apart by its origin"
    assert world.store.outbox(10) == []


def test_a_write_whose_acknowledgement_is_lost_is_not_repeated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write, lost = world.store.write_events, iter([True])

    def lossy(batch: IngestBatch) -> IngestResult:
        result = write(batch)
        if next(lost, False):
            raise TransientError("connection lost in commit")
        return result

    monkeypatch.setattr(world.store, "write_events", lossy)
    world.event("e1")
    world.event("e2")
    world.turn(4, seconds=0.2)
    assert world.ids() == ["e1", "e2"]
    assert world.outcomes() == {}, "counted only what was known to be written"
    world.event("e3")
    world.turn(4)
    assert world.ids() == ["e1", "e2", "e3"]


def test_a_zombie_writes_nothing_and_goes_on_from_the_store(world: World) -> None:
    partition = world.event("e1").partition
    world.turn()
    second = world.event("e2")
    world.event("e3")
    # another worker finished e2 while this one still believed that the partition was its own
    world.store.adopt_offset("memory", partition, second.offset + 1, None)
    world.turn(6, seconds=0.2)
    assert world.value("oppu_worker_retries_total", worker="ingest", kind="OffsetConflict") == 1
    assert world.ids() == ["e1", "e3"], "what the store says is done is not done again"
    assert world.loop.state is LoopState.RUNNING


def test_a_locked_store_is_waited_for(world: World) -> None:
    world.event("e1")
    path = world.settings.store.url.removeprefix("sqlite:///")
    with sqlite3.connect(path, isolation_level=None) as blocker:
        blocker.execute("BEGIN EXCLUSIVE")
        world.turn(5, seconds=0.3)
        assert not world.health.is_ready()
        assert world.health.is_live()
        blocker.execute("ROLLBACK")
    blocker.close()
    world.turn(40, seconds=0.3)
    assert world.ids() == ["e1"]
    assert world.health.is_ready()


def test_a_store_that_fails_and_recovers_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failures = world.store.write_events, iter([True] * 4)

    def full(batch: IngestBatch) -> IngestResult:
        if next(failures, False):
            raise TransientError("disk full")
        return write(batch)

    monkeypatch.setattr(world.store, "write_events", full)
    for n in range(5):
        world.event(f"e{n}")
    world.turn(80, seconds=0.1)
    assert world.ids() == [f"e{n}" for n in range(5)]
    assert world.outcomes() == {"written": 5}


def test_a_broker_that_is_away_at_the_start_and_in_mid_run_is_waited_for(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.event("e1")
    world.broker.unavailable = True
    world.turn(10, seconds=0.2)
    assert world.loop.state is LoopState.NEW
    world.broker.unavailable = False
    world.turn(40, seconds=0.2)
    assert world.ids() == ["e1"]
    world.broker.unavailable = True
    world.turn(10, seconds=0.2)
    assert not world.health.is_ready()
    world.broker.unavailable = False
    world.event("e2")
    world.turn(40, seconds=0.2)
    assert world.ids() == ["e1", "e2"]


def test_a_topic_that_is_missing_is_waited_for(
    make_world: Callable[..., World], caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world()
    spec = world.broker.admin().describe_topics([TOPICS.predictions])[TOPICS.predictions]
    world.broker.delete_topic(TOPICS.predictions)
    world.turn(5, seconds=0.2)
    assert world.loop.state is LoopState.NEW
    assert "oppu topics create" in caplog.text
    world.broker.admin().create_topics([spec])
    world.event("e1")
    world.turn(40, seconds=0.2)
    assert world.ids() == ["e1"]


# --- upkeep


def test_gauges_show_the_store(world: World) -> None:
    world.event("e1", "u1")
    world.event("e2", "u2")
    world.turn(8, seconds=1.0)
    assert world.value("oppu_ingest_users") == 2
    assert world.value("oppu_ingest_events") == 2
    assert world.value("oppu_ingest_outbox_records") == 0


def test_the_store_is_not_asked_for_gauges_at_every_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    counts = world.store.counts

    def counted() -> dict[str, int]:
        calls.append(world.clock.monotonic())
        return counts()

    monkeypatch.setattr(world.store, "counts", counted)
    world.turn(200, seconds=0.1)
    assert 3 <= len(calls) <= 5


def test_rows_that_others_put_into_the_outbox_are_sent(world: World) -> None:
    reader = world.broker.consumer("reader", [TOPICS.updates], lambda p, c: dict.fromkeys(p, 0), client_id="r")
    row = OutRecord(TOPICS.updates, b"u1", b"{}")
    refusal = NewRefusal(row, Partition(TOPICS.events, 0), 0)
    batch = IngestBatch("elsewhere", (), refused=(refusal,), now=world.clock.now())
    world.store.write_events(batch)
    world.turn(3, seconds=1.0)
    found = [record for _ in range(4) for record in reader.poll(0, 10)]
    assert [(record.key, record.value) for record in found] == [(b"u1", b"{}")]
    assert world.store.outbox(10) == []


def test_a_step_says_that_more_of_the_outbox_can_be_sent_at_once(world: World) -> None:
    world.turn(20, seconds=1.0)
    row = OutRecord(TOPICS.updates, b"u1", b"{}")
    refusals = tuple(NewRefusal(row, Partition(TOPICS.events, 0), 0) for _ in range(relay.ROWS + 1))
    world.store.write_events(IngestBatch("elsewhere", (), refused=refusals, now=world.clock.now()))
    world.clock.advance(RELAY_EVERY_SECONDS)
    more = [perform(world.worker.step([], world.clock.now())).more for _ in range(4)]
    assert more == [True, True, False, False] and world.store.outbox(1) == []


def test_a_relay_that_fails_is_tried_again_with_a_new_producer(world: World) -> None:
    failures = iter([True])

    def fault(operation: str) -> None:
        if operation == "producer.send" and next(failures, False):
            raise TransientError("not enough replicas")

    world.send(b"{", b"u1")
    world.broker.on_call(fault)
    before = world.worker._relay._producer
    world.turn(8, seconds=0.2)
    assert world.worker._relay._producer is not before
    assert [letter.reason for letter in world.letters()] == [Reason.INVALID_JSON]
    assert world.outcomes() == {"refused": 1}


def test_a_row_that_no_topic_takes_holds_up_no_other(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    send = world.worker._relay._producer.send  # type: ignore[union-attr]

    def picky(records: list[OutRecord]) -> object:
        if any(record.value == b"{big" for record in records):
            raise InvalidRecord(Reason.LIMIT_EXCEEDED, "record: larger than the topic takes")
        return send(records)

    monkeypatch.setattr(world.worker._relay._producer, "send", picky)
    for value in (b"{1", b"{big", b"{2"):
        world.send(value, b"u1")
    world.turn(8, seconds=1.0)
    assert sorted(letter.value or b"" for letter in world.letters()) == [b"{1", b"{2"]
    assert [row.record.value for row in world.store.outbox(10)] == [b"{big"]
    assert "stays" in caplog.text
    assert world.value("oppu_ingest_outbox_records") == 1
    assert world.loop.state is LoopState.RUNNING


def test_rows_that_no_topic_takes_hold_up_no_other_however_many(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "ROWS", 2)
    send = world.worker._relay._producer.send  # type: ignore[union-attr]

    def picky(records: list[OutRecord]) -> object:
        if any(record.value == b"{big" for record in records):
            raise InvalidRecord(Reason.LIMIT_EXCEEDED, "record: larger than the topic takes")
        return send(records)

    monkeypatch.setattr(world.worker._relay._producer, "send", picky)
    for value in (b"{big", b"{big", b"{big", b"{1"):
        world.send(value, b"u1")
    world.turn(8, seconds=1.0)
    assert [letter.value for letter in world.letters()] == [b"{1"]
    monkeypatch.undo()  # the topic's limit was raised
    world.turn(8, seconds=1.0)
    assert [letter.value for letter in world.letters()] == [b"{1", b"{big", b"{big", b"{big"]


def test_one_of_several_workers_sends_the_outbox(world: World) -> None:
    other = world.new_worker()
    loop, world.worker = world.loop, other
    second = world.new_loop()
    for _ in range(20):
        loop.turn()
        second.turn()
        world.clock.advance(1.0)
    workers = [loop._worker, other]
    first = Partition(TOPICS.events, 0)
    (sender,) = [w for w in workers if first in w.consumer.assignment()]
    (idle,) = [w for w in workers if w is not sender]
    refusal = NewRefusal(OutRecord(TOPICS.updates, b"u1", b"{}"), first, 0)
    world.store.write_events(IngestBatch("elsewhere", (), refused=(refusal,), now=world.clock.now()))
    perform(idle.step([], world.clock.now()))
    assert len(world.store.outbox(9)) == 1
    perform(sender.step([], world.clock.now()))
    assert world.store.outbox(9) == []


def test_an_embedder_that_fails_on_everything_is_no_records_fault(world: World) -> None:
    world.event("e1")

    def lost(_texts: Sequence[str]) -> None:
        raise RuntimeError("no device")

    world.embedder.embed = lost  # type: ignore[method-assign,assignment]
    with pytest.raises(FatalError, match="fails on any text: RuntimeError: no device"):
        world.turn(3)


def test_an_erased_user_s_older_records_are_counted_and_dropped(world: World) -> None:
    world.event("e1")
    world.turn()
    late = world.event("e2")
    world.store.erase(
        UserId("u1"),
        cluster_id="memory",
        end_offsets={late.partition: late.offset + 1},
        now=world.clock.now(),
        announce=OutRecord(TOPICS.updates, b"u1", None),
    )
    world.event("e3")
    world.turn()
    assert world.outcomes() == {"written": 2, "erased": 1}
    assert world.ids() == ["e3"]
    assert world.letters() == []


def test_two_workers_share_the_partitions_and_write_each_event_once(world: World) -> None:
    other = world.new_worker()
    health = Health(world.clock, live_within_seconds=60)
    first, world.worker = world.worker, other
    world.health, old = health, world.loop
    world.loop = world.new_loop()
    both = [old, world.loop]
    for n in range(60):
        world.event(f"e{n}", f"u{n % 7}")
        both[n % 2].turn()
        both[(n + 1) % 2].turn()
        world.clock.advance(0.2)
    for _ in range(30):
        for loop in both:
            loop.turn()
        world.clock.advance(0.2)
    assert sorted(e for u in range(7) for e in world.ids(f"u{u}")) == sorted(f"e{n}" for n in range(60))
    assert not first.consumer.assignment() & other.consumer.assignment()
    old.close()


@pytest.fixture(autouse=True)
def _faults_end_with_the_test(world: World) -> Iterator[None]:
    yield
    world.broker.on_call(None)
    world.broker.unavailable = False
