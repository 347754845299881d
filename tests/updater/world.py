"""A small world for the updater's tests: the real store on SQLite, the real registry in memory, a counting model."""

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oppu.clock import ManualClock
from oppu.effects import Effect, Steps, perform
from oppu.lm.fake import TENSOR, FakeModel
from oppu.lm.port import AdapterRef, TrainConfig, Trained, TrainJob
from oppu.metrics import Metrics, fresh
from oppu.privacy import UserHash
from oppu.registry import AdapterRegistry
from oppu.settings import RegistrySettings, StoreSettings, UpdaterSettings
from oppu.store.records import AdapterStatus, IngestBatch, NewEvent, OffsetAdvance
from oppu.store.sql import SqlStore, migrate, open_store
from oppu.tasks import Task, Tasks
from oppu.values import EventId, Head, OutRecord, Partition, UserId
from oppu.wire import Topics
from updater.job import Ended, TickOutcome
from updater.worker import Updater

KEY = "key"
TASKS = Tasks(
    {
        "mood": Task("mood", "choice", "{input}", "mood:", labels=("glad", "sad")),
        "title": Task("title", "text", "{input}", "title:"),
    }
)
SETTINGS = UpdaterSettings(min_pending=4, users_per_tick=4, replay=4, claim_seconds=60, retry_seconds=30)
TOPICS = Topics("t.")
EVENTS = Partition("t.behavior-events", 0)
GLAD, SAD = ["glad"] * 10, ["sad"] * 10


