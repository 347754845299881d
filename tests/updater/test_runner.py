"""The shell: the scheduler looks, ticks run until nothing is due, errors back off, a stop drains."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from oppu.clock import SystemClock
from oppu.errors import FatalError, TransientError
from oppu.health import Health
from oppu.values import OutRecord, UserId
from tests.updater.world import SETTINGS, World
from updater.runner import LONGEST_BACKOFF_SECONDS, UpdaterRunner

GLAD = ["glad"] * 10
PATIENCE_SECONDS = 20.0


@pytest.fixture
def health(world: World) -> Health:
    return Health(world.clock, live_within_seconds=60)


@pytest.fixture
def runner(world: World, health: Health) -> UpdaterRunner:
    """Not scheduled: its clock is moved by hand."""
    return UpdaterRunner(world.updater, SETTINGS, clock=world.clock, metrics=world.metrics, health=health)


@contextmanager
def running(runner: UpdaterRunner) -> Iterator[threading.Thread]:
    """Run it in a thread; an error it ends with is raised here."""
    errors: list[BaseException] = []

    def body() -> None:
        try:
            runner.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield thread
    finally:
        runner.stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def away(*_: object, **__: object) -> None:
    raise TransientError("store: away")


def test_ticks_until_nothing_is_due(world: World, runner: UpdaterRunner) -> None:
    for n in range(2 * SETTINGS.users_per_tick + 1):
        world.act(f"user{n}", GLAD)
    assert runner.catch_up() == 2 * SETTINGS.users_per_tick + 1
    assert world.due() == 0
    assert runner.catch_up() == 0


def test_gauges_show_the_stores_totals(world: World, runner: UpdaterRunner) -> None:
    world.act("ada", GLAD)
    runner.catch_up()
    world.act("ada", GLAD)
    runner.catch_up()
    assert world.count("oppu_updater_due_users") == 0
    assert world.count("oppu_updater_lift_events") == 10
    live, none = (world.count("oppu_updater_lift_loss_nats", arm=arm) for arm in ("live", "none"))
    assert 0 < live < none
    assert world.count("oppu_updater_lift_correct", arm="live") == 10
    store, base, now = world.store, world.model.base, world.clock.now()
    store.roll_back(base, UserId("ada"), to=None, reason="", now=now, announce=OutRecord("t", b"ada", None))
    world.clock.advance(10)
    runner.catch_up()
    assert world.count("oppu_updater_rolled_back_users") == 1


def test_transient_errors_back_off_and_are_not_ready(
    world: World, runner: UpdaterRunner, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.act("ada", GLAD)
    tries: list[float] = []

    def due(*_: object, **__: object) -> None:
        tries.append(world.clock.monotonic())
        raise TransientError("store: away")

    with monkeypatch.context() as patch:
        patch.setattr(type(world.store), "due", due)
        for _ in range(1000):
            assert runner.catch_up() == 0
            world.clock.advance(0.05)
    waits = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert waits[:4] == pytest.approx([0.2, 0.4, 0.8, 1.6], abs=0.06)
    assert waits[6:] == pytest.approx([LONGEST_BACKOFF_SECONDS] * len(waits[6:]), abs=0.06)
    assert len(waits) > 7
    assert not health.is_ready()
    assert world.count("oppu_worker_ready", worker="updater") == 0
    assert world.count("oppu_worker_retries_total", worker="updater", kind="TransientError") == len(tries)
    world.clock.advance(LONGEST_BACKOFF_SECONDS)
    assert runner.catch_up() == 1
    assert health.is_ready()
    assert world.count("oppu_worker_ready", worker="updater") == 1


def test_opening_is_retried_too(world: World, runner: UpdaterRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    world.act("ada", GLAD)
    with monkeypatch.context() as patch:
        patch.setattr(type(world.store), "register_base", away)
        assert runner.catch_up() == 0
    world.clock.advance(LONGEST_BACKOFF_SECONDS)
    assert runner.catch_up() == 1


def test_heartbeats_reach_the_liveness_check(world: World, runner: UpdaterRunner, health: Health) -> None:
    world.act("ada", GLAD)
    world.model.while_training = lambda: world.clock.advance(50)
    world.clock.advance(50)
    runner.catch_up()
    assert health.is_live()
    world.clock.advance(61)
    assert not health.is_live()


def test_the_schedule_finds_new_work_by_itself(world: World) -> None:
    settings = SETTINGS.model_copy(update={"interval_seconds": 0.05})
    health = Health(SystemClock(), live_within_seconds=60)
    runner = UpdaterRunner(world.updater, settings, clock=SystemClock(), metrics=world.metrics, health=health)
    with running(runner) as thread:
        wait_for(health.is_ready)
        for user in ("ada", "bob"):
            world.act(user, GLAD)
            wait_for(lambda user=user: world.head(user) is not None)  # type: ignore[misc]
        assert thread.is_alive()
    assert not health.is_ready()
    assert health.reasons() == {"updater": "stopped"}


def test_a_stop_while_training_gives_the_claims_back(world: World) -> None:
    world.act("ada", GLAD)
    health = Health(SystemClock(), live_within_seconds=60)
    runner = UpdaterRunner(world.updater, SETTINGS, clock=SystemClock(), metrics=world.metrics, health=health)
    world.model.while_training = runner.stop
    with running(runner) as thread:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
    assert world.head("ada") is None
    assert world.due() == 1


def test_a_stop_before_the_run_returns_at_once(runner: UpdaterRunner, world: World) -> None:
    world.act("ada", GLAD)
    runner.stop()
    runner.run()
    assert world.due() == 1


def test_a_fatal_error_leaves_the_run_and_stops_the_schedule(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.act("ada", GLAD)
    monkeypatch.setattr(world.model, "train", lambda jobs, config, heartbeat: [])
    health = Health(SystemClock(), live_within_seconds=60)
    runner = UpdaterRunner(world.updater, SETTINGS, clock=SystemClock(), metrics=world.metrics, health=health)
    threads = set(threading.enumerate())
    with pytest.raises(FatalError):
        runner.run()
    assert set(threading.enumerate()) <= threads
    assert not health.is_ready()
