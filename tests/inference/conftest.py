"""A whole inference worker in one thread: in-memory broker, SQLite, the real retriever, a counting model."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.worker import InferenceWorker
from oppu.clock import ManualClock
from oppu.effects import Effect, Steps, perform
from oppu.embedder import Embedder, HashEmbedder
from oppu.errors import AdapterUnreadable, TransientError
from oppu.kafka.memory import CLUSTER_ID, MemoryBroker
from oppu.kafka.topics import topic_specs
from oppu.lm.fake import BUCKETS, TENSOR, FakeModel, _bucket
from oppu.lm.port import AdapterRef, Tensors
from oppu.metrics import Metrics, fresh
from oppu.parsing import parse_prediction
from oppu.settings import InferenceSettings, KafkaSettings, Settings, StoreSettings
from oppu.store.migrations import migrate
from oppu.store.records import Candidate, IngestBatch, NewEvent, OffsetAdvance
from oppu.store.sql import SqlStore, open_store
from oppu.tasks import Task, Tasks
from oppu.values import EventId, Headers, OutRecord, Partition, Record, UserId
from oppu.wire import Prediction, Topics
from oppu.worker import StepOutcome
from retriever.service import Retriever

Drive = Callable[[Steps[StepOutcome]], StepOutcome]

START = datetime(2026, 1, 1, tzinfo=UTC)
LABELS = ("art", "law", "sport", "war")
TASKS = Tasks(
    {
        "label": Task("label", "choice", "{input}", "is", labels=LABELS),
        "cite": Task("cite", "choice", "{input}", "is"),
        "rate": Task("rate", "rating", "{input}", "is", labels=("1", "2", "3", "4", "5")),
        "write": Task("write", "text", "{input}", "is", max_new_tokens=4),
    }
)


class Adapters:
    """An adapter source in memory. A version that is not in ``versions`` cannot be read."""

    def __init__(self) -> None:
        self.versions: dict[AdapterRef, Tensors] = {}
        self.loads: Counter[AdapterRef] = Counter()
        self.on_load: Callable[[AdapterRef], None] = lambda ref: None

    def load(self, ref: AdapterRef) -> Tensors:
        """Return a version's weights."""
        self.loads[ref] += 1
        self.on_load(ref)
        if ref not in self.versions:
            raise AdapterUnreadable("no such files")
        return self.versions[ref]


