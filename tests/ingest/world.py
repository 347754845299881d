"""One ingest worker in its loop, on the in-memory broker and a real SQLite store."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ingest.step import IngestWorker
from oppu.clock import ManualClock
from oppu.crash_guard import Guard, NullGuard
from oppu.dead_letters import DeadLetter, read_dead_letter
from oppu.embedder import HashEmbedder
from oppu.health import Health
from oppu.kafka.memory import MemoryBroker
from oppu.kafka.port import Produced, TopicSpec
from oppu.kafka.topics import topic_specs
from oppu.loop import Loop
from oppu.metrics import Metrics, fresh
from oppu.settings import KafkaSettings, LimitsSettings, ServiceSettings, Settings, StoreSettings
from oppu.store.sql import SqlStore, open_store
from oppu.tasks import Task, Tasks
from oppu.values import BaseId, Event, OutRecord, Partition, Record, UserId
from oppu.wire import Topics

TASKS = Tasks(
    {
        "news": Task("news", "choice", "article: {input}", "category:", labels=("politics", "sports")),
        "quote": Task("quote", "choice", "pick: {input}", "pick:"),
        "headline": Task("headline", "text", "article: {input}", "headline:"),
        "tweet": Task("tweet", "text", "text: {input}", "tweet:", bare_history=True),
    }
)
TOPICS = Topics("oppu.")
BASE = BaseId("base")


class World:
    """Broker, store, worker and loop; time stands still unless a test moves it."""

    def __init__(self, database: Path, *, guard: Guard | None = None, **sections: Any) -> None:
        self.clock = ManualClock()
        self.broker = MemoryBroker(self.clock)
        self.settings = Settings(
            kafka=sections.pop("kafka", KafkaSettings(partitions=2)),
            limits=sections.pop("limits", LimitsSettings(record_bytes=4096)),
            service=ServiceSettings(max_backoff_seconds=4),
            store=StoreSettings(url=f"sqlite:///{database}", busy_timeout_seconds=0.05),
            **sections,
        )
        self.broker.admin().create_topics([_single(spec) for spec in topic_specs(self.settings)])
        self.store: SqlStore = open_store(self.settings.store, deployment_key="key", clock=self.clock)
        self.metrics: Metrics = fresh()
        self.embedder = HashEmbedder()
        self.producer = self.broker.producer(client_id="application")
        self.health = Health(self.clock, live_within_seconds=60)
        self.guard: Guard = guard or NullGuard()
        self.worker = self.new_worker()
        self.loop = self.new_loop()
        self._letters = self.broker.consumer("letters", [TOPICS.dead_letters], _from_zero, client_id="letters")
        self._seen: list[DeadLetter] = []

    def new_worker(self) -> IngestWorker:
        return IngestWorker(
            self.broker, self.store, self.embedder, TASKS, self.settings, self.metrics, clock=self.clock
        )

    def new_loop(self, drive: Callable[..., Any] | None = None) -> Loop:
        extra: dict[str, Any] = {} if drive is None else {"drive": drive}
        return Loop(
            self.worker,
            settings=self.settings,
            clock=self.clock,
            metrics=self.metrics,
            health=self.health,
            guard=self.guard,
            jitter=lambda: 1.0,
            **extra,
        )

    def restart(self) -> None:
        """A new process, after the old one vanished."""
        self.broker.expire(self.worker.consumer)  # type: ignore[arg-type]
        self.worker = self.new_worker()
        self.loop = self.new_loop()

    def turn(self, times: int = 3, *, seconds: float = 0.0) -> None:
        for _ in range(times):
            self.loop.turn()
            self.clock.advance(seconds)

    def send(self, value: bytes | None, key: bytes | None = b"u1", topic: str = TOPICS.events) -> Produced:
        return self.producer.send([OutRecord(topic, key, value)])[0]

    def event(self, event_id: str, user_id: str = "u1", **changes: object) -> Produced:
        return self.send(event_bytes(event_id, user_id, **changes), user_id.encode())

    def stored(self, user_id: str = "u1") -> list[Event]:
        user = UserId(user_id)
        return self.store.events({user: 0}, embedder=self.embedder.fingerprint, limit=1000).get(user, [])

    def ids(self, user_id: str = "u1") -> list[str]:
        return [event.event_id for event in self.stored(user_id)]

    def letters(self) -> list[DeadLetter]:
        """Every dead letter on the topic so far."""
        for _ in range(4):
            self._seen += [read_dead_letter(record) for record in self._letters.poll(0, 10_000)]
        return list(self._seen)

    def next_offsets(self) -> dict[Partition, int]:
        stored = self.store.offsets("memory", [TOPICS.events, TOPICS.predictions])
        return {partition: row.next_offset for partition, row in stored.items()}

    def outcomes(self) -> dict[str, int]:
        samples = next(iter(self.metrics.ingest_records.collect())).samples
        return {s.labels["outcome"]: int(s.value) for s in samples if s.name.endswith("_total")}

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(name, labels)


def event_fields(event_id: str, user_id: str = "u1", **changes: object) -> dict[str, object]:
    return {
        "event_id": event_id,
        "user_id": user_id,
        "task": "news",
        "occurred_at": "2025-12-31T12:00:00Z",
        "input": f"article {event_id}",
        "output": "politics",
        **changes,
    }


def event_bytes(event_id: str, user_id: str = "u1", **changes: object) -> bytes:
    return json.dumps(event_fields(event_id, user_id, **changes)).encode()


def texts(records: Sequence[Record]) -> list[str]:
    return [(record.value or b"").decode() for record in records]


def _single(spec: TopicSpec) -> TopicSpec:
    return replace(spec, replication=1)


def _from_zero(assigned: frozenset[Partition], committed: object) -> dict[Partition, int]:
    return dict.fromkeys(assigned, 0)
