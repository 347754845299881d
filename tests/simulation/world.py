"""The whole service in one thread under a seed: every stage real, network, clock, model and embedder deterministic.

Processes take turns at random. The driver may crash one before or after any effect, let an effect fail, lose its
acknowledgement, or put the process to sleep in the middle of a step while the others go on (a zombie, later).
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import select
from sqlalchemy.event import listen

from inference.worker import InferenceWorker
from ingest.step import IngestWorker
from oppu.clock import ManualClock
from oppu.crash_guard import NullGuard
from oppu.effects import Effect, Steps
from oppu.embedder import HashEmbedder
from oppu.errors import OffsetConflict, TransientError
from oppu.fusion import DEFAULT
from oppu.health import Health
from oppu.kafka.memory import MemoryBroker
from oppu.kafka.memory_cluster import Timeouts
from oppu.kafka.topics import topic_specs
from oppu.lm.fake import FakeModel
from oppu.loop import Loop
from oppu.metrics import fresh
from oppu.privacy import UserHash
from oppu.registry import AdapterRegistry
from oppu.settings import Settings
from oppu.store.schema import answers
from oppu.store.sql import migrate, open_store
from oppu.tasks import Task, Tasks
from oppu.values import BaseId, OutRecord, Partition
from oppu.wire import Topics
from tests.simulation.spies import SpyModel, SpyRetriever, SpyStore
from updater.earning import Judge
from updater.worker import Updater

T = TypeVar("T")
KEY = "simulation"
POLL_SECONDS = 15.0
"""A sleeper is out of its group within half of its sleeps."""
TASKS = Tasks({"pick": Task("pick", "choice", "{input}", "pick:")})


class Crash(BaseException):
    """The process is gone, between two effects."""


@dataclass(frozen=True, slots=True)
class Odds:
    """How often an effect meets each fault."""

    crash: float = 0.02
    fail: float = 0.02
    lose: float = 0.02
    sleep: float = 0.02
    read: float = 0.002
    """A read from the store or a call to the broker that fails, outside all effects."""


class World:
    """Broker, store, registry and processes of one run."""

    def __init__(self, folder: Path, seed: int, odds: Odds) -> None:
        self.chance = random.Random(seed)
        self.odds: Odds | None = odds
        self.trace: list[str] = []
        self.clock = ManualClock()
        self.settings = Settings.load(
            store={"url": f"sqlite:///{folder / f'sim-{seed}.db'}"},
            kafka={"partitions": 3, "replication": 1, "min_insync_replicas": 1, "max_poll_records": 8},
            updater={"min_pending": 3, "users_per_tick": 2, "replay": 4, "claim_seconds": 20, "retry_seconds": 1},
            inference={"default_deadline_seconds": 0, "history_wait_seconds": 2},
        )
        self.topics = Topics(self.settings.kafka.topic_prefix)
        self.broker = MemoryBroker(self.clock, Timeouts(poll=POLL_SECONDS))
        self.broker.admin().create_topics(topic_specs(self.settings))
        migrate(self.settings.store)
        inner = open_store(self.settings.store, deployment_key=KEY, clock=self.clock)
        inner.database.engine.dispose()
        # a simulated crash loses no page of the operating system's, so nothing needs to reach the disk
        listen(inner.database.engine, "connect", lambda raw, _: raw.execute("pragma synchronous = off"))
        self.store = SpyStore(inner)
        self._root = f"memory://sim-{folder.name}-{seed}"
        self._depth = 0
        self.running = False
        self.store.fault = self._read_fault
        self.broker.on_call(self._read_fault)
        self.processes: list[Process] = [
            *(Process(self, f"ingest-{n}", self._ingest) for n in range(2)),
            *(Process(self, f"inference-{n}", self._inference) for n in range(2)),
            *(UpdaterProcess(self, f"updater-{n}") for n in range(2)),
        ]

    # --- driving
    def step(self) -> None:
        """Let one process take a turn."""
        self.clock.advance(self.chance.choice((0.01, 0.05, 0.3)))
        if self.odds is not None and self.chance.random() < 0.005:
            self.clock.jump(self.chance.choice((-3600.0, 3600.0)))
        self.chance.choice(self.processes).turn()

    def drive(self, process: "Process", steps: Steps[T]) -> T:
        """Perform a step's effects, with faults between and around them."""
        try:
            effect = next(steps)
            while True:
                try:
                    result = self._perform(process, effect)
                except Exception as error:
                    self._note(process, effect, type(error).__name__)
                    effect = steps.throw(error)
                else:
                    self._note(process, effect, "ok")
                    effect = steps.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def _perform(self, process: "Process", effect: Effect) -> Any:
        odds = self.odds
        if odds is None:
            return effect.run()
        luck = self.chance.random()
        if luck < odds.crash:
            self._note(process, effect, "crash before")
            raise Crash
        if luck < odds.crash + odds.fail:
            raise TransientError("injected: it did not happen")
        if luck < odds.crash + odds.fail + odds.sleep and self._depth == 0:
            self._note(process, effect, "sleeps")
            self._elsewhere(process)
        result = effect.run()
        luck = self.chance.random()
        if luck < odds.crash:
            self._note(process, effect, "crash after")
            raise Crash
        if luck < odds.crash + odds.lose:
            raise TransientError("injected: it happened, the acknowledgement was lost")
        return result

    def _elsewhere(self, sleeper: "Process") -> None:
        """Let the others go on for so long that sessions, transactions and claims of the sleeper are over."""
        self._depth += 1
        others = [process for process in self.processes if process is not sleeper]
        for _ in range(self.chance.randint(5, 25)):
            self.clock.advance(self.chance.choice((0.1, 1.0, 5.0)))
            self.chance.choice(others).turn()
        self._depth -= 1

    def _read_fault(self, verb: str) -> None:
        if self.odds is not None and self.running and self.chance.random() < self.odds.read:
            self.trace.append(f"{verb} fails")
            raise TransientError(f"injected: {verb}")

    def _note(self, process: "Process", effect: Effect, outcome: str) -> None:
        self.trace.append(f"{process.name} {effect.name} {effect.detail} {outcome}")

    def trace_hash(self) -> str:
        """Return a hash of all that happened."""
        return hashlib.sha256("\n".join(self.trace).encode()).hexdigest()

    def close(self) -> None:
        """Release the store."""
        self.store.close()

    # --- building
    def registry(self, *, writes: bool = False) -> AdapterRegistry:
        """Open the registry anew, as another process would."""
        config = FakeModel().adapter_config() if writes else None
        return AdapterRegistry(
            self._root, base=FakeModel().base, user_hash=UserHash(KEY), adapter_config=config, clock=self.clock
        )

    def _ingest(self, name: str) -> IngestWorker:
        return IngestWorker(
            self.broker, self.store, HashEmbedder(), TASKS, self.settings, fresh(), clock=self.clock, cluster_id="sim"
        )

    def _inference(self, name: str) -> InferenceWorker:
        slot = self.settings.inference.model_copy(update={"slot": name})
        metrics = fresh()
        return InferenceWorker(
            self.broker,
            self.store,
            SpyRetriever(self.store, HashEmbedder(), self.settings.retriever, metrics),
            SpyModel(self.store, self.registry),
            self.registry(),
            TASKS,
            self.settings.model_copy(update={"inference": slot}),
            metrics,
            clock=self.clock,
            cluster_id="sim",
        )

    @property
    def registry_base(self) -> BaseId:
        """The base that everybody uses."""
        return FakeModel().base

    def ingest_offsets(self) -> dict[Partition, int]:
        """Return where ingest stands."""
        stored = self.store.offsets("sim", [self.topics.events, self.topics.predictions])
        return {partition: offset.next_offset for partition, offset in stored.items()}

    def kept_answers(self) -> list[str]:
        """Return the request ids of the answers that the store keeps."""
        with self.store.database.read() as connection:
            return list(connection.execute(select(answers.c.request_id)).scalars())

    def produce(self, records: Sequence[OutRecord]) -> list[tuple[Partition, int]]:
        """Produce as an application does, outside all faults."""
        producer = self.broker.producer(client_id="app")
        sent = producer.send(records)
        producer.close()
        return [(produced.partition, produced.offset) for produced in sent]