@dataclass
class World:
    """Everything one worker talks to, and short verbs for what tests do to it."""

    settings: Settings
    clock: ManualClock
    broker: MemoryBroker
    store: SqlStore
    model: FakeModel
    adapters: Adapters
    retriever: Retriever
    metrics: Metrics
    worker: InferenceWorker
    held: list[Record] = field(default_factory=list)
    events_written: int = 0
    fault: TransientError | None = None

    @property
    def topics(self) -> Topics:
        """Full topic names."""
        return Topics(self.settings.kafka.topic_prefix)

    def another(self, slot: str) -> "World":
        """Start one more worker on the same cluster and store, as a process of its own."""
        inference = self.settings.inference.model_copy(update={"slot": slot})
        settings = self.settings.model_copy(update={"inference": inference})
        worker = InferenceWorker(
            self.broker,
            self.store,
            self.retriever,
            FakeModel(),
            self.adapters,
            TASKS,
            settings,
            fresh(),
            clock=self.clock,
            cluster_id=CLUSTER_ID,
        )
        worker.open()
        return replace(self, settings=settings, worker=worker, held=[], fault=None)

    # --- what applications do
    def send(self, value: bytes | None, key: bytes | None, headers: Headers = ()) -> None:
        """Produce raw bytes as a request."""
        self.broker.producer(client_id="app").send([OutRecord(self.topics.requests, key, value, headers)])

    def ask(self, user: str, request_id: str, **fields: Any) -> None:
        """Produce a request."""
        request = {"request_id": request_id, "user_id": user, "task": "label", "input": "some words", **fields}
        self.send(json.dumps(request).encode(), user.encode())

    # --- what the other stages do
    def remember(self, user: str, pairs: Sequence[tuple[str, str]], task: str = "label") -> int:
        """Write events of a user; return the offset of the last, on partition 0."""
        embedder, partition = HashEmbedder(), Partition(self.topics.events, 0)
        events = []
        for number, (text, output) in enumerate(pairs, start=self.events_written):
            vector = embedder.embed([text])[0].astype("<f2").tobytes()
            dead = OutRecord(self.topics.dead_letters, user.encode(), b"")
            event_id = EventId(f"{user}-{number}")
            events.append(
                NewEvent(
                    user_id=UserId(user),
                    event_id=event_id,
                    task=task,
                    occurred_at=START,
                    recorded_at=START,
                    input=text,
                    output=output,
                    choices=None,
                    in_reply_to=None,
                    digest=event_id.encode(),
                    embedding=vector,
                    embedder=embedder.fingerprint,
                    partition=partition,
                    offset=number,
                    conflict=dead,
                )
            )
        expected = self.events_written or None
        self.events_written += len(events)
        advance = OffsetAdvance(partition, expected, self.events_written)
        self.store.write_events(IngestBatch(CLUSTER_ID, (advance,), tuple(events), now=self.clock.now()))
        return self.events_written - 1

    def publish(self, user: str, output: str, *, readable: bool = True, task: str = "label") -> AdapterRef:
        """Make a version that strongly favours one output the user's head."""
        self.store.register_base(self.model.base)
        claim = self.store.claim(self.model.base, UserId(user), holder="test", ttl_seconds=60)
        assert claim is not None
        ref = AdapterRef(UserId(user), claim.epoch, claim.next_version)
        if readable:
            self.adapters.versions[ref] = favouring(self.model, output, task)
        parent = claim.head.version if claim.head is not None else None
        candidate = Candidate(ref.version, parent, claim.last_seq, claim.last_seq, "path", "digest", {})
        announce = OutRecord(self.topics.updates, user.encode(), b"{}")
        assert self.store.publish(claim, candidate, now=self.clock.now(), announce=announce)
        return ref

    # --- what the loop does
    def offer(self) -> list[Record]:
        """Poll, and put new records behind the held ones."""
        records = [*self.held, *self.worker.consumer.poll(0, 500)]
        self.held = []
        return records

    def turn(self, drive: Drive = perform) -> StepOutcome | None:
        """Poll and step once; recover where that raises a ``TransientError``, in later turns too (then ``None``)."""
        try:
            if self.fault is None:
                outcome = drive(self.worker.step(self.offer(), self.clock.now()))
                self.held = list(outcome.held)
                return outcome
        except TransientError as error:
            self.held, self.fault = [], error
        assert self.fault is not None
        perform(self.worker.recover(self.fault))
        self.fault = None
        return None

    # --- what can be seen from outside
    def predictions(self) -> list[Prediction]:
        """Return all committed answers by request id, in order of writing within an id."""
        found = []
        for record in self.broker.records(self.topics.predictions):
            prediction = parse_prediction(record)
            assert dict(record.headers) == {"request_id": prediction.request_id.encode()}
            assert record.key == prediction.user_id.encode()
            found.append(prediction)
        return sorted(found, key=lambda prediction: prediction.request_id)

    def answer(self, request_id: str) -> Prediction:
        """Return the one answer to a request."""
        (found,) = [p for p in self.predictions() if p.request_id == request_id]
        return found

    def dead_letters(self) -> list[Record]:
        """Return all committed dead letters."""
        return self.broker.records(self.topics.dead_letters)

    def sample(self, name: str, **labels: str) -> float:
        """Return a metric's value; 0 where it was never touched."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def favouring(model: FakeModel, output: str, task: str = "label") -> Tensors:
    """Return weights that put nearly all mass on one output."""
    counts = np.zeros((1, BUCKETS), dtype=np.float32)
    counts[0, _bucket(task, output)] = 1e9
    return {TENSOR: counts}


def _failing(name: str, error: Exception, after: bool) -> Drive:
    """Return a driver whose effect ``name`` fails, before it happens or (acknowledgement lost) after."""

    def run(effect: Effect) -> Any:
        if effect.name != name:
            return effect.run()
        if after:
            effect.run()
        raise error

    def wrapped(steps: Steps[StepOutcome]) -> Steps[StepOutcome]:
        try:
            effect = next(steps)
            while True:
                try:
                    result = yield Effect(effect.name, partial(run, effect))
                except TransientError as raised:
                    effect = steps.throw(raised)
                else:
                    effect = steps.send(result)
        except StopIteration as stop:
            value: StepOutcome = stop.value
            return value

    return lambda steps: perform(wrapped(steps))


@pytest.fixture
def failing() -> Callable[[str, Exception, bool], Drive]:
    """Return a function from an effect's name, an error and whether it strikes after to a driver for ``turn``."""
    return _failing


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        kafka=KafkaSettings(partitions=3, replication=1, min_insync_replicas=1),
        store=StoreSettings(url=f"sqlite:///{tmp_path}/history.db"),
        inference=InferenceSettings(batch=4, resident_adapters=4),
    )


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    """Return a function that builds a world over settings; ``parts`` replace ports of the worker."""
    made: list[World] = []

    def make(
        settings: Settings, *, embedder: Embedder | None = None, ahead: Executor | None = None, **parts: Any
    ) -> World:
        clock, metrics = ManualClock(START), fresh()
        broker = MemoryBroker(clock)
        broker.admin().create_topics(topic_specs(settings))
        migrate(settings.store)
        store = open_store(settings.store, deployment_key="key", clock=clock)
        model, adapters = FakeModel(slots=settings.inference.resident_adapters), Adapters()
        retriever = Retriever(store, embedder or HashEmbedder(), settings.retriever, metrics, ahead)
        ports: Mapping[str, Any] = {
            "broker": broker,
            "store": store,
            "retriever": retriever,
            "model": model,
            "adapters": adapters,
            **parts,
        }
        worker = InferenceWorker(
            **ports, tasks=TASKS, settings=settings, metrics=metrics, clock=clock, cluster_id=CLUSTER_ID
        )
        worker.open()
        made.append(World(settings, clock, broker, store, model, adapters, retriever, metrics, worker))
        return made[-1]

    yield make
    for world in made:
        world.broker.unavailable = False
        world.worker.close()
        world.retriever.close()
        world.store.close()


@pytest.fixture
def world(settings: Settings, make_world: Callable[..., World]) -> World:
    return make_world(settings)
