"""Random schedules of two workers, faults, expulsions and restarts: still one answer a request."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from oppu.errors import ProducerFenced, TransientError
from oppu.kafka.memory import MemoryConsumer
from oppu.settings import Settings

if TYPE_CHECKING:
    from tests.inference.conftest import Drive, World

EFFECTS = ("producer.begin", "producer.send", "producer.send_offsets", "producer.commit")
Failing = Callable[[str, Exception, bool], "Drive"]


class _Schedule:
    """One random run over a world."""

    def __init__(self, world: World, failing: Failing, seed: int) -> None:
        self.random = random.Random(seed)
        self.failing = failing
        self.workers = [world, world.another("1")]
        self.world = world
        self.asked: list[str] = []
        self.bad = 0

    def run(self, steps: int) -> None:
        actions = [self.ask, self.ask, self.turn, self.turn, self.turn, self.fail, self.expel, self.restart, self.wait]
        for _ in range(steps):
            self.random.choice(actions)()
        for _ in range(60):
            self.world.clock.advance(0.3)
            self.turn()

    def ask(self) -> None:
        if self.random.random() < 0.2:
            self.world.send(b"not json", f"k{self.random.randrange(9)}".encode())
            self.bad += 1
            return
        fields = {"after": {"partition": 0, "offset": self.random.randrange(3)}} if self.random.random() < 0.3 else {}
        self.asked.append(f"r{len(self.asked)}")
        self.world.ask(f"user{self.random.randrange(9)}", self.asked[-1], **fields)

    def turn(self) -> None:
        worker = self.random.choice(self.workers)
        self._try(worker, worker.turn)

    def fail(self) -> None:
        worker = self.random.choice(self.workers)
        error = self.random.choice([TransientError("away"), ProducerFenced("fenced")])
        drive = self.failing(self.random.choice(EFFECTS), error, self.random.random() < 0.5)
        self._try(worker, lambda: worker.turn(drive))

    def expel(self) -> None:
        consumer = self.random.choice(self.workers).worker.consumer
        assert isinstance(consumer, MemoryConsumer)
        self.world.broker.expire(consumer)

    def restart(self) -> None:
        """Kill a worker, perhaps within its transaction, and start its successor under the same slot."""
        index = self.random.randrange(2)
        worker = self.workers[index]
        self._try(worker, lambda: self._abandon(worker))
        consumer = worker.worker.consumer
        assert isinstance(consumer, MemoryConsumer)
        consumer.crash()
        self.workers[index] = self.world.another(str(index))

    def wait(self) -> None:
        self.world.clock.advance(self.random.choice([0.01, 0.1, 1.0, 6.0]))

    def _abandon(self, worker: World) -> None:
        steps = worker.worker.step(worker.offer(), worker.clock.now())
        for _ in range(self.random.randrange(5)):
            try:
                next(steps).run()
            except StopIteration:
                return

    @staticmethod
    def _try(worker: World, act: Callable[[], object]) -> None:
        """Go on where even the recovery meets an error: the next turn recovers again."""
        try:
            act()
        except TransientError:
            worker.held = []


@pytest.mark.parametrize("seed", range(25))
def test_each_request_gets_one_answer_and_each_wreck_one_dead_letter(
    settings: Settings, make_world: Callable[..., World], failing: Failing, seed: int
) -> None:
    world = make_world(settings)
    schedule = _Schedule(world, failing, seed)
    schedule.run(120)
    assert sorted(p.request_id for p in world.predictions()) == sorted(schedule.asked)
    assert len(world.dead_letters()) == schedule.bad
    for worker in schedule.workers:
        worker.worker.close()
