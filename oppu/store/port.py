"""What the stages ask of the history store; one contract suite holds SQLite and PostgreSQL to it.

Invariants: each write method is one transaction. A user's events are numbered 1, 2, 3 … without a gap, given out
under a lock on the user's row. ``next_offset`` moves only from the value the caller read. An adapter head moves
only from its parent, under the caller's claim token, and in the caller's epoch of the user.

Every method raises ``TransientError`` when the database is unreachable, locked or full.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from oppu.values import BaseId, Event, EventId, Head, OutRecord, Partition, RequestId, UserId, UserState


@dataclass(frozen=True, slots=True)
class StoredOffset:
    """Where ingest stands in one partition. ``topic_id`` is the topic's identity, where it can be had."""

    next_offset: int
    topic_id: str | None


@dataclass(frozen=True, slots=True)
class OffsetAdvance:
    """A compare-and-swap of ``next_offset``: from ``expected`` (``None``: no row yet) to ``next_offset``."""

    partition: Partition
    expected: int | None
    next_offset: int
    topic_id: str | None = None


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to write. ``embedding`` is ``[dim] float16`` little-endian bytes.

    ``conflict`` is the dead letter to put into the outbox where the same event id is stored with another
    ``digest`` (SHA-256 of the content).
    """

    user_id: UserId = field(repr=False)
    event_id: EventId
    task: str
    occurred_at: datetime
    recorded_at: datetime
    input: str = field(repr=False)
    output: str = field(repr=False)
    choices: tuple[str, ...] | None = field(repr=False)
    in_reply_to: RequestId | None
    digest: bytes = field(repr=False)
    embedding: bytes = field(repr=False)
    embedder: str
    partition: Partition
    offset: int
    conflict: OutRecord = field(repr=False)


@dataclass(frozen=True, slots=True)
class NewAnswer:
    """A prediction that was served, kept to be matched with what the user really did."""

    request_id: RequestId
    user_id: UserId = field(repr=False)
    task: str
    output: str = field(repr=False)
    arm: str
    answered_at: datetime
    partition: Partition
    offset: int


@dataclass(frozen=True, slots=True)
class IngestBatch:
    """All that one ingest step writes, in one transaction. ``cluster_id`` qualifies every offset."""

    cluster_id: str
    offsets: tuple[OffsetAdvance, ...]
    events: tuple[NewEvent, ...] = ()
    answers: tuple[NewAnswer, ...] = ()
    dead_letters: tuple[OutRecord, ...] = ()
    now: datetime = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What became of a batch. ``erased`` counts records from before their user's erasure."""

    written: int
    duplicates: int
    conflicts: int
    erased: int
    matched: int


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A record waiting to be sent; deleted once acknowledged."""

    id: int
    record: OutRecord


@dataclass(frozen=True, slots=True)
class DueUser:
    """A user with enough events after ``considered_through``."""

    user_id: UserId = field(repr=False)
    pending: int
    last_recorded_at: datetime


class ClaimState(StrEnum):
    """Whether a user may be claimed, for display."""

    FREE = "free"
    CLAIMED = "claimed"
    BACKING_OFF = "backing_off"
    QUARANTINED = "quarantined"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to train one user until ``expires_at``; safety comes from ``token``, not from the expiry.

    ``next_version`` is this claim's alone. ``attempts`` counts the claims since one was last concluded, this
    one included: more than a few mean that training this user kills the process.
    """

    user_id: UserId = field(repr=False)
    base: BaseId
    token: int
    epoch: int
    head: Head | None
    considered_through: int
    last_seq: int
    next_version: int
    expires_at: datetime
    attempts: int = 1


class Outcome(StrEnum):
    """How an update attempt ended; also the adapter log's causes."""

    PUBLISHED = "published"
    REJECTED = "rejected"
    FAILED = "failed"
    SKIPPED = "skipped"
    ROLLED_BACK = "rolled_back"
    RELEASED = "released"
    ERASED = "erased"


