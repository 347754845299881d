"""What goes into the history store and comes out of it, beside the values of the whole service."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from oppu.values import BaseId, EventId, Head, OutRecord, Partition, RequestId, UserId


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
    """A prediction that was served, kept to be matched with what the user really did.

    Attributes:
        request_id: Names it; unique within a user.
        user_id: Whose.
        task: The task.
        output: The answer.
        arm: What contributed to it.
        answered_at: The time of its record.
        partition: Where its record lies.
        offset: There.
        epoch: The user's epoch when it was computed; ``None`` where it does not say.
        request: Where the request lies; ``None`` where it does not say.
    """

    request_id: RequestId
    user_id: UserId = field(repr=False)
    task: str
    output: str = field(repr=False)
    arm: str
    answered_at: datetime
    partition: Partition
    offset: int
    epoch: int | None = None
    request: tuple[Partition, int] | None = None


@dataclass(frozen=True, slots=True)
class NewRefusal:
    """A record that is set aside: its dead letter, whose key is the record's own, and where the record lies."""

    letter: OutRecord
    partition: Partition
    offset: int


@dataclass(frozen=True, slots=True)
class IngestBatch:
    """All that one ingest step writes, in one transaction. ``cluster_id`` qualifies every offset."""

    cluster_id: str
    offsets: tuple[OffsetAdvance, ...]
    events: tuple[NewEvent, ...] = ()
    answers: tuple[NewAnswer, ...] = ()
    refused: tuple[NewRefusal, ...] = ()
    now: datetime = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class IngestResult:
    """What became of a batch.

    Attributes:
        written: Events that are new.
        duplicates: Events that were stored before.
        conflicts: Events whose id is stored with other content.
        erased: Records of all kinds of before their user's erasure; nothing is kept of them, no dead letter either.
        kept: Answers.
        set_aside: Refusals.
        matched: Answers that were matched with what the user did.
    """

    written: int = 0
    duplicates: int = 0
    conflicts: int = 0
    erased: int = 0
    kept: int = 0
    set_aside: tuple[NewRefusal, ...] = ()
    matched: int = 0


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
    one included and those given back left out: more than a few mean that training this user kills the process.
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
