"""Who is due for training, who trains whom, and how an attempt ends.

Safety comes from the token: it rises with every claim, and whatever ends an attempt writes only under it and in
its epoch. Expiry, by the store's clock, merely lets others take over sooner. Each claim takes a version number of
its own, so that two claimants never write files under one path.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, delete, func, insert, literal, or_, select, update

from oppu.privacy import UserHash
from oppu.settings import LONGEST_CLAIM_SECONDS, LONGEST_RETRY_SECONDS
from oppu.store.audit import append
from oppu.store.database import Database, insert_missing, lock_bases, upsert
from oppu.store.history import head_of
from oppu.store.records import AdapterLogEntry, Candidate, Claim, DueUser, Lift, Outcome
from oppu.store.schema import (
    NOT_QUARANTINED,
    Text8,
    adapters,
    bases,
    from_micros,
    lifts,
    users,
    versions,
)
from oppu.values import BaseId, UserId

UNHELD: Mapping[str, Any] = {"holder": None, "expires_at": None}
"""Columns of a user whom nobody holds; the token stays, so that the next one is higher."""
NO_CLAIM: Mapping[str, Any] = {**UNHELD, "attempts": 0}
"""Columns of a claim that was concluded: whatever became of it, the process outlived it."""

_LONGEST_CLAIM, _LONGEST_RETRY = timedelta(seconds=LONGEST_CLAIM_SECONDS), timedelta(seconds=LONGEST_RETRY_SECONDS)
LAST_SEQ = adapters.c.considered_through + adapters.c.pending


def register_base(connection: Connection, base: BaseId) -> None:
    """Give every user an adapters row for a base, unless the base is known already."""
    known = select(bases.c.base).where(bases.c.base == base)
    if connection.execute(known).first() is not None:
        return
    lock_bases(connection, exclusive=True)  # no ingest may number events between the two statements
    number = select(func.count() + 1).select_from(bases).scalar_subquery()
    connection.execute(upsert(connection, bases).values(base=base, number=number).on_conflict_do_nothing())
    everyone = select(
        users.c.user_id, literal(base, Text8), users.c.epoch, users.c.last_seq, users.c.last_recorded_at
    ).where(users.c.last_seq > 0)
    columns = ["user_id", "base", "epoch", "pending", "last_recorded_at"]
    connection.execute(upsert(connection, adapters).from_select(columns, everyone).on_conflict_do_nothing())


def list_bases(connection: Connection) -> list[BaseId]:
    """Return the registered bases, oldest first."""
    return [BaseId(name) for name in connection.execute(select(bases.c.base).order_by(bases.c.number)).scalars()]


def due_statement(base: BaseId, *, moment: int, now: datetime, min_pending: int) -> Select[Any]:
    """Select due users, most pending first, as a range of the due index.

    Args:
        base: Whose rows.
        moment: The store's clock in microseconds, for claims.
        now: The caller's time, for back-off.
        min_pending: Least number of new events; after a rollback it counts from there.

    Returns:
        The statement, unlimited.
    """
    held = adapters.c.held_through
    return (
        select(adapters.c.user_id, adapters.c.pending, adapters.c.last_recorded_at)
        .where(
            adapters.c.base == base,
            NOT_QUARANTINED,
            adapters.c.pending >= min_pending,
            or_(adapters.c.holder.is_(None), _over(adapters.c.expires_at, from_micros(moment), _LONGEST_CLAIM)),
            or_(adapters.c.retry_at.is_(None), _over(adapters.c.retry_at, now, _LONGEST_RETRY)),
            or_(held.is_(None), LAST_SEQ - held >= min_pending),
        )
        .order_by(adapters.c.pending.desc(), adapters.c.user_id)
    )


def due(connection: Connection, statement: Select[Any], limit: int) -> list[DueUser]:
    """Run a due statement."""
    rows = connection.execute(statement.limit(limit))
    return [DueUser(row.user_id, row.pending, row.last_recorded_at) for row in rows]


def claim(
    connection: Connection,
    database: Database,
    who: tuple[BaseId, UserId],
    *,
    holder: str,
    ttl_seconds: float,
) -> Claim | None:
    """Take a user whom nobody holds; ``None`` where that is not so, or the user may not be trained now."""
    base, user_id = who
    row = connection.execute(_row(base, user_id).with_for_update(skip_locked=True)).first()
    if row is None:
        return None
    moment = database.now(connection)  # after the lock, so that waiting for it is not counted in our favour
    held = row.held_through is not None and row.considered_through + row.pending <= row.held_through
    if row.quarantined or held or is_claimed(row, moment):
        return None
    expires_at = from_micros(moment + round(ttl_seconds * 1_000_000))
    taken = {
        "token": row.token + 1,
        "next_version": row.next_version + 1,
        "attempts": row.attempts + 1,
        "holder": holder,
        "expires_at": expires_at,
    }
    change_adapter(connection, base, user_id, taken)
    return Claim(
        user_id=user_id,
        base=base,
        token=row.token + 1,
        epoch=row.epoch,
        head=head_of(row),
        considered_through=row.considered_through,
        last_seq=row.considered_through + row.pending,
        next_version=row.next_version,
        expires_at=expires_at,
        attempts=row.attempts + 1,
    )


def is_claimed(row: Any, moment: int) -> bool:
    """Say whether somebody holds an adapters row at the store's ``moment`` (microseconds)."""
    now = from_micros(moment)
    return row.holder is not None and now < row.expires_at <= now + _LONGEST_CLAIM


