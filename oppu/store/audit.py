"""The append-only adapter log: what was done to whose adapter, when and why. Users appear as keyed hashes."""

import json

from sqlalchemy import Connection, insert, select

from oppu.store.records import AdapterLogEntry, Outcome
from oppu.store.schema import adapter_log
from oppu.values import BaseId


def append(connection: Connection, entry: AdapterLogEntry) -> None:
    """Add one line."""
    connection.execute(
        insert(adapter_log).values(
            user_hash=entry.user,
            base=entry.base,
            at=entry.at,
            outcome=entry.outcome.value,
            version=entry.version,
            parent=entry.parent,
            reason=entry.reason,
            metrics=json.dumps(dict(entry.metrics)),
        )
    )


def newest(connection: Connection, base: BaseId, user: str, limit: int) -> list[AdapterLogEntry]:
    """Return the newest lines of one user (keyed hash), newest first."""
    rows = connection.execute(
        select(adapter_log)
        .where(adapter_log.c.user_hash == user, adapter_log.c.base == base)
        .order_by(adapter_log.c.id.desc())
        .limit(limit)
    )
    return [
        AdapterLogEntry(
            user=row.user_hash,
            base=row.base,
            at=row.at,
            outcome=Outcome(row.outcome),
            version=row.version,
            parent=row.parent,
            reason=row.reason,
            metrics=json.loads(row.metrics),
        )
        for row in rows
    ]
