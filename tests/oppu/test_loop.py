"""The loop around a scripted worker on the in-memory broker: order, holding, recovery, watchdog, drain."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from oppu.clock import ManualClock
from oppu.crash_guard import CrashGuard, Guard, NullGuard
from oppu.effects import Effect, Steps
from oppu.errors import (
    Backpressure,
    DeadLetterLimitReached,
    FatalError,
    IllegalTransition,
    OffsetConflict,
    ProducerFenced,
    TransientError,
)
from oppu.health import Health
from oppu.kafka.memory import MemoryBroker
from oppu.kafka.port import Consumer, Producer, TopicSpec
from oppu.loop import Loop, LoopState
from oppu.metrics import Metrics, fresh
from oppu.settings import KafkaSettings, ServiceSettings, Settings
from oppu.values import OutRecord, Partition, Record
from oppu.worker import StepOutcome

TOPIC = "in"
Script = Callable[[Sequence[Record]], StepOutcome | None]


class Scripted:
    """A worker whose durable state is a list of values and next offsets; ``script`` may interfere with a step."""

    name = "scripted"

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.script: Script = lambda records: None
        self.seen: list[tuple[str, ...]] = []
        self.stored: list[str] = []
        self.next: dict[Partition, int] = {}
        self.poisoned: list[str] = []
        self.recovered: list[Exception] = []
        self.recovery_error: Exception | None = None
        self.opened = self.closed = 0
        self._consumer: Consumer | None = None

    @property
    def consumer(self) -> Consumer:
        assert self._consumer is not None
        return self._consumer

    def open(self) -> None:
        self._consumer = self.broker.consumer("group", [TOPIC], self.start, client_id="scripted")
        self.opened += 1

    def start(
        self, assigned: frozenset[Partition], committed: Mapping[Partition, int | None]
    ) -> Mapping[Partition, int]:
        return {p: self.next.get(p, 0) for p in assigned}

    def step(self, records: Sequence[Record], now: datetime) -> Steps[StepOutcome]:
        self.seen.append(tuple(_text(r) for r in records))
        outcome = self.script(records) or StepOutcome(len(records))
        held = set(map(_text, outcome.held))
        yield Effect("store.write", lambda: self._write([r for r in records if _text(r) not in held]))
        return outcome

    def poison(self, record: Record, now: datetime) -> Steps[StepOutcome]:
        self.poisoned.append(_text(record))
        yield Effect("store.poison", lambda: self.next.update({record.partition: record.offset + 1}))
        return StepOutcome(1)

    def recover(self, error: Exception) -> Steps[None]:
        self.recovered.append(error)
        if self.recovery_error is not None:
            raise self.recovery_error
        for partition in sorted(self.consumer.assignment()):
            where = self.next.get(partition, 0)
            yield Effect("consumer.seek", partial(self.consumer.seek, partition, where))

    def close(self) -> None:
        self.consumer.close()
        self.closed += 1

    def _write(self, records: Sequence[Record]) -> None:
        for record in records:
            assert record.offset == self.next.get(record.partition, 0), "out of order, twice, or skipped"
            self.next[record.partition] = record.offset + 1
            self.stored.append(_text(record))


class World:
    """A loop with everything around it."""

    def __init__(self, guard: Guard | None = None, partitions: int = 2, **kafka: float) -> None:
        self.clock = ManualClock()
        self.broker = MemoryBroker(self.clock)
        self.broker.admin().create_topics([TopicSpec(TOPIC, partitions, 1)])
        self.worker = Scripted(self.broker)
        self.metrics: Metrics = fresh()
        self.health = Health(self.clock, live_within_seconds=60)
        self.settings = Settings(
            kafka=KafkaSettings.model_validate(kafka), service=ServiceSettings(max_backoff_seconds=4)
        )
        self.guard: Guard = guard or NullGuard()
        self.loop = self.new_loop()
        self._producer: Producer = self.broker.producer(client_id="test")

    def new_loop(self) -> Loop:
        return Loop(
            self.worker,
            settings=self.settings,
            clock=self.clock,
            metrics=self.metrics,
            health=self.health,
            guard=self.guard,
            jitter=lambda: 1.0,
        )

    def send(self, *texts: str, key: str = "a") -> Partition:
        produced = self._producer.send([OutRecord(TOPIC, key.encode(), text.encode()) for text in texts])
        return produced[0].partition

    def turn(self, times: int = 1, *, seconds: float = 0.0) -> None:
        for _ in range(times):
            self.loop.turn()
            self.clock.advance(seconds)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"worker": "scripted", **labels})


@pytest.fixture
def world() -> World:
    world = World()
    world.turn(3)
    return world


def _text(record: Record) -> str:
    return (record.value or b"").decode()


def _two_keys(world: World) -> tuple[str, str]:
    """Return two keys that lie on different partitions."""
    names = {world.send("", key=name): name for name in "abcdefgh"}
    world.turn(2)
    world.worker.stored.clear()
    world.worker.seen.clear()
    first, second = names.values()
    return first, second


def _hold_once(*held: str, seconds: float = 1.0) -> Script:
    """Return a script that holds the named records, and all behind them, the first time it sees them."""
    left = set(held)

    def script(records: Sequence[Record]) -> StepOutcome | None:
        for i, record in enumerate(records):
            if _text(record) in left:
                left.discard(_text(record))
                behind = tuple(r for r in records[i:] if r.partition == record.partition)
                return StepOutcome(len(records) - len(behind), behind, seconds)
        return None

    return script


def _raise_once(*errors: Exception) -> Script:
    left = list(errors)

    def script(records: Sequence[Record]) -> StepOutcome | None:
        if records and left:
            raise left.pop(0)
        return None

    return script


def test_records_are_stepped_once_and_in_order(world: World) -> None:
    world.send(*"123")
    world.turn(2)
    world.send(*"45")
    world.turn(2)
    assert world.worker.stored == list("12345")


def test_an_empty_poll_is_stepped_too(world: World) -> None:
    before = len(world.worker.seen)
    world.turn()
    assert world.worker.seen[before:] == [()]


def test_held_records_come_again_before_what_was_polled_meanwhile(world: World) -> None:
    world.worker.script = _hold_once("2")
    world.send(*"123")
    world.turn()
    assert world.worker.stored == ["1"]
    world.send(*"45")
    world.turn(3)
    assert world.worker.stored == ["1"]
    world.clock.advance(1.0)
    world.turn(2)
    assert world.worker.stored == list("12345")


def test_other_partitions_go_on_while_one_is_held(world: World) -> None:
    one, other = _two_keys(world)
    world.worker.script = _hold_once("x", seconds=5)
    world.send("x", key=one)
    world.turn()
    world.send("y", key=other)
    world.send("z", key=one)
    world.turn(2)
    assert world.worker.stored == ["y"]
    world.clock.advance(5)
    world.turn(2)
    assert world.worker.stored == ["y", "x", "z"]


def test_a_held_partition_is_not_fetched_from(world: World) -> None:
    world.worker.script = _hold_once("1", seconds=5)
    world.send("1")
    world.turn()
    world.send(*"23")
    world.turn(3)
    assert world.worker.consumer.poll(0, 10) == []


def test_backpressure_holds_the_whole_poll(world: World) -> None:
    world.worker.script = _raise_once(Backpressure(2.0))
    world.send(*"12")
    world.turn(2)
    assert world.worker.stored == []
    world.clock.advance(2.0)
    world.turn()
    assert world.worker.stored == ["1", "2"]
    assert world.worker.recovered == []


def test_held_records_of_a_lost_partition_are_dropped() -> None:
    world = World()
    world.turn(3)
    one, other = _two_keys(world)
    world.worker.script = _hold_once("x", "y", seconds=0.5)
    world.send("x", key=one)
    world.turn()
    world.send("y", key=other)
    world.turn()
    rival = Scripted(world.broker)
    rival.next = world.worker.next  # one durable store
    rival.open()
    rival.consumer.poll(0, 1)
    world.turn(2)
    rival.consumer.poll(0, 1)
    world.turn(2)
    kept = world.worker.consumer.assignment()
    assert len(kept) == 1
    world.clock.advance(0.5)
    world.turn(3)
    kept_text = (
        "x"
        if world.broker.producer(client_id="t").send([OutRecord(TOPIC, one.encode(), b"")])[0].partition in kept
        else "y"
    )
    world.turn()
    assert [text for text in world.worker.stored if text] == [kept_text]


def test_a_rebalance_rereads_what_was_held(world: World) -> None:
    world.worker.script = _hold_once("1", seconds=30)
    world.send(*"12")
    world.turn()
    consumer = world.worker.consumer
    world.broker.expire(consumer)  # type: ignore[arg-type]
    world.turn(4)
    assert world.worker.stored == ["1", "2"]
    assert len(world.worker.recovered) == 1


@pytest.mark.parametrize("error", [TransientError("away"), OffsetConflict("moved"), ProducerFenced("fenced")])
def test_a_transient_error_in_a_step_is_recovered_from(world: World, error: Exception) -> None:
    world.worker.script = _raise_once(error)
    world.send(*"123")
    world.turn(1)
    assert world.loop.state is LoopState.RECOVERING
    world.turn(2)
    assert world.worker.stored == ["1", "2", "3"]
    assert world.worker.recovered == [error]
    assert world.value("oppu_worker_retries_total", kind=type(error).__name__) == 1


def test_an_effect_that_fails_midway_loses_and_repeats_nothing(world: World) -> None:
    failures = iter([False, True, False])

    def fault(operation: str) -> None:
        if operation == "consumer.poll" and next(failures, False):
            raise TransientError("poll failed")

    world.broker.on_call(fault)
    world.send(*"12")
    world.turn()
    world.send(*"34")
    world.turn(4)
    assert world.worker.stored == list("1234")


def test_retries_back_off_up_to_the_cap_and_go_on_for_ever(world: World) -> None:
    world.worker.script = _raise_once(TransientError("step"))
    world.worker.recovery_error = TransientError("still away")
    world.send("1")
    world.turn()
    times = []
    for _ in range(3000):
        before = len(world.worker.recovered)
        world.turn(seconds=0.01)
        if len(world.worker.recovered) > before:
            times.append(world.clock.monotonic())
    gaps = [round(later - earlier, 2) for earlier, later in zip(times, times[1:], strict=False)]
    assert gaps[:6] == [pytest.approx(g, abs=0.03) for g in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)]
    assert gaps[6:] == [pytest.approx(4.0, abs=0.03)] * len(gaps[6:])
    assert len(gaps) > 8
    world.worker.recovery_error = None
    world.turn(500, seconds=0.01)
    assert world.worker.stored == ["1"]


def test_the_first_error_says_what_to_rebuild_until_recovery_succeeds(world: World) -> None:
    fenced = ProducerFenced("newer")
    world.worker.script = _raise_once(fenced)
    world.worker.recovery_error = TransientError("away")
    world.send("1")
    world.turn(50, seconds=0.1)
    assert len(world.worker.recovered) > 2
    assert set(world.worker.recovered) == {fenced}


def test_a_step_that_keeps_failing_is_not_hammered(world: World) -> None:
    def script(records: Sequence[Record]) -> StepOutcome | None:
        if records:
            raise TransientError("disk full")
        return None

    world.worker.script = script
    world.send("1")
    world.turn(1000, seconds=0.01)
    tries = sum(1 for seen in world.worker.seen if seen == ("1",))
    assert 4 <= tries <= 9
    assert not world.health.is_ready()


def test_it_stays_in_the_group_while_it_backs_off(world: World) -> None:
    world.worker.script = _raise_once(TransientError("step"))
    world.worker.recovery_error = TransientError("store away")
    world.send("1")
    world.turn(400, seconds=1.0)  # longer than session and poll timeouts
    generation = world.worker.consumer.group_metadata().generation
    world.worker.recovery_error = None
    world.turn(10, seconds=1.0)
    assert world.worker.stored == ["1"]
    assert world.worker.consumer.group_metadata().generation == generation


def test_readiness_follows_group_and_errors() -> None:
    world = World()
    assert world.health.reasons() == {"loop": "starting"}
    world.turn(3)
    assert world.health.is_ready()
    assert world.value("oppu_worker_ready") == 1
    world.worker.script = _raise_once(OffsetConflict("moved"))
    world.send("1")
    world.turn()
    assert world.health.reasons() == {"loop": "retrying after OffsetConflict"}
    assert world.value("oppu_worker_ready") == 0
    world.turn(3)
    assert world.health.is_ready()


def test_readiness_returns_without_records_after_a_while(world: World) -> None:
    world.broker.unavailable = True
    world.turn(5, seconds=0.1)
    assert not world.health.is_ready()
    world.broker.unavailable = False
    world.turn(40, seconds=0.1)
    assert world.health.is_ready()


def test_a_broker_that_is_down_at_the_start_is_waited_for() -> None:
    world = World()
    world.broker.unavailable = True
    world.turn(20, seconds=0.1)
    assert world.loop.state is LoopState.NEW
    assert world.health.is_live()
    world.broker.unavailable = False
    world.turn(60, seconds=0.1)
    world.send("1")
    world.turn(2)
    assert world.worker.stored == ["1"]


def test_a_broker_outage_in_mid_run_loses_nothing(world: World) -> None:
    world.send("1")
    world.turn()
    world.broker.unavailable = True
    world.turn(30, seconds=0.1)
    assert world.health.is_live()
    world.broker.unavailable = False
    world.send("2")
    world.turn(60, seconds=0.1)
    assert world.worker.stored == ["1", "2"]


def test_a_fatal_error_leaves_and_closes_without_a_write(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.worker.script = _raise_once(DeadLetterLimitReached("all bad"))
    world.send("1")
    with caplog.at_level(logging.ERROR), pytest.raises(DeadLetterLimitReached):
        world.loop.run()
    assert world.worker.stored == []
    assert world.worker.closed == 1
    assert world.loop.state is LoopState.CLOSED
    assert "scripted stops: all bad" in caplog.text
    assert not world.health.is_ready()


def test_an_unexpected_error_is_logged_with_its_trace_and_raised_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.worker.script = _raise_once(ZeroDivisionError("a bug"))
    world.send("1")
    with pytest.raises(ZeroDivisionError):
        world.loop.run()
    assert "Traceback" in caplog.text
    assert world.worker.closed == 1


def test_stop_finishes_the_running_step_and_polls_no_more(world: World) -> None:
    def script(records: Sequence[Record]) -> StepOutcome | None:
        if records:
            world.loop.stop()
            world.send("2")
        return None

    world.worker.script = script
    world.send("1")
    world.loop.run()
    assert world.worker.stored == ["1"]
    assert world.worker.closed == 1
    world.loop.close()
    assert world.worker.closed == 1
    with pytest.raises(IllegalTransition):
        world.loop.turn()


def test_closing_tolerates_a_broker_that_is_away(world: World) -> None:
    def refuse() -> None:
        raise TransientError("gone")

    world.worker.close = refuse  # type: ignore[method-assign]
    world.loop.stop()
    world.loop.run()
    assert world.loop.state is LoopState.CLOSED


def test_stop_before_the_start_opens_nothing() -> None:
    world = World()
    world.loop.stop()
    world.loop.run()
    assert (world.worker.opened, world.worker.closed) == (0, 0)


def test_lag_is_shown_for_own_partitions_and_removed_with_them() -> None:
    world = World(partitions=1, max_poll_records=2)
    world.turn(3)
    world.send(*"12345")
    world.clock.advance(6)
    world.turn()
    assert world.value("oppu_worker_lag_records", topic=TOPIC, partition="0") == 3
    world.turn(3)
    world.clock.advance(6)
    world.turn()
    assert world.value("oppu_worker_lag_records", topic=TOPIC, partition="0") == 0
    world.loop.close()
    assert world.value("oppu_worker_lag_records", topic=TOPIC, partition="0") is None


def test_lag_is_removed_on_revoke(world: World) -> None:
    world.send("1")
    world.turn()
    world.clock.advance(6)
    world.turn()
    rival = Scripted(world.broker)
    rival.next = world.worker.next
    rival.open()
    for _ in range(3):
        rival.consumer.poll(0, 1)
        world.turn()
    world.clock.advance(6)
    world.turn()
    shown = [i for i in "01" if world.value("oppu_worker_lag_records", topic=TOPIC, partition=i) is not None]
    assert [Partition(TOPIC, int(i)) for i in shown] == sorted(world.worker.consumer.assignment())
    assert len(shown) == 1


class _Deaf:
    """A consumer that fetches nothing any more, as the client library once did after a rebalance."""

    def __init__(self, inner: Consumer) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def poll(self, timeout_seconds: float, max_records: int) -> list[Record]:
        self._inner.pause(self._inner.assignment())
        return self._inner.poll(timeout_seconds, max_records)


def test_a_stuck_consumer_is_rebuilt() -> None:
    world = World(stuck_after_seconds=60.0)
    world.turn(3)
    world.worker._consumer = _Deaf(world.worker.consumer)  # type: ignore[assignment]
    world.turn(20, seconds=6)
    assert world.worker.opened == 1, "nothing waits, so nothing is stuck"
    world.send(*"123")
    world.turn(9, seconds=6)
    assert world.worker.opened == 1
    world.turn(8, seconds=6)
    assert (world.worker.opened, world.worker.closed) == (2, 1)
    assert world.value("oppu_worker_client_rebuilds_total") == 1
    assert world.worker.stored == ["1", "2", "3"]


def test_a_trailing_transaction_marker_is_not_taken_for_a_stuck_consumer() -> None:
    world = World(partitions=1, stuck_after_seconds=30.0)
    producer = world.broker.transactional_producer("t")
    producer.begin()
    producer.send([OutRecord(TOPIC, b"a", b"1")])
    producer.commit()
    world.turn(100, seconds=6)
    assert world.worker.stored == ["1"]
    assert world.worker.opened == 1


def test_held_records_are_not_taken_for_a_stuck_consumer() -> None:
    world = World(partitions=1, stuck_after_seconds=30.0)
    world.turn(3)
    world.worker.script = _hold_once("1", seconds=200)
    world.send(*"123")
    world.turn(30, seconds=6)
    assert world.worker.opened == 1
    world.turn(10, seconds=6)
    assert world.worker.stored == ["1", "2", "3"]


def test_a_record_that_kills_the_process_is_set_aside_and_the_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    world = World(partitions=1)
    world.send(*"12!45")
    lives = 0

    class Killed(BaseException):
        """Ends the process: nothing that the loop could catch."""

    def script(records: Sequence[Record]) -> StepOutcome | None:
        if "!" in map(_text, records):
            raise Killed
        return None

    world.worker.script = script
    while world.worker.stored[-1:] != ["5"]:
        lives += 1
        assert lives < 10
        world.guard = CrashGuard(path)
        world.loop = world.new_loop()
        try:
            world.turn(6, seconds=11)
        except Killed:
            world.broker.expire(world.worker.consumer)  # type: ignore[arg-type]
    assert world.worker.poisoned == ["!"]
    assert world.worker.stored == ["1", "2", "4", "5"]
    assert lives == 5, "two deaths as a batch, two alone, then it is set aside"


def test_an_operators_kills_set_nothing_aside(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    world = World(partitions=1)
    world.send(*"12345")

    class Killed(BaseException):
        """kill -9."""

    kills = [True] * 3

    def script(records: Sequence[Record]) -> StepOutcome | None:
        if records and kills and kills.pop():
            raise Killed
        return None

    world.worker.script = script
    for _ in range(4):
        world.guard = CrashGuard(path)
        world.loop = world.new_loop()
        try:
            world.turn(6, seconds=11)
        except Killed:
            world.broker.expire(world.worker.consumer)  # type: ignore[arg-type]
    assert world.worker.poisoned == []
    assert world.worker.stored == list("12345")
    assert world.worker.seen.count(("1",)) == 2, "one at a time after the second kill"


def test_a_transient_error_is_no_death(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    world = World(guard=CrashGuard(path), partitions=1)
    world.worker.script = _raise_once(*[TransientError("away")] * 3)
    world.send(*"123")
    world.turn(100, seconds=0.1)
    assert world.worker.stored == list("123")
    assert world.worker.seen.count(("1", "2", "3")) == 4


@pytest.fixture(autouse=True)
def _no_error_logs_unless_expected() -> Iterator[None]:
    logging.getLogger("oppu.loop").setLevel(logging.NOTSET)
    yield


def test_a_fatal_error_is_no_death(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    for _ in range(5):
        world = World(guard=CrashGuard(path), partitions=1)
        world.worker.script = _raise_once(FatalError("stop"))
        world.send(*"12")
        with pytest.raises(FatalError):
            world.turn(5)
        assert world.worker.seen[-1] == ("1", "2")