class Process:
    """A worker under its loop, which can die and come back with nothing but what is durable."""

    def __init__(self, world: World, name: str, build: Callable[[str], Any]) -> None:
        self.world, self.name, self._build = world, name, build
        self._busy = False
        self.loop: Loop | None = None
        self.worker: Any = None

    def turn(self) -> None:
        """Take one turn of the loop; a crash leaves nothing of it."""
        if self._busy:
            return
        self._busy, outer, self.world.running = True, self.world.running, True
        try:
            self._turn()
        except Crash:
            self.die()
        finally:
            self._busy, self.world.running = False, outer

    def _turn(self) -> None:
        if self.loop is None:
            self.worker = self._build(self.name)
            self.loop = Loop(
                self.worker,
                settings=self.world.settings,
                clock=self.world.clock,
                metrics=fresh(),
                health=Health(self.world.clock, live_within_seconds=60),
                guard=NullGuard(),
                jitter=self.world.chance.random,
                drive=lambda steps: self.world.drive(self, steps),
            )
        self.loop.turn()

    def die(self) -> None:
        """Lose every client without a word to the broker."""
        for client in _clients(self.worker):
            client.crash()
        self.loop = self.worker = None


class UpdaterProcess(Process):
    """An updater, whose scheduler's tick is a call."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name, self._updater)
        self._lives = 0

    def _updater(self, name: str) -> Updater:
        self._lives += 1
        return Updater(
            self.world.store,
            self.world.registry(writes=True),
            FakeModel(),
            TASKS,
            self.world.settings.updater,
            topics=self.world.topics,
            holder=f"{name}-{self._lives}",
            metrics=fresh(),
            user_hash=UserHash(KEY),
            clock=self.world.clock,
            judge=Judge(
                SpyRetriever(self.world.store, HashEmbedder(), self.world.settings.retriever, fresh()), DEFAULT, 8
            ),
        )

    def _turn(self) -> None:
        with suppress(TransientError, OffsetConflict):
            if self.worker is None:
                worker = self._updater(self.name)
                self.world.drive(self, worker.open())
                self.worker = worker
            self.world.drive(self, self.worker.tick(self.world.clock.now()))

    def die(self) -> None:
        """Forget everything."""
        self.worker = None


def _clients(worker: Any) -> Iterator[Any]:
    for owner in (worker, getattr(worker, "_relay", None)):
        for name in ("_consumer", "_producer"):
            client = getattr(owner, name, None)
            if client is not None and hasattr(client, "crash"):
                yield client