@dataclass(frozen=True, slots=True)
class Lift:
    """Paired prequential loss of the live adapter and of none on the same pending events (nats an event, summed)."""

    events: int
    loss_live: float
    loss_none: float
    correct_live: int
    correct_none: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version whose files are written and checked, ready to become the head; ``earned`` by the versions before it."""

    version: int
    parent: int | None
    trained_through: int
    considered_through: int
    path: str
    digest: str
    metrics: Mapping[str, float]
    earned: float = 0.0


@dataclass(frozen=True, slots=True)
class AdapterLogEntry:
    """One line of the append-only audit trail. ``user`` is the keyed hash, never the id."""

    user: str
    base: BaseId
    at: datetime
    outcome: Outcome
    version: int | None
    parent: int | None
    reason: str
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One user's training state on one base, for display."""

    user_id: UserId = field(repr=False)
    base: BaseId
    head: Head | None
    considered_through: int
    last_seq: int
    failures: int
    state: ClaimState
    retry_at: datetime | None


@dataclass(frozen=True, slots=True)
class Quality:
    """Live quality of one task and arm over the kept answers that were matched with what the user did."""

    task: str
    arm: str
    answered: int
    matched: int
    correct: int


class HistoryStore(Protocol):
    """The whole interface; workers take it as a constructor argument."""

    # --- ingest
    def offsets(self, cluster_id: str, topics: Sequence[str]) -> dict[Partition, StoredOffset]:
        """Return where ingest stands in every partition it has ever written."""
        ...

    def write_events(self, batch: IngestBatch) -> IngestResult:
        """Write events, answers, dead letters and offsets in one transaction.

        Args:
            batch: What one step came to.

        Returns:
            What became of the events.

        Raises:
            OffsetConflict: Some partition's ``next_offset`` was not the expected one; nothing was written.
        """
        ...

    def adopt_offset(self, cluster_id: str, partition: Partition, next_offset: int, topic_id: str | None) -> None:
        """Set an offset by an operator's decision, whatever stood there."""
        ...

    def outbox(self, limit: int, *, after: int = 0) -> list[OutboxRow]:
        """Return the oldest unsent rows with an id over ``after``, at least one but not many MiB at once."""
        ...

    def delete_outbox(self, ids: Sequence[int]) -> None:
        """Remove acknowledged rows."""
        ...

    # --- history
    def users(self, user_ids: Sequence[UserId], base: BaseId) -> dict[UserId, UserState]:
        """Return epoch, last sequence and head of known users, in one query."""
        ...

    def events(self, cursors: Mapping[UserId, int], *, embedder: str, limit: int) -> dict[UserId, list[Event]]:
        """Return each user's newest ``limit`` events after the cursor's seq, in seq order.

        An embedding of another embedder than ``embedder`` comes back as ``None``.
        """
        ...

    def list_users(self, *, limit: int, after: UserId | None = None) -> list[UserState]:
        """Return users in id order, for commands."""
        ...

    def counts(self) -> dict[str, int]:
        """Return ``users``, ``events``, ``outbox``, ``answers``, ``adapters`` (heads), ``held``, ``quarantined``."""
        ...

    # --- updater
    def register_base(self, base: BaseId) -> None:
        """Make every present and future user trainable on ``base``; repeating it does nothing."""
        ...

    def bases(self) -> list[BaseId]:
        """Return the registered bases, oldest first."""
        ...

    def due(self, base: BaseId, *, now: datetime, min_pending: int, limit: int) -> list[DueUser]:
        """Return unclaimed users with enough pending events, most pending first, from an index."""
        ...

    def due_count(self, base: BaseId, *, now: datetime, min_pending: int) -> int:
        """Return how many users are due."""
        ...

    def claim(self, base: BaseId, user_id: UserId, *, holder: str, ttl_seconds: float) -> Claim | None:
        """Claim a user by the store's own clock, raising the token; ``None`` where somebody else holds it."""
        ...

    def renew(self, claim: Claim, ttl_seconds: float) -> bool:
        """Extend a claim; false where its token is no longer current."""
        ...

    def publish(self, claim: Claim, candidate: Candidate, *, now: datetime, announce: OutRecord) -> bool:
        """Make the candidate the head and release the claim, in one transaction with log and outbox.

        Returns:
            False, with nothing written, where token, parent or epoch have moved.

        Args:
            claim: The caller's claim.
            candidate: The version whose files are written and checked.
            now: Current time, for the log.
            announce: The record that tells others, put into the outbox.
        """
        ...

    def conclude(  # noqa: PLR0913 - what ended, how far, why, and what next, each by its name
        self,
        claim: Claim,
        outcome: Outcome,
        *,
        considered_through: int,
        reason: str,
        now: datetime,
        retry_at: datetime | None = None,
        quarantine: bool = False,
        metrics: Mapping[str, float] | None = None,
        earned: float | None = None,
    ) -> bool:
        """End an attempt that published nothing and release the claim; false where the token has moved.

        ``earned`` is what the live adapter has earned through ``considered_through``; ``None``: as before.
        """
        ...

    def record_lift(self, claim: Claim, lift: Lift, *, through: int, now: datetime) -> None:
        """Keep a paired score of the events up to ``through``, once per user, base and ``through``."""
        ...

    # --- adapters, for commands and collection
    def adapter(self, base: BaseId, user_id: UserId) -> AdapterStatus | None:
        """Return one user's training state."""
        ...

    def adapters(self, base: BaseId, *, limit: int, after: UserId | None = None) -> list[AdapterStatus]:
        """Return users that have a head or an attempt, in id order."""
        ...

    def versions(self, base: BaseId, user_id: UserId) -> list[Candidate]:
        """Return every version ever published in the current epoch, oldest first."""
        ...

    def adapter_log(self, base: BaseId, user_id: UserId, *, limit: int) -> list[AdapterLogEntry]:
        """Return the newest entries of one user's audit trail."""
        ...

    def roll_back(
        self,
        base: BaseId,
        user_id: UserId,
        *,
        to: int | None,
        reason: str,
        now: datetime,
        announce: OutRecord,
    ) -> Head | None:
        """Move the head to an earlier version (``None``: no adapter) and hold training until new evidence.

        Args:
            base: Which base.
            user_id: The user's id.
            to: The version; ``None`` = no adapter.
            reason: Why, in one word or line.
            now: Current time, for the log.
            announce: The record that tells others, put into the outbox.

        Returns:
            The new head.

        Raises:
            ConfigError: The user has no such version.
        """
        ...

    def release(self, base: BaseId, user_id: UserId, *, now: datetime) -> bool:
        """Lift hold, quarantine and back-off of a user; false for an unknown user."""
        ...

    def erase(
        self,
        user_id: UserId,
        *,
        cluster_id: str,
        end_offsets: Mapping[Partition, int],
        now: datetime,
        announce: OutRecord,
    ) -> bool:
        """Delete all of a user's rows, raise the epoch and refuse older records; false for an unknown user."""
        ...

    # --- quality
    def quality(self) -> list[Quality]:
        """Return live quality by task and arm, computed from the kept answers."""
        ...

    def lift(self, base: BaseId) -> Lift:
        """Return the summed paired lift."""
        ...

    def purge_answers(self, *, before: datetime) -> int:
        """Delete answers older than ``before``."""
        ...

    def ping(self) -> None:
        """Check that the store can be read and that its schema version is the expected one.

        Raises:
            ConfigError: The schema version is another one; names the command.
        """
        ...

    def close(self) -> None:
        """Release all connections."""
        ...


def event_ids(events: Sequence[Event]) -> tuple[EventId, ...]:
    """Return the events' ids in order."""
    return tuple(event.event_id for event in events)
