"""Reads of users and their events.

Every method is one statement a chunk, so what it returns of a user was true at one moment.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import (
    BigInteger,
    Connection,
    Double,
    Select,
    case,
    cast,
    func,
    literal,
    null,
    select,
    union_all,
)

from oppu.privacy import UserHash
from oppu.store.database import asked, chunks
from oppu.store.schema import ATTEMPTED, Text8, adapters, answers, erasures, events, outbox, users
from oppu.values import BaseId, Event, Head, UserId, UserState, Vector


def read_users(
    connection: Connection, user_hash: UserHash, user_ids: Sequence[UserId], base: BaseId
) -> dict[UserId, UserState]:
    """Return epoch, last sequence and head; an erased user who did not come back has the raised epoch only."""
    found: dict[UserId, UserState] = {}
    for some in chunks(list(dict.fromkeys(user_ids))):
        by_hash = {user_hash(user_id): user_id for user_id in some}
        for row in connection.execute(union_all(_present(some, base), _erased(list(by_hash)))):
            user_id = UserId(row.user_id) if row.present else by_hash[row.user_id]
            if row.present or user_id not in found:
                found[user_id] = UserState(user_id, row.epoch, row.last_seq, head_of(row))
    return found


def head_of(row: Any) -> Head | None:
    """Return the head in a row that has the head's columns and ``epoch``."""
    if row.head_version is None:
        return None
    return Head(row.head_version, row.head_parent, row.trained_through, row.epoch, row.earned)


def read_events(
    connection: Connection, cursors: Mapping[UserId, int], *, embedder: str, limit: int
) -> dict[UserId, list[Event]]:
    """Return each user's newest events after the cursor, in sequence order; every user asked for is a key."""
    found: dict[UserId, list[Event]] = {user_id: [] for user_id in cursors}
    for some in chunks(list(cursors.items())):
        for row in connection.execute(_newest(some, limit)):
            found[UserId(row.user_id)].append(_event(row, embedder))
    for listed in found.values():
        listed.sort(key=lambda event: event.seq)
    return found


def list_users(connection: Connection, *, limit: int, after: UserId | None) -> list[UserState]:
    """Return users that have events, in id order, without heads (those are per base)."""
    statement = select(users).where(users.c.last_seq > 0).order_by(users.c.user_id).limit(limit)
    if after is not None:
        statement = statement.where(users.c.user_id > after)
    return [UserState(row.user_id, row.epoch, row.last_seq, None) for row in connection.execute(statement)]


def counts(connection: Connection) -> dict[str, int]:
    """Count what the store holds. Events are summed from the users' sequences, which have no gaps."""
    held = (adapters.c.held_through >= adapters.c.considered_through + adapters.c.pending) & ATTEMPTED
    statement = select(
        select(func.count()).select_from(users).where(users.c.last_seq > 0).scalar_subquery().label("users"),
        select(func.coalesce(func.sum(users.c.last_seq), 0)).scalar_subquery().label("events"),
        select(func.count()).select_from(outbox).scalar_subquery().label("outbox"),
        select(func.count()).select_from(answers).scalar_subquery().label("answers"),
        select(func.count(adapters.c.head_version)).where(ATTEMPTED).scalar_subquery().label("adapters"),
        select(func.count()).select_from(adapters).where(held).scalar_subquery().label("held"),
        select(func.coalesce(func.sum(adapters.c.quarantined), 0))
        .where(ATTEMPTED)
        .scalar_subquery()
        .label("quarantined"),
    )
    row = connection.execute(statement).mappings().one()
    return {str(name): int(value) for name, value in row.items()}


def _present(user_ids: Sequence[UserId], base: BaseId) -> Select[Any]:
    of_base = (adapters.c.user_id == users.c.user_id) & (adapters.c.base == base)
    return (
        select(
            literal(1).label("present"),
            users.c.user_id,
            users.c.epoch,
            users.c.last_seq,
            adapters.c.head_version,
            adapters.c.head_parent,
            adapters.c.trained_through,
            adapters.c.earned,
        )
        .join_from(users, adapters, of_base, isouter=True)
        .where(users.c.user_id.in_(user_ids))
    )


def _erased(hashes: Sequence[str]) -> Select[Any]:
    none = cast(null(), BigInteger)
    return select(
        literal(0).label("present"),
        erasures.c.user_hash,
        erasures.c.epoch,
        cast(literal(0), BigInteger),
        none.label("head_version"),
        none.label("head_parent"),
        none.label("trained_through"),
        cast(null(), Double).label("earned"),
    ).where(erasures.c.user_hash.in_(hashes))


def _newest(cursors: Sequence[tuple[UserId, int]], limit: int) -> Select[Any]:
    asked_for = asked(cursors, user_id=Text8, after=BigInteger)
    skip = users.c.last_seq - limit
    # One lower bound, so that the key's range is read from there and no further back.
    first = case((asked_for.c.after > skip, asked_for.c.after), else_=skip)
    return (
        select(
            events.c.user_id,
            events.c.seq,
            events.c.event_id,
            events.c.task,
            events.c.occurred_at,
            events.c.recorded_at,
            events.c.input,
            events.c.output,
            events.c.choices,
            events.c.in_reply_to,
            events.c.embedder,
            events.c.embedding,
        )
        .join_from(asked_for, users, users.c.user_id == asked_for.c.user_id)
        .join(events, (events.c.user_id == users.c.user_id) & (events.c.seq > first))
    )


def _event(row: Any, embedder: str) -> Event:
    return Event(
        user_id=row.user_id,
        seq=row.seq,
        event_id=row.event_id,
        task=row.task,
        occurred_at=row.occurred_at,
        recorded_at=row.recorded_at,
        input=row.input,
        output=row.output,
        choices=None if row.choices is None else tuple(json.loads(row.choices)),
        in_reply_to=row.in_reply_to,
        embedding=_vector(row.embedding) if row.embedder == embedder else None,
    )


def _vector(stored: bytes) -> Vector:
    return np.frombuffer(stored, dtype="<f2").astype(np.float32)
