"""The loop watches: lag, a stuck consumer, and records that kill the process."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from oppu.crash_guard import CrashGuard
from oppu.errors import (
    FatalError,
    ModelLost,
    TransientError,
)
from oppu.kafka.port import Consumer
from oppu.loop import LoopState
from oppu.values import OutRecord, Partition, Record
from oppu.worker import StepOutcome
from tests.oppu.loop_world import TOPIC, Scripted, World, hold_once, raise_once, text


@pytest.fixture
def world() -> World:
    """A world whose worker has joined its group."""
    world = World()
    world.turn(3)
    return world


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


def test_a_lag_that_cannot_be_measured_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.turn(3)

    def gone(partitions: object) -> dict[Partition, int]:
        raise TransientError("no leader")

    with monkeypatch.context() as patched:
        patched.setattr(world.worker.consumer, "peek_end_offsets", gone)
        world.send(*"12")
        world.turn(3, seconds=6)
    assert (world.loop.state, world.worker.stored) == (LoopState.RUNNING, ["1", "2"])
    assert world.worker.recovered == []


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
    world.worker.script = hold_once("1", seconds=200)
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
        if "!" in map(text, records):
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
    world.worker.script = raise_once(*[TransientError("away")] * 3)
    world.send(*"123")
    world.turn(100, seconds=0.1)
    assert world.worker.stored == list("123")
    assert world.worker.seen.count(("1", "2", "3")) == 4


def test_a_lost_model_is_a_death(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    for _ in range(2):
        world = World(guard=CrashGuard(path), partitions=1)
        world.worker.script = raise_once(ModelLost("the device is lost"))
        world.send(*"12")
        with pytest.raises(ModelLost):
            world.turn(5)
        assert world.worker.seen[-1] == ("1", "2")
    world = World(guard=CrashGuard(path), partitions=1)
    world.send(*"12")
    world.turn(5)
    assert ("1",) in world.worker.seen and ("2",) in world.worker.seen, "one at a time"


def test_a_fatal_error_is_no_death(tmp_path: Path) -> None:
    path = tmp_path / "guard.json"
    for _ in range(5):
        world = World(guard=CrashGuard(path), partitions=1)
        world.worker.script = raise_once(FatalError("stop"))
        world.send(*"12")
        with pytest.raises(FatalError):
            world.turn(5)
        assert world.worker.seen[-1] == ("1", "2")
