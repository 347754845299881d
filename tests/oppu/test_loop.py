"""The loop: order, holding, errors and recovery, readiness, drain."""

import logging
from collections.abc import Sequence

import pytest

from oppu.errors import (
    Backpressure,
    DeadLetterLimitReached,
    IllegalTransition,
    OffsetConflict,
    ProducerFenced,
    TransientError,
)
from oppu.loop import FIRST_BACKOFF_SECONDS, SHORTEST_POLL_SECONDS, LoopState
from oppu.values import Record
from oppu.worker import StepOutcome
from tests.oppu.loop_world import Scripted, World, hold_once, raise_once, two_keys


@pytest.fixture
def world() -> World:
    """A world whose worker has joined its group."""
    world = World()
    world.turn(3)
    return world


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
    world.worker.script = hold_once("2")
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
    one, other = two_keys(world)
    world.worker.script = hold_once("x", seconds=5)
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
    world.worker.script = hold_once("1", seconds=5)
    world.send("1")
    world.turn()
    world.send(*"23")
    world.turn(3)
    assert world.worker.consumer.poll(0, 10) == []


def test_what_comes_behind_records_left_over_is_read_until_a_poll_is_full() -> None:
    """So a worker that takes a part sees what comes next; how much it is offered at once stays bounded."""
    most = 4
    world = World(max_poll_records=most)
    world.turn(3)
    world.worker.script = lambda records: StepOutcome(1, tuple(records[1:]))  # one at a time, at once
    world.send(*"abcdefghijkl")
    world.turn(12 + 3)
    assert world.worker.stored == list("abcdefghijkl")
    offered = [step for step in world.worker.seen if step]
    assert offered[:3] == [tuple("abcd"), tuple("bcdefgh"), tuple("cdefgh")]
    assert max(map(len, offered)) == 2 * most - 1


def test_no_partition_starves_behind_another_that_always_has_more(world: World) -> None:
    one, other = two_keys(world)
    world.worker.script = lambda records: StepOutcome(2, tuple(records[2:]))
    world.send(*"abcdef", key=one)
    world.send("x", key=other)
    for number in range(6):
        world.turn()
        world.send(f"{number}a", f"{number}b", key=one)
    assert "x" in world.worker.stored


def test_backpressure_holds_the_whole_poll(world: World) -> None:
    world.worker.script = raise_once(Backpressure(2.0))
    world.send(*"12")
    world.turn(2)
    assert world.worker.stored == []
    world.clock.advance(2.0)
    world.turn()
    assert world.worker.stored == ["1", "2"]
    assert world.worker.recovered == []


def test_held_records_of_a_lost_partition_are_dropped(world: World) -> None:
    one, other = two_keys(world)
    world.worker.script = hold_once("x", "y", seconds=0.5)
    homes = {world.send("x", key=one): "x", world.send("y", key=other): "y"}
    world.turn()
    rival = Scripted(world.broker)
    rival.next = world.worker.next  # one durable store
    rival.open()
    for _ in range(3):
        rival.consumer.poll(0, 1)
        world.turn()
    (kept,) = world.worker.consumer.assignment()
    world.clock.advance(0.5)
    world.turn(3)
    assert world.worker.stored == [homes[kept]]


def test_a_rebalance_rereads_what_was_held(world: World) -> None:
    world.worker.script = hold_once("1", seconds=30)
    world.send(*"12")
    world.turn()
    consumer = world.worker.consumer
    world.broker.expire(consumer)  # type: ignore[arg-type]
    world.turn(4)
    assert world.worker.stored == ["1", "2"]
    assert len(world.worker.recovered) == 1


@pytest.mark.parametrize("error", [TransientError("away"), OffsetConflict("moved"), ProducerFenced("fenced")])
def test_a_transient_error_in_a_step_is_recovered_from(world: World, error: Exception) -> None:
    world.worker.script = raise_once(error)
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
    world.worker.script = raise_once(TransientError("step"))
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
    world.worker.script = raise_once(fenced)
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
    world.worker.script = raise_once(TransientError("step"))
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
    world.worker.script = raise_once(OffsetConflict("moved"))
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
    world.worker.script = raise_once(DeadLetterLimitReached("all bad"))
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
    world.worker.script = raise_once(ZeroDivisionError("a bug"))
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


def _patience(world: World, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list to which every poll from now on adds the seconds that it may wait."""
    waits: list[float] = []
    consumer, poll = world.worker.consumer, world.worker.consumer.poll

    def noted(timeout_seconds: float, max_records: int) -> list[Record]:
        waits.append(timeout_seconds)
        return poll(timeout_seconds, max_records)

    monkeypatch.setattr(consumer, "poll", noted)
    return waits


def test_a_poll_waits_until_what_is_held_is_due(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = _patience(world, monkeypatch)
    longest = world.settings.kafka.poll_timeout_seconds
    world.worker.script = hold_once("2", seconds=longest + 0.1)
    world.send(*"123")
    world.turn()
    world.turn(2, seconds=longest)
    world.worker.script = hold_once("4", seconds=0.0)
    world.send("4")
    world.turn(3)
    short = SHORTEST_POLL_SECONDS  # once 2 and 3 are due, and once 4 is
    assert waits == [longest, longest, pytest.approx(0.1), short, longest, short]
    assert world.worker.stored == list("1234")


def test_a_poll_does_not_wait_while_a_worker_has_more_to_do(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = _patience(world, monkeypatch)
    left = [True, True, False]
    world.worker.script = lambda records: StepOutcome(len(records), more=left.pop(0))
    world.turn(3)
    longest = world.settings.kafka.poll_timeout_seconds
    assert waits == [longest, SHORTEST_POLL_SECONDS, SHORTEST_POLL_SECONDS]


def test_a_heartbeat_waits_until_the_next_attempt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.worker.script = raise_once(TransientError("store"))
    world.worker.recovery_error = TransientError("store")
    world.send("1")
    world.turn()
    waits = _patience(world, monkeypatch)
    world.turn(3)
    assert waits == [SHORTEST_POLL_SECONDS, FIRST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS]
