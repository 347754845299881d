"""A model that computes nothing any more ends the process; the next one finds the record that did it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from inference.worker import InferenceWorker
from oppu.crash_guard import CrashGuard
from oppu.errors import ModelLost
from oppu.health import Health
from oppu.kafka.memory import CLUSTER_ID, MemoryConsumer
from oppu.lm.fake import FakeModel
from oppu.lm.port import Scored
from oppu.loop import Loop
from oppu.settings import Settings
from tests.inference.conftest import TASKS

if TYPE_CHECKING:
    from tests.inference.conftest import World

Make = Callable[..., "World"]
ASSERTED = "CUDA error: device-side assert triggered\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"


class Device(FakeModel):
    """Fails on rows that say ``bad``; after one that says ``kill`` nothing is computed any more."""

    def __init__(self, error: Exception | None = None, *, broken: bool = False) -> None:
        super().__init__()
        self.error = error or RuntimeError(ASSERTED)
        self.broken = broken
        self.asked: list[tuple[str, ...]] = []

    def answer(self, rows: Any) -> list[Scored]:
        self.asked.append(tuple(row.input for row in rows))
        self.broken |= any("kill" in row.input for row in rows)
        if self.broken:
            raise self.error
        if any("bad" in row.input for row in rows):
            raise ValueError("cannot")
        return super().answer(rows)


@pytest.fixture
def patient(settings: Settings) -> Settings:
    """Settings under which no request is late, however long restarts take."""
    inference = settings.inference.model_copy(update={"default_deadline_seconds": 0})
    return settings.model_copy(update={"inference": inference})


def _codes(world: World) -> dict[str, str]:
    return {p.request_id: p.error.code if p.error else "ok" for p in world.predictions()}


def _lives(world: World, guard: Path, model: Callable[[], FakeModel], requests: int) -> int:
    """Run processes one after the other until all is answered; return how many it took."""
    world.worker.close()
    for life in range(1, 40):
        worker = InferenceWorker(
            world.broker,
            world.store,
            world.retriever,
            model(),
            world.adapters,
            TASKS,
            world.settings,
            world.metrics,
            clock=world.clock,
            cluster_id=CLUSTER_ID,
        )
        health = Health(world.clock, live_within_seconds=60)
        loop = Loop(
            worker,
            settings=world.settings,
            clock=world.clock,
            metrics=world.metrics,
            health=health,
            guard=CrashGuard(guard),
        )
        try:
            while len(world.predictions()) < requests:
                loop.turn()
        except ModelLost:
            consumer = worker.consumer
            assert isinstance(consumer, MemoryConsumer)
            consumer.crash()
            world.clock.advance(11)
        else:
            loop.close()
            return life
    raise AssertionError("it does not come to an end")


@pytest.mark.parametrize(
    "error", [RuntimeError(ASSERTED), type("AcceleratorError", (RuntimeError,), {})("an illegal access")]
)
def test_nothing_is_answered_by_a_lost_device(settings: Settings, make_world: Make, error: Exception) -> None:
    model = Device(error, broken=True)
    world = make_world(settings, model=model)
    for number in range(3):
        world.ask("anna", f"r{number}")
    with pytest.raises(ModelLost, match="the device is lost") as raised:
        world.turn()
    assert raised.value.__cause__ is error
    assert world.predictions() == []
    assert world.broker.committed("oppu-inference") == {}
    assert len(model.asked) == 1, "it was asked again"


def test_the_record_that_loses_the_device_is_found_and_all_others_are_answered(
    patient: Settings, make_world: Make, tmp_path: Path
) -> None:
    world = make_world(patient)
    for number in range(6):
        world.ask(f"user{number % 3}", f"r{number}", input="kill" if number == 4 else "words")
    lives = _lives(world, tmp_path / "guard.json", Device, 6)
    assert _codes(world) == {f"r{number}": "worker_crashed" if number == 4 else "ok" for number in range(6)}
    assert len(world.predictions()) == 6
    assert lives == 5, "two deaths in the batch, two alone"


def test_a_model_that_fails_on_everything_answers_nothing(settings: Settings, make_world: Make) -> None:
    model = Device(ValueError("cannot"), broken=True)
    world = make_world(settings, model=model)
    world.ask("anna", "r1")
    world.ask("bert", "r2")
    with pytest.raises(ModelLost, match="all rows of 2 users"):
        world.turn()
    assert world.predictions() == []
    assert world.broker.committed("oppu-inference") == {}


def test_one_user_alone_cannot_end_the_worker(settings: Settings, make_world: Make) -> None:
    world = make_world(settings, model=Device(ValueError("cannot"), broken=True))
    world.ask("anna", "r1")
    world.ask("anna", "r2")
    world.turn()
    assert _codes(world) == {"r1": "internal_error", "r2": "internal_error"}


@pytest.mark.parametrize("task", ["label", "write"])
def test_bad_rows_of_many_users_cannot_either(settings: Settings, make_world: Make, task: str) -> None:
    world = make_world(settings, model=Device())
    for user in ("anna", "bert", "cleo"):
        world.ask(user, user, task=task, input="bad")
    world.turn()
    assert _codes(world) == dict.fromkeys(("anna", "bert", "cleo"), "internal_error")


def test_where_no_process_can_compute_everybody_is_told_in_the_end(
    patient: Settings, make_world: Make, tmp_path: Path
) -> None:
    world = make_world(patient)
    for number in range(12):
        world.ask(f"user{number % 5}", f"r{number:02}")
    lives = _lives(world, tmp_path / "guard.json", lambda: Device(ValueError("cannot"), broken=True), 12)
    assert _codes(world) == {f"r{number:02}": "internal_error" for number in range(12)}
    assert len(world.predictions()) == 12
    assert lives == 3, "two deaths, then one record at a time"
