"""Locks on users' rows, and the erasure of a user.

The row lock serialises all that gives out sequence numbers, matches answers or erases. Of an erased user there
remains only the keyed hash of the id, the raised epoch, the time, and where each partition of theirs ended.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, exists, select

from oppu.privacy import UserHash
from oppu.store.audit import append
from oppu.store.database import chunks, insert_missing, lock_bases, upsert
from oppu.store.records import AdapterLogEntry, Outcome
from oppu.store.schema import adapters, answers, erasures, outbox, users
from oppu.values import FIRST_EPOCH, Partition, UserId


@dataclass(frozen=True, slots=True)
class LockedUser:
    """A user's row as it stands under our lock."""

    epoch: int
    last_seq: int


@dataclass(frozen=True, slots=True)
class Erasure:
    """What is kept of an erasure; ``end_offsets`` by cluster, topic and partition index (as text)."""

    epoch: int
    erased_at: datetime
    end_offsets: Mapping[str, Mapping[str, Mapping[str, int]]]

    def covers(self, cluster_id: str, partition: Partition, offset: int) -> bool:
        """Say whether a record lies before the erasure."""
        ends = self.end_offsets.get(cluster_id, {}).get(partition.topic, {})
        return offset < ends.get(str(partition.index), 0)


def lock_users(connection: Connection, user_ids: Iterable[UserId]) -> dict[UserId, LockedUser]:
    """Lock users' rows until the transaction ends, creating those that are missing.

    Ids are taken in byte order, so that two transactions wait for each other in one direction only.

    Args:
        connection: In a write transaction.
        user_ids: Whom.

    Returns:
        Every user asked for.
    """
    wanted = sorted(set(user_ids))
    locked = lock_present(connection, wanted)
    missing = [user_id for user_id in wanted if user_id not in locked]
    while missing:  # more than once only where an erasure deletes a row while we wait for its lock
        insert_missing(
            connection,
            users,
            ({"user_id": user_id, "epoch": FIRST_EPOCH, "last_seq": 0} for user_id in missing),
        )
        locked |= lock_present(connection, missing)
        missing = [user_id for user_id in missing if user_id not in locked]
    return locked


def drop_idle(connection: Connection, user_ids: Iterable[UserId]) -> None:
    """Delete the rows of locked users of whom no event and no answer is kept; an erasure's trace has their epoch."""
    kept = exists().where(answers.c.user_id == users.c.user_id)
    for some in chunks(sorted(user_ids)):
        connection.execute(delete(users).where(users.c.user_id.in_(some), users.c.last_seq == 0, ~kept))


def read_erasures(connection: Connection, user_hash: UserHash, user_ids: Iterable[UserId]) -> dict[UserId, Erasure]:
    """Return the erasures of those users who were erased. Call it after locking them, or one may be missed."""
    by_hash = {user_hash(user_id): user_id for user_id in user_ids}
    found: dict[UserId, Erasure] = {}
    for hashes in chunks(list(by_hash)):
        for row in connection.execute(select(erasures).where(erasures.c.user_hash.in_(hashes))):
            found[by_hash[row.user_hash]] = Erasure(row.epoch, row.erased_at, json.loads(row.end_offsets))
    return found


def list_erasures(connection: Connection, *, after: str, since: datetime | None, limit: int) -> dict[str, int]:
    """Return the epochs of the next erasures over the hash ``after``, not older than ``since``."""
    statement = select(erasures.c.user_hash, erasures.c.epoch).where(erasures.c.user_hash > after)
    if since is not None:
        statement = statement.where(erasures.c.erased_at >= since)
    rows = connection.execute(statement.order_by(erasures.c.user_hash).limit(limit))
    return {row.user_hash: row.epoch for row in rows}


def erase_user(
    connection: Connection,
    user_hash: UserHash,
    user_id: UserId,
    *,
    ends: Mapping[str, Mapping[Partition, int]],
    now: datetime,
) -> bool:
    """Delete a user's rows and keep a trace that refuses older records; false for an unknown user.

    An unknown user's trace is kept as well: records of theirs may still be waiting in Kafka.

    Args:
        connection: In a write transaction.
        user_hash: Hashes the id.
        user_id: Whom.
        ends: End offset of each partition, by cluster id.
        now: Time of the erasure.

    Returns:
        Whether there was anything of this user.
    """
    lock_bases(connection)  # before any row: a base that is being registered counts on the users it has read
    user = lock_users(connection, [user_id])[user_id]
    before = read_erasures(connection, user_hash, [user_id]).get(user_id)
    row = {
        "epoch": max(user.epoch, before.epoch if before else 0) + 1,
        "erased_at": now,
        "end_offsets": json.dumps(_merge(before.end_offsets if before else {}, ends)),
    }
    statement = upsert(connection, erasures).values(user_hash=user_hash(user_id), **row)
    connection.execute(statement.on_conflict_do_update(index_elements=erasures.primary_key.columns, set_=row))
    _log(connection, user_hash, user_id, now)
    asked_only = connection.execute(delete(answers).where(answers.c.user_id == user_id)).rowcount > 0
    connection.execute(delete(users).where(users.c.user_id == user_id))  # cascades to all rows of the user
    connection.execute(delete(outbox).where(outbox.c.key == user_id.encode()))  # unsent dead letters hold text
    return user.last_seq > 0 or asked_only


def _log(connection: Connection, user_hash: UserHash, user_id: UserId, now: datetime) -> None:
    tried = select(adapters.c.base, adapters.c.head_version).where(adapters.c.user_id == user_id, adapters.c.token > 0)
    for row in connection.execute(tried).all():
        entry = AdapterLogEntry(
            user=user_hash(user_id),
            base=row.base,
            at=now,
            outcome=Outcome.ERASED,
            version=None,
            parent=row.head_version,
            reason="",
            metrics={},
        )
        append(connection, entry)


def lock_present(
    connection: Connection, user_ids: Iterable[UserId], *, skip_locked: bool = False
) -> dict[UserId, LockedUser]:
    """Lock the rows that there are until the transaction ends, in byte order; return those.

    With ``skip_locked`` rows that others hold are left out instead of waited for.
    """
    locked: dict[UserId, LockedUser] = {}
    for some in chunks(sorted(user_ids)):
        rows = connection.execute(
            select(users.c.user_id, users.c.epoch, users.c.last_seq)
            .where(users.c.user_id.in_(some))
            .order_by(users.c.user_id)
            .with_for_update(key_share=True, skip_locked=skip_locked)
        )
        locked |= {row.user_id: LockedUser(row.epoch, row.last_seq) for row in rows}
    return locked


def _merge(
    old: Mapping[str, Mapping[str, Mapping[str, int]]], new: Mapping[str, Mapping[Partition, int]]
) -> dict[str, dict[str, dict[str, int]]]:
    merged = {cluster: {topic: dict(ends) for topic, ends in topics.items()} for cluster, topics in old.items()}
    for cluster, partitions in new.items():
        for partition, end in partitions.items():
            ends = merged.setdefault(cluster, {}).setdefault(partition.topic, {})
            ends[str(partition.index)] = max(end, ends.get(str(partition.index), 0))
    return merged
