"""Makers of batches for the store's tests."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np

from oppu.store.records import (
    Candidate,
    Claim,
    IngestBatch,
    IngestResult,
    NewAnswer,
    NewEvent,
    NewRefusal,
    OffsetAdvance,
)
from oppu.store.sql import SqlStore
from oppu.values import BaseId, EventId, OutRecord, Partition, RequestId, UserId

NOW = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)
BASE = BaseId("base-1")
CLUSTER = "cluster"
EVENTS = Partition("behavior-events", 0)
ANSWERS = Partition("predictions", 0)
EMBEDDER = "embedder-1"
ADA = UserId("ada")
BOB = UserId("bob")


def vector(seed: int) -> "np.typing.NDArray[np.float16]":
    """A small embedding that float16 holds exactly."""
    return np.array([seed % 7, 0.5, -0.25, 2.0], dtype="<f2")


def new_event(
    user_id: str,
    event_id: str,
    *,
    output: str = "yes",
    text: str = "input",
    in_reply_to: str | None = None,
    offset: int = 0,
    choices: tuple[str, ...] | None = None,
) -> NewEvent:
    """An event whose digest covers its text and output."""
    return NewEvent(
        user_id=UserId(user_id),
        event_id=EventId(event_id),
        task="task",
        occurred_at=NOW - timedelta(days=1),
        recorded_at=NOW + timedelta(seconds=offset),
        input=text,
        output=output,
        choices=choices,
        in_reply_to=None if in_reply_to is None else RequestId(in_reply_to),
        digest=hashlib.sha256(f"{text}|{output}".encode()).digest(),
        embedding=vector(len(event_id)).tobytes(),
        embedder=EMBEDDER,
        partition=EVENTS,
        offset=offset,
        conflict=OutRecord("dead-letters", user_id.encode(), text.encode(), (("reason", b"duplicate_conflict"),)),
    )


def new_answer(
    user_id: str,
    request_id: str,
    *,
    output: str = "yes",
    arm: str = "all",
    offset: int = 0,
    at: datetime = NOW,
    epoch: int | None = None,
    request: tuple[Partition, int] | None = None,
) -> NewAnswer:
    """A served prediction."""
    return NewAnswer(
        RequestId(request_id), UserId(user_id), "task", output, arm, at, ANSWERS, offset, epoch=epoch, request=request
    )


def some(user_id: str, count: int, start: int = 1) -> list[NewEvent]:
    """Several events of a user, ``e1``, ``e2``, …"""
    return [new_event(user_id, f"e{n}", offset=n) for n in range(start, start + count)]


@dataclass
class Writer:
    """Writes batches one after another, keeping its place in one partition."""

    store: SqlStore
    partition: Partition = EVENTS
    expected: int | None = None
    results: list[IngestResult] = field(default_factory=list)

    def write(
        self,
        events: Iterable[NewEvent] = (),
        *,
        answers: Iterable[NewAnswer] = (),
        dead_letters: Iterable[OutRecord] = (),
        now: datetime = NOW,
    ) -> IngestResult:
        """Write one batch and move on by one offset, at which the refused records lie."""
        following = (self.expected or 0) + 1
        batch = IngestBatch(
            CLUSTER,
            (OffsetAdvance(self.partition, self.expected, following),),
            tuple(events),
            tuple(answers),
            tuple(NewRefusal(letter, EVENTS, following) for letter in dead_letters),
            now=now,
        )
        result = self.store.write_events(batch)
        self.expected = following
        self.results.append(result)
        return result


def announce(user_id: str, value: bytes | None = b"head") -> OutRecord:
    """A record for the feed of heads."""
    return OutRecord("adapter-updates", user_id.encode(), value)


def take(store: SqlStore, user_id: UserId, *, holder: str = "w1", ttl_seconds: float = 60.0) -> Claim:
    """Claim a user who must be free."""
    claim = store.claim(BASE, user_id, holder=holder, ttl_seconds=ttl_seconds)
    assert claim is not None
    return claim


def candidate_of(claim: Claim, *, through: int | None = None, parent: int | None = None) -> Candidate:
    """What a claimant publishes, by default on top of the claim's head."""
    reached = claim.last_seq if through is None else through
    return Candidate(
        version=claim.next_version,
        parent=parent if parent is not None else (claim.head.version if claim.head else None),
        trained_through=reached,
        considered_through=reached,
        path=f"v{claim.next_version}",
        digest=f"digest-{claim.token}",
        metrics={"loss": 0.5},
    )


def publish(store: SqlStore, user_id: UserId) -> int:
    """Claim and publish at once; returns the version."""
    claim = take(store, user_id)
    assert store.publish(claim, candidate_of(claim), now=NOW, announce=announce(user_id))
    return claim.next_version
