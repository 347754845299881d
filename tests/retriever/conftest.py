"""An in-memory history that keeps the ``events`` part of the store's promises, and helpers around it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import numpy as np
import pytest

from oppu.embedder import HashEmbedder
from oppu.errors import TransientError
from oppu.metrics import Metrics, fresh
from oppu.settings import RetrieverSettings
from oppu.store.port import HistoryStore
from oppu.values import Event, EventId, UserId, UserState
from retriever.service import Retriever

START = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class FakeHistory:
    """Users' events with epochs. ``visible`` holds back a user's events after a seq, like a lagging replica."""

    embedder: HashEmbedder = field(default_factory=lambda: HashEmbedder(16))
    users: dict[UserId, list[Event]] = field(default_factory=dict)
    epochs: dict[UserId, int] = field(default_factory=dict)
    visible: dict[UserId, int] = field(default_factory=dict)
    calls: list[dict[UserId, int]] = field(default_factory=list)
    down: bool = False

    def add(
        self,
        user: str,
        text: str,
        output: str = "yes",
        *,
        task: str = "t",
        choices: tuple[str, ...] | None = None,
        embedded: bool = True,
    ) -> Event:
        """Append one event."""
        events = self.users.setdefault(UserId(user), [])
        seq = len(events) + 1
        at = START + timedelta(seconds=seq)
        vector = self.embedder.embed([text])[0].astype(np.float16).astype(np.float32) if embedded else None
        event = Event(
            user_id=UserId(user),
            seq=seq,
            event_id=EventId(f"{user}-{self.epochs.get(UserId(user), 1)}-{seq}"),
            task=task,
            occurred_at=at,
            recorded_at=at,
            input=text,
            output=output,
            choices=choices,
            embedding=vector,
        )
        events.append(event)
        return event

    def state(self, user: str) -> UserState:
        """Return what the store would say of a user now."""
        name = UserId(user)
        return UserState(name, self.epochs.get(name, 1), len(self.users.get(name, [])), None)

    def erase(self, user: str) -> None:
        """Delete a user's events and raise the epoch; seqs begin anew."""
        name = UserId(user)
        self.users[name] = []
        self.epochs[name] = self.epochs.get(name, 1) + 1

    def events(self, cursors: Mapping[UserId, int], *, embedder: str, limit: int) -> dict[UserId, list[Event]]:
        """Keep the port's promise."""
        if self.down:
            raise TransientError("store is down")
        self.calls.append(dict(cursors))
        found: dict[UserId, list[Event]] = {}
        for user, cursor in cursors.items():
            through = self.visible.get(user, 10**9)
            events = [e for e in self.users.get(user, []) if cursor < e.seq <= through][-limit:]
            if embedder != self.embedder.fingerprint:
                events = [replace(e, embedding=None) for e in events]
            if events:
                found[user] = events
        return found


@dataclass
class CountingEmbedder(HashEmbedder):
    """Remembers what it was asked."""

    calls: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(16)

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Note the call and pass it on."""
        self.calls.append(list(texts))
        return super().embed(texts)


Make = Callable[..., Retriever]


@pytest.fixture
def history() -> FakeHistory:
    return FakeHistory()


@pytest.fixture
def metrics() -> Metrics:
    return fresh()


@pytest.fixture
def make(history: FakeHistory, metrics: Metrics) -> Make:
    """Return a maker of retrievers on the history; keywords are settings, ``embedder`` aside."""

    def build(embedder: HashEmbedder | None = None, **settings: object) -> Retriever:
        return Retriever(
            cast(HistoryStore, history),
            embedder or history.embedder,
            RetrieverSettings.model_validate(settings),
            metrics,
        )

    return build


@pytest.fixture
def counting() -> CountingEmbedder:
    return CountingEmbedder()


@pytest.fixture(scope="session")
def world() -> Callable[..., tuple[FakeHistory, Retriever]]:
    """Return a maker of a new history and a retriever on it, for tests that need many; keywords are settings."""

    def build(**settings: object) -> tuple[FakeHistory, Retriever]:
        history = FakeHistory()
        parsed = RetrieverSettings.model_validate(settings)
        return history, Retriever(cast(HistoryStore, history), history.embedder, parsed, fresh())

    return build
