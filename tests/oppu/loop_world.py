"""A scripted worker on the in-memory broker, and the loop around it."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial

from oppu.clock import ManualClock
from oppu.crash_guard import Guard, NullGuard
from oppu.effects import Effect, Steps
from oppu.health import Health
from oppu.kafka.memory import MemoryBroker
from oppu.kafka.port import Consumer, Producer, TopicSpec
from oppu.loop import Loop
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
        self.seen.append(tuple(text(r) for r in records))
        outcome = self.script(records) or StepOutcome(len(records))
        held = set(map(text, outcome.held))
        yield Effect("store.write", lambda: self._write([r for r in records if text(r) not in held]))
        return outcome

    def poison(self, record: Record, now: datetime) -> Steps[StepOutcome]:
        self.poisoned.append(text(record))
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
            self.stored.append(text(record))


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
        produced = self._producer.send([OutRecord(TOPIC, key.encode(), one.encode()) for one in texts])
        return produced[0].partition

    def turn(self, times: int = 1, *, seconds: float = 0.0) -> None:
        for _ in range(times):
            self.loop.turn()
            self.clock.advance(seconds)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, {"worker": "scripted", **labels})


def text(record: Record) -> str:
    """Return a record's value as text."""
    return (record.value or b"").decode()


def two_keys(world: World) -> tuple[str, str]:
    """Return two keys that lie on different partitions."""
    names = {world.send("", key=name): name for name in "abcdefgh"}
    world.turn(2)
    world.worker.stored.clear()
    world.worker.seen.clear()
    first, second = names.values()
    return first, second


def hold_once(*held: str, seconds: float = 1.0) -> Script:
    """Return a script that holds the named records, and all behind them, the first time it sees them."""
    left = set(held)

    def script(records: Sequence[Record]) -> StepOutcome | None:
        for i, record in enumerate(records):
            if text(record) in left:
                left.discard(text(record))
                behind = tuple(r for r in records[i:] if r.partition == record.partition)
                return StepOutcome(len(records) - len(behind), behind, seconds)
        return None

    return script


def raise_once(*errors: Exception) -> Script:
    """Return a script that raises these, one a non-empty step, and then interferes no more."""
    left = list(errors)

    def script(records: Sequence[Record]) -> StepOutcome | None:
        if records and left:
            raise left.pop(0)
        return None

    return script