class Model(FakeModel):
    """The counting model, which can be told to break for certain users."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[tuple[TrainJob, ...]] = []
        self.configs: list[TrainConfig] = []
        self.breaks_for: set[str] = set()
        self.ruins: set[str] = set()
        self.while_training: Callable[[], None] = lambda: None

    def train(self, jobs: Sequence[TrainJob], config: TrainConfig, *, heartbeat: Callable[[], None]) -> list[Trained]:
        self.jobs.append(tuple(jobs))
        self.configs.append(config)
        self.while_training()
        if self.breaks_for & {job.user_id for job in jobs}:
            raise ValueError("a secret text of the user")
        results = super().train(jobs, config, heartbeat=heartbeat)
        return [self._ruined(j, r) if j.user_id in self.ruins else r for j, r in zip(jobs, results, strict=True)]

    def _ruined(self, job: TrainJob, result: Trained) -> Trained:
        return Trained({TENSOR: np.full((1, 64), np.nan, dtype=np.float32)}, result.steps, float("nan"))


class World:
    """Everything around an updater, and short ways to act and to look."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        settings = StoreSettings(url=f"sqlite:///{folder / 'history.db'}")
        migrate(settings)
        self.store: SqlStore = open_store(settings, deployment_key=KEY, clock=self.clock)
        self.model = Model()
        self.metrics: Metrics = fresh()
        self.hash = UserHash(KEY)
        self.registry = AdapterRegistry(
            f"memory://{uuid.uuid4().hex}",
            base=self.model.base,
            user_hash=self.hash,
            adapter_config=self.model.adapter_config(),
            clock=self.clock,
        )
        self.updater = self.new_updater()
        self.trace: list[str] = []
        self._next_offset: int | None = None
        self._written = 0
        perform(self.updater.open())

    def new_updater(self, holder: str = "one", **changes: Any) -> Updater:
        parts: dict[str, Any] = {
            "store": self.store,
            "registry": self.registry,
            "model": self.model,
            "tasks": TASKS,
            "settings": SETTINGS,
            "topics": TOPICS,
            "metrics": self.metrics,
            "user_hash": self.hash,
            "clock": self.clock,
            "collection": RegistrySettings(keep_versions=1, grace_seconds=100),
        }
        return Updater(holder=holder, **(parts | changes))

    def act(self, user: str, outputs: Sequence[str], *, task: str = "mood", text: str = "") -> None:
        """Let a user do things, a second apart; each input is new unless ``text`` is given."""
        events = []
        for output in outputs:
            self.clock.advance(1)
            self._written += 1
            events.append(self._event(user, task, text or f"input {self._written}", output))
        following = (self._next_offset or 0) + len(events)
        advance = OffsetAdvance(EVENTS, self._next_offset, following)
        result = self.store.write_events(IngestBatch("c", (advance,), tuple(events), now=self.clock.now()))
        assert result.written == len(events)
        self._next_offset = following

    def _event(self, user: str, task: str, text: str, output: str) -> NewEvent:
        return NewEvent(
            user_id=UserId(user),
            event_id=EventId(f"e{self._written}"),
            task=task,
            occurred_at=self.clock.now(),
            recorded_at=self.clock.now(),
            input=text,
            output=output,
            choices=None,
            in_reply_to=None,
            digest=hashlib.sha256(f"{text}|{output}".encode()).digest(),
            embedding=np.ones(2, dtype="<f2").tobytes(),
            embedder="e",
            partition=EVENTS,
            offset=self._written,
            conflict=OutRecord("t.dead-letters", None, None),
        )

    def tick(self, updater: Updater | None = None, **hooks: Callable[[], Any]) -> TickOutcome:
        """Run a tick; a hook named ``port_verb`` runs just before that effect, ``after_port_verb`` just after."""
        outcome: TickOutcome = self.drive((updater or self.updater).tick(self.clock.now()), **hooks)
        return outcome

    def drive(self, steps: Steps[Any], **hooks: Callable[[], Any]) -> Any:
        """Perform a step's effects one by one, noting their names."""
        self.trace = []

        def hooked(steps: Steps[Any]) -> Steps[Any]:
            try:
                effect = next(steps)
                while True:
                    try:
                        result = yield Effect(effect.name, lambda effect=effect: self._run(effect, hooks))  # type: ignore[misc]
                    except Exception as error:
                        effect = steps.throw(error)
                    else:
                        effect = steps.send(result)
            except StopIteration as stop:
                return stop.value

        return perform(hooked(steps))

    def _run(self, effect: Effect, hooks: dict[str, Callable[[], Any]]) -> Any:
        self.trace.append(effect.name)
        name = effect.name.replace(".", "_")
        hooks.get(name, lambda: None)()
        result = effect.run()
        hooks.get(f"after_{name}", lambda: None)()
        return result

    # --- looking
    def status(self, user: str) -> AdapterStatus:
        status = self.store.adapter(self.model.base, UserId(user))
        assert status is not None
        return status

    def head(self, user: str) -> Head | None:
        return self.status(user).head

    def ref(self, user: str, version: int, epoch: int | None = None) -> AdapterRef:
        state = self.store.users([UserId(user)], self.model.base)[UserId(user)]
        return AdapterRef(UserId(user), state.epoch if epoch is None else epoch, version)

    def files(self, user: str) -> list[int]:
        return self.registry.versions(UserId(user), self.ref(user, 0).epoch)

    def log(self, user: str) -> list[tuple[str, str]]:
        """Outcomes and reasons, newest first."""
        return [(e.outcome.value, e.reason) for e in self.store.adapter_log(self.model.base, UserId(user), limit=50)]

    def due(self) -> int:
        return self.store.due_count(self.model.base, now=self.clock.now(), min_pending=SETTINGS.min_pending)

    def count(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(metric, labels) or 0.0

    def updates(self, how: Ended) -> float:
        return self.count("oppu_updater_updates_total", outcome=how.value)


def published(world: World, user: str = "ada") -> int:
    """Let a user get a version, and return its number."""
    world.act(user, GLAD)
    assert world.tick().ended == {Ended.PUBLISHED: 1}
    head = world.head(user)
    assert head is not None
    return head.version


def announced(world: World) -> list[dict[str, object]]:
    records = [row.record for row in world.store.outbox(100)]
    assert {r.topic for r in records} <= {TOPICS.updates}
    assert all(r.key == json.loads(r.value or b"{}")["user_id"].encode() for r in records)
    return [json.loads(r.value or b"") for r in records]
