"""The history store on SQLite or PostgreSQL: each method opens one transaction and hands it to its concern.

Invariant: every write method is one transaction. Thread-safe: each call has a connection of its own. The work is
in ``transport``, ``ingest_writes``, ``history``, ``claims``, ``adapters``, ``erasure``, ``quality`` and ``audit``.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import func, select

from oppu.clock import Clock
from oppu.privacy import UserHash
from oppu.settings import StoreSettings
from oppu.store import adapters, audit, claims, erasure, history, ingest_writes, quality, transport
from oppu.store.database import Database
from oppu.store.migrations import check_version, migrate
from oppu.store.port import PURGED_AT_ONCE, HistoryStore
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
from oppu.values import BaseId, Event, Head, OutRecord, Partition, UserId, UserState

__all__ = ["SqlStore", "migrate", "open_store"]


def open_store(settings: StoreSettings, *, deployment_key: str, clock: Clock | None = None) -> "SqlStore":
    """Make a store; nothing is connected yet. Call ``ping`` before the first use.

    Args:
        settings: URL and lock timeout.
        deployment_key: Keys the hashes that stand for users in the log and in erasures.
        clock: Decides when claims expire on SQLite (``None``: the system's); PostgreSQL uses the server's.

    Returns:
        The store.

    Raises:
        ConfigError: The URL is not one we support, or its driver is not installed.
    """
    return SqlStore(Database(settings, clock), UserHash(deployment_key))


class SqlStore(HistoryStore):
    """Implements :class:`oppu.store.port.HistoryStore`, where the methods are described."""

    def __init__(self, database: Database, user_hash: UserHash) -> None:
        self.database = database
        self._hash = user_hash

    # --- ingest
    def offsets(self, cluster_id: str, topics: Sequence[str]) -> dict[Partition, StoredOffset]:
        """Return where ingest stands."""
        with self.database.read() as connection:
            return transport.read_offsets(connection, cluster_id, topics)

    def write_events(self, batch: IngestBatch) -> IngestResult:
        """Write one poll batch."""
        with self.database.write() as connection:
            return ingest_writes.write_events(connection, self._hash, batch)

    def adopt_offset(self, cluster_id: str, partition: Partition, next_offset: int, topic_id: str | None) -> None:
        """Set an offset by an operator's decision."""
        with self.database.write() as connection:
            transport.adopt_offset(connection, cluster_id, partition, StoredOffset(next_offset, topic_id))

    def outbox(self, limit: int, *, after: int = 0) -> list[OutboxRow]:
        """Return the oldest unsent rows, not many MiB at once."""
        with self.database.read() as connection:
            return transport.read_outbox(connection, limit, after)

    def delete_outbox(self, ids: Sequence[int]) -> None:
        """Remove acknowledged rows."""
        if ids:
            with self.database.write() as connection:
                transport.delete_outbox(connection, ids)

    # --- history
    def users(self, user_ids: Sequence[UserId], base: BaseId) -> dict[UserId, UserState]:
        """Return epoch, last sequence and head of known users."""
        with self.database.read() as connection:
            return history.read_users(connection, self._hash, user_ids, base)

    def events(self, cursors: Mapping[UserId, int], *, embedder: str, limit: int) -> dict[UserId, list[Event]]:
        """Return each user's newest events after the cursor."""
        with self.database.read() as connection:
            return history.read_events(connection, cursors, embedder=embedder, limit=limit)

    def list_users(self, *, limit: int, after: UserId | None = None) -> list[UserState]:
        """Return users in id order; their heads are per base and not among it."""
        with self.database.read() as connection:
            return history.list_users(connection, limit=limit, after=after)

    def counts(self) -> dict[str, int]:
        """Return totals."""
        with self.database.read() as connection:
            return history.counts(connection)

    # --- updater
    def register_base(self, base: BaseId) -> None:
        """Make every user trainable on a base."""
        with self.database.write() as connection:
            claims.register_base(connection, base)

    def bases(self) -> list[BaseId]:
        """Return the registered bases."""
        with self.database.read() as connection:
            return claims.list_bases(connection)

    def due(self, base: BaseId, *, now: datetime, min_pending: int, limit: int) -> list[DueUser]:
        """Return due users, most pending first."""
        with self.database.read() as connection:
            moment = self.database.now(connection)
            statement = claims.due_statement(base, moment=moment, now=now, min_pending=min_pending)
            return claims.due(connection, statement, limit)

    def due_count(self, base: BaseId, *, now: datetime, min_pending: int) -> int:
        """Return how many users are due."""
        with self.database.read() as connection:
            moment = self.database.now(connection)
            statement = claims.due_statement(base, moment=moment, now=now, min_pending=min_pending)
            counted = select(func.count()).select_from(statement.order_by(None).subquery())
            return int(connection.execute(counted).scalar_one())

    def claim(self, base: BaseId, user_id: UserId, *, holder: str, ttl_seconds: float) -> Claim | None:
        """Claim a user by the store's clock."""
        with self.database.write() as connection:
            who = (base, user_id)
            return claims.claim(connection, self.database, who, holder=holder, ttl_seconds=ttl_seconds)

    def renew(self, claim: Claim, ttl_seconds: float) -> bool:
        """Extend a claim."""
        with self.database.write() as connection:
            return claims.renew(connection, self.database, claim, ttl_seconds)

    def give_back(self, claim: Claim) -> bool:
        """Release a claim as if it had never been made."""
        with self.database.write() as connection:
            return claims.give_back(connection, claim)

    def publish(self, claim: Claim, candidate: Candidate, *, now: datetime, announce: OutRecord) -> bool:
        """Make the candidate the head. Repeating a publish whose acknowledgement was lost is true again."""
        with self.database.write() as connection:
            if not claims.publish(connection, self._hash, claim, candidate, now):
                return claims.already_published(connection, claim, candidate)
            transport.enqueue(connection, [announce])
            return True

    def conclude(  # noqa: PLR0913 - the port's signature
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
        """End an attempt that published nothing."""
        if outcome not in (Outcome.REJECTED, Outcome.FAILED, Outcome.SKIPPED):
            raise ValueError(f"an attempt cannot be concluded as {outcome}")
        ending = claims.Ending(outcome, considered_through, reason, now, retry_at, quarantine, metrics or {}, earned)
        with self.database.write() as connection:
            return claims.conclude(connection, self._hash, claim, ending)

    def record_lift(self, claim: Claim, lift: Lift, *, through: int, now: datetime) -> None:
        """Keep a paired score, each event counted once."""
        with self.database.write() as connection:
            claims.record_lift(connection, claim, lift, through=through, now=now)

    # --- adapters
    def adapter(self, base: BaseId, user_id: UserId) -> AdapterStatus | None:
        """Return one user's training state."""
        with self.database.read() as connection:
            return adapters.read_status(connection, base, user_id, self.database.now(connection))

    def adapters(self, base: BaseId, *, limit: int, after: UserId | None = None) -> list[AdapterStatus]:
        """Return users that have a head or an attempt."""
        with self.database.read() as connection:
            moment = self.database.now(connection)
            return adapters.list_statuses(connection, base, moment, limit=limit, after=after)

    def versions(self, base: BaseId, user_id: UserId) -> list[Candidate]:
        """Return every version published in the current epoch."""
        with self.database.read() as connection:
            return adapters.read_versions(connection, base, user_id)

    def adapter_log(self, base: BaseId, user_id: UserId, *, limit: int) -> list[AdapterLogEntry]:
        """Return the newest entries of one user's audit trail, newest first."""
        with self.database.read() as connection:
            return audit.newest(connection, base, self._hash(user_id), limit)

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
        """Move the head to an earlier version and hold training."""
        with self.database.write() as connection:
            who = (base, user_id)
            head = adapters.roll_back(connection, self._hash, who, to=to, reason=reason, now=now)
            transport.enqueue(connection, [announce])
            return head

    def release(self, base: BaseId, user_id: UserId, *, now: datetime) -> bool:
        """Lift hold, quarantine and back-off."""
        with self.database.write() as connection:
            return adapters.release(connection, self._hash, base, user_id, now=now)

    def erase(
        self,
        user_id: UserId,
        *,
        cluster_id: str,
        end_offsets: Mapping[Partition, int],
        now: datetime,
        announce: OutRecord,
    ) -> bool:
        """Erase a user."""
        with self.database.write() as connection:
            ends = {cluster_id: end_offsets}
            known = erasure.erase_user(connection, self._hash, user_id, ends=ends, now=now)
            transport.enqueue(connection, [announce])
        self.database.clear_log()
        return known

    def erasures(self, *, after: str, since: datetime | None, limit: int) -> dict[str, int]:
        """Return the epochs that erasures began, by the users' keyed hashes."""
        with self.database.read() as connection:
            return erasure.list_erasures(connection, after=after, since=since, limit=limit)

    # --- quality
    def quality(self) -> list[Quality]:
        """Return live quality by task and arm."""
        with self.database.read() as connection:
            return quality.read_quality(connection)

    def lift(self, base: BaseId) -> Lift:
        """Return the summed paired lift."""
        with self.database.read() as connection:
            return quality.read_lift(connection, base)

    def purge_answers(self, *, before: datetime) -> int:
        """Delete old answers."""
        with self.database.write() as connection:
            return quality.purge_answers(connection, before, PURGED_AT_ONCE)

    def ping(self) -> None:
        """Check that the store can be read and has this program's schema."""
        check_version(self.database)

    def close(self) -> None:
        """Release all connections."""
        self.database.close()