def backs_off(row: Any, moment: int) -> bool:
    """Say whether an adapters row waits after a failure at ``moment`` (microseconds)."""
    now = from_micros(moment)
    return row.retry_at is not None and now < row.retry_at <= now + _LONGEST_RETRY


def renew(connection: Connection, database: Database, held: Claim, ttl_seconds: float) -> bool:
    """Extend a claim from now; false where it is no longer the current one."""
    if _current(connection, held) is None:
        return False
    expires_at = from_micros(database.now(connection) + round(ttl_seconds * 1_000_000))
    change_adapter(connection, held.base, held.user_id, {"expires_at": expires_at})
    return True


def give_back(connection: Connection, held: Claim) -> bool:
    """Release a claim as if it had never been made; where it has moved on, take back its attempt only, and be false.

    Attempts count those that a process may have died in, and whoever gives back is alive.
    """
    row = adapter_row(connection, held.base, held.user_id)
    if row is None or row.epoch != held.epoch:
        return False
    current = row.holder is not None and row.token == held.token
    if current or row.token > held.token:
        attempts = max(row.attempts - 1, 0)  # an operator's release may have set it to zero meanwhile
        columns = {**UNHELD, "attempts": attempts} if current else {"attempts": attempts}
        change_adapter(connection, held.base, held.user_id, columns)
    return current


def publish(connection: Connection, user_hash: UserHash, held: Claim, candidate: Candidate, now: datetime) -> bool:
    """Move the head to the candidate; false, with nothing written, where the claim or the head has moved."""
    row = _current(connection, held)
    expected = None if held.head is None else held.head.version
    if row is None or row.head_version != expected or candidate.parent != expected:
        return False
    columns = {
        "head_version": candidate.version,
        "head_parent": candidate.parent,
        "trained_through": candidate.trained_through,
        "failures": 0,
        "retry_at": None,
        "held_through": None,
        "earned": candidate.earned,
    }
    columns |= _considered(row, candidate.considered_through)
    change_adapter(connection, held.base, held.user_id, {**columns, **NO_CLAIM})
    connection.execute(insert(versions).values(**_version_row(held, candidate, now)))
    entry = AdapterLogEntry(
        user=user_hash(held.user_id),
        base=held.base,
        at=now,
        outcome=Outcome.PUBLISHED,
        version=candidate.version,
        parent=candidate.parent,
        reason="",
        metrics=candidate.metrics,
    )
    append(connection, entry)
    return True


