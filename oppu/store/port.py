"""What the stages ask of the history store; one contract suite holds SQLite and PostgreSQL to it.

Invariants: each write method is one transaction. A user's events are numbered 1, 2, 3 … without a gap, given out
under a lock on the user's row. ``next_offset`` moves only from the value the caller read. An adapter head moves
only from its parent, under the caller's claim token, and in the caller's epoch of the user.

Every method raises ``TransientError`` when the database is unreachable, locked or full.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Protocol

from oppu.store.records import (
    AdapterLogEntry,
    AdapterStatus,
    Candidate,
    Claim,
    DueUser,
    IngestBatch,
    IngestResult,
    Lift,
    OutboxRow,
    Outcome,
    Quality,
    StoredOffset,
)
from oppu.values import BaseId, Event, EventId, Head, OutRecord, Partition, UserId, UserState

PURGED_AT_ONCE = 2_000
"""Answers: a transaction that holds rows' locks is to be short."""


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

    def give_back(self, claim: Claim) -> bool:
        """Release a claim as if it had never been made; false where the token has moved.

        Failures, back-off and watermarks stay; ``attempts`` is one less, whether the token has moved or not, since this
        one did not end with its process; nothing is logged.
        """
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

    def erasures(self, *, after: str, since: datetime | None, limit: int) -> dict[str, int]:
        """Return the epochs that erasures began, by the users' keyed hashes: the next ``limit`` over ``after``.

        ``since`` leaves out those of before; users are in the order of their hashes.
        """
        ...

    # --- quality
    def quality(self) -> list[Quality]:
        """Return live quality by task and arm, computed from the kept answers."""
        ...

    def lift(self, base: BaseId) -> Lift:
        """Return the summed paired lift."""
        ...

    def purge_answers(self, *, before: datetime) -> int:
        """Delete old answers, at most ``PURGED_AT_ONCE``, and users of whom nothing else is kept.

        Args:
            before: Those given earlier go.

        Returns:
            How many answers; as many as were allowed: there may be more.
        """
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
