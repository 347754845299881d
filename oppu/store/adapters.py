"""Adapters as an operator sees them: status, versions, rollback, release."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from oppu.errors import ConfigError
from oppu.privacy import UserHash
from oppu.store.audit import append
from oppu.store.claims import NO_CLAIM, adapter_row, backs_off, change_adapter, is_claimed
from oppu.store.history import head_of
from oppu.store.records import AdapterLogEntry, AdapterStatus, Candidate, ClaimState, Outcome
from oppu.store.schema import ATTEMPTED, adapters, versions
from oppu.values import BaseId, Head, UserId


def read_status(connection: Connection, base: BaseId, user_id: UserId, moment: int) -> AdapterStatus | None:
    """Return one user's training state at the store's ``moment`` (microseconds)."""
    row = connection.execute(select(adapters).where(adapters.c.user_id == user_id, adapters.c.base == base)).first()
    return None if row is None else _status(row, moment)


def list_statuses(
    connection: Connection, base: BaseId, moment: int, *, limit: int, after: UserId | None
) -> list[AdapterStatus]:
    """Return the users that were ever claimed or rolled back, in id order."""
    statement = select(adapters).where(adapters.c.base == base, ATTEMPTED).order_by(adapters.c.user_id).limit(limit)
    if after is not None:
        statement = statement.where(adapters.c.user_id > after)
    return [_status(row, moment) for row in connection.execute(statement)]


def read_versions(connection: Connection, base: BaseId, user_id: UserId) -> list[Candidate]:
    """Return every version published since the user's last erasure, oldest first."""
    rows = connection.execute(
        select(versions).where(versions.c.user_id == user_id, versions.c.base == base).order_by(versions.c.version)
    )
    return [
        Candidate(
            version=row.version,
            parent=row.parent,
            trained_through=row.trained_through,
            considered_through=row.considered_through,
            path=row.path,
            digest=row.digest,
            metrics=json.loads(row.metrics),
        )
        for row in rows
    ]


def roll_back(
    connection: Connection,
    user_hash: UserHash,
    who: tuple[BaseId, UserId],
    *,
    to: int | None,
    reason: str,
    now: datetime,
) -> Head | None:
    """Move the head back, revoke the claim, and hold training until there is new evidence.

    Args:
        connection: In a write transaction.
        user_hash: Hashes the id for the log.
        who: Base and user.
        to: The version to serve; ``None`` for none.
        reason: For the log.
        now: Time of the decision.

    Returns:
        The new head.

    Raises:
        ConfigError: The user is unknown or has no such version.
    """
    base, user_id = who
    row = adapter_row(connection, base, user_id)
    if row is None:
        raise ConfigError("user: no such user in the store")
    target = next((v for v in read_versions(connection, base, user_id) if v.version == to), None)
    if to is not None and target is None:
        raise ConfigError(f"version: this user has no version {to}")
    columns: dict[str, Any] = {
        "head_version": to,
        "head_parent": target.parent if target else None,
        "trained_through": target.trained_through if target else 0,
        "held_through": row.considered_through + row.pending,
        "earned": 0.0,  # by versions that are no longer served
        "token": row.token + 1,  # whoever trains this user now may not publish over the rollback
    }
    change_adapter(connection, base, user_id, {**columns, **NO_CLAIM})
    who_hash = user_hash(user_id)
    append(
        connection,
        AdapterLogEntry(who_hash, base, now, Outcome.ROLLED_BACK, to, row.head_version, reason, {}),
    )
    return None if target is None else Head(target.version, target.parent, target.trained_through, row.epoch)


def release(connection: Connection, user_hash: UserHash, base: BaseId, user_id: UserId, *, now: datetime) -> bool:
    """Lift hold, quarantine and back-off; a claim in progress goes on."""
    row = adapter_row(connection, base, user_id)
    if row is None:
        return False
    columns: Mapping[str, Any] = {
        "held_through": None,
        "quarantined": 0,
        "failures": 0,
        "retry_at": None,
        "attempts": 0,
    }
    change_adapter(connection, base, user_id, columns)
    head = row.head_version
    append(
        connection,
        AdapterLogEntry(user_hash(user_id), base, now, Outcome.RELEASED, head, row.head_parent, "", {}),
    )
    return True


def _status(row: Any, moment: int) -> AdapterStatus:
    return AdapterStatus(
        user_id=row.user_id,
        base=row.base,
        head=head_of(row),
        considered_through=row.considered_through,
        last_seq=row.considered_through + row.pending,
        failures=row.failures,
        state=_state(row, moment),
        retry_at=row.retry_at,
    )


def _state(row: Any, moment: int) -> ClaimState:
    if is_claimed(row, moment):
        return ClaimState.CLAIMED
    if row.quarantined:
        return ClaimState.QUARANTINED
    if row.held_through is not None and row.considered_through + row.pending <= row.held_through:
        return ClaimState.HELD
    if backs_off(row, moment):
        return ClaimState.BACKING_OFF
    return ClaimState.FREE