def already_published(connection: Connection, held: Claim, candidate: Candidate) -> bool:
    """Say whether this very claim published this candidate before: its acknowledgement was lost, then."""
    of_claim = (
        select(versions.c.version)
        .join_from(
            versions,
            adapters,
            and_(versions.c.user_id == adapters.c.user_id, versions.c.base == adapters.c.base),
        )
        .where(
            versions.c.user_id == held.user_id,
            versions.c.base == held.base,
            versions.c.version == candidate.version,
            versions.c.token == held.token,
            versions.c.digest == candidate.digest,
            adapters.c.epoch == held.epoch,
        )
    )
    return connection.execute(of_claim).first() is not None


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended that published nothing."""

    outcome: Outcome
    considered_through: int
    reason: str
    at: datetime
    retry_at: datetime | None
    quarantine: bool
    metrics: Mapping[str, float]
    earned: float | None = None


def conclude(connection: Connection, user_hash: UserHash, held: Claim, ending: Ending) -> bool:
    """Release a claim with what became of it; false, with nothing written, where it is no longer current."""
    row = _current(connection, held)
    if row is None:
        return False
    columns = {
        "failures": row.failures + 1 if ending.outcome is Outcome.FAILED else 0,
        "retry_at": ending.retry_at,
        "quarantined": int(ending.quarantine),
    }
    if ending.earned is not None and ending.considered_through > row.considered_through:
        columns["earned"] = ending.earned  # with the watermark, so that no event counts twice
    columns |= _considered(row, ending.considered_through)
    change_adapter(connection, held.base, held.user_id, {**columns, **NO_CLAIM})
    entry = AdapterLogEntry(
        user=user_hash(held.user_id),
        base=held.base,
        at=ending.at,
        outcome=ending.outcome,
        version=None,
        parent=row.head_version,
        reason=ending.reason,
        metrics=ending.metrics,
    )
    append(connection, entry)
    return True


def record_lift(connection: Connection, held: Claim, lift: Lift, *, through: int, now: datetime) -> None:
    """Keep a paired score, replacing those that earlier attempts at the same events left behind."""
    row = adapter_row(connection, held.base, held.user_id)
    if row is None or row.epoch != held.epoch or row.token != held.token:
        return  # erased, or another claimant scores these events
    connection.execute(
        delete(lifts).where(
            lifts.c.user_id == held.user_id,
            lifts.c.base == held.base,
            lifts.c.through > held.considered_through,
            lifts.c.through != through,
        )
    )
    insert_missing(connection, lifts, [_lift_row(held, lift, through, now)])


def adapter_row(connection: Connection, base: BaseId, user_id: UserId) -> Any:
    """Lock and return a user's adapters row; ``None`` where there is none."""
    return connection.execute(_row(base, user_id).with_for_update()).first()


def change_adapter(connection: Connection, base: BaseId, user_id: UserId, columns: Mapping[str, Any]) -> None:
    """Write columns of a user's adapters row."""
    statement = update(adapters).where(adapters.c.user_id == user_id, adapters.c.base == base)
    connection.execute(statement.values(**columns))


def _over(until: ColumnElement[datetime], now: datetime, longest: timedelta) -> ColumnElement[bool]:
    """Say whether a time is over, or lies so far ahead that the clock which made it did."""
    return or_(until <= now, until > now + longest)


def _row(base: BaseId, user_id: UserId) -> Select[Any]:
    return select(adapters).where(adapters.c.user_id == user_id, adapters.c.base == base)


def _current(connection: Connection, held: Claim) -> Any:
    row = adapter_row(connection, held.base, held.user_id)
    if row is None or row.holder is None or row.token != held.token or row.epoch != held.epoch:
        return None
    return row


def _considered(row: Any, through: int) -> dict[str, int]:
    last_seq = row.considered_through + row.pending
    reached = max(row.considered_through, min(through, last_seq))
    return {"considered_through": reached, "pending": last_seq - reached}


def _version_row(held: Claim, candidate: Candidate, now: datetime) -> dict[str, Any]:
    return {
        "user_id": held.user_id,
        "base": held.base,
        "version": candidate.version,
        "parent": candidate.parent,
        "token": held.token,
        "trained_through": candidate.trained_through,
        "considered_through": candidate.considered_through,
        "path": candidate.path,
        "digest": candidate.digest,
        "metrics": json.dumps(dict(candidate.metrics)),
        "published_at": now,
    }


def _lift_row(held: Claim, lift: Lift, through: int, now: datetime) -> dict[str, Any]:
    return {
        "user_id": held.user_id,
        "base": held.base,
        "through": through,
        "events": lift.events,
        "loss_live": lift.loss_live,
        "loss_none": lift.loss_none,
        "correct_live": lift.correct_live,
        "correct_none": lift.correct_none,
        "scored_at": now,
    }
