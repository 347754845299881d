"""The history store's tables.

Texts and ids are UTF-8 bytes, so that any Unicode (NUL included) survives and compares bytewise on every database;
times are whole microseconds since 1970 UTC. A user's row owns all others of that user by cascading foreign keys,
hence deleting it erases them. The migrations create these tables; a test holds the two together.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    TypeDecorator,
    UniqueConstraint,
    text,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Text8(TypeDecorator[str]):
    """A text as its UTF-8 bytes: no collation, no normalisation, no forbidden character."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> bytes | None:
        """Encode."""
        return None if value is None else value.encode()

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        """Decode."""
        return None if value is None else bytes(value).decode()


class Micros(TypeDecorator[datetime]):
    """An aware time as microseconds since 1970 UTC; a naive one is refused."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Count the microseconds."""
        return None if value is None else to_micros(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Return the aware UTC time."""
        return None if value is None else from_micros(value)


def to_micros(time: datetime) -> int:
    """Return microseconds since 1970 UTC of an aware time."""
    return (time - _EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """Return the aware UTC time of microseconds since 1970."""
    return _EPOCH + micros * _MICROSECOND


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

_Serial = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers only an INTEGER PRIMARY KEY by itself

users = Table(
    "users",
    metadata,
    Column("user_id", Text8, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("last_seq", BigInteger, nullable=False),
    Column("last_recorded_at", Micros),
)

events = Table(
    "events",
    metadata,
    Column("user_id", Text8, ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("event_id", Text8, nullable=False),
    Column("task", Text8, nullable=False),
    Column("occurred_at", Micros, nullable=False),
    Column("recorded_at", Micros, nullable=False),
    Column("input", Text8, nullable=False),
    Column("output", Text8, nullable=False),
    Column("choices", Text8),
    Column("in_reply_to", Text8),
    Column("digest", LargeBinary, nullable=False),
    Column("embedder", Text8, nullable=False),
    Column("embedding", LargeBinary, nullable=False),
    UniqueConstraint("user_id", "event_id"),
)
Index(
    "ix_events_in_reply_to",
    events.c.user_id,
    events.c.in_reply_to,
    sqlite_where=text("in_reply_to IS NOT NULL"),
    postgresql_where=text("in_reply_to IS NOT NULL"),
)

answers = Table(
    "answers",
    metadata,
    Column("user_id", Text8, ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True),
    Column("request_id", Text8, primary_key=True),
    Column("task", Text8, nullable=False),
    Column("arm", Text8, nullable=False),
    Column("output", Text8, nullable=False),
    Column("answered_at", Micros, nullable=False),
    Column("matched_seq", BigInteger),
    Column("correct", Integer, nullable=False, server_default="0"),
)
Index("ix_answers_answered_at", answers.c.answered_at)

offsets = Table(
    "offsets",
    metadata,
    Column("cluster_id", Text8, primary_key=True),
    Column("topic", Text8, primary_key=True),
    Column("partition", Integer, primary_key=True, autoincrement=False),
    Column("next_offset", BigInteger, nullable=False),
    Column("topic_id", Text8),
)

# AUTOINCREMENT: a deleted row's id must never come back, or a late acknowledgement would delete another record.
outbox = Table(
    "outbox",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("topic", Text8, nullable=False),
    Column("key", LargeBinary),
    Column("value", LargeBinary),
    Column("headers", LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)

bases = Table(
    "bases",
    metadata,
    Column("base", Text8, primary_key=True),
    Column("number", Integer, nullable=False, unique=True),
)

# considered_through + pending is always the user's last_seq, so that nothing here needs the users table.
adapters = Table(
    "adapters",
    metadata,
    Column("user_id", Text8, ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True),
    Column("base", Text8, ForeignKey("bases.base"), primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("pending", BigInteger, nullable=False),
    Column("considered_through", BigInteger, nullable=False, server_default="0"),
    Column("last_recorded_at", Micros, nullable=False),
    Column("head_version", BigInteger),
    Column("head_parent", BigInteger),
    Column("trained_through", BigInteger, nullable=False, server_default="0"),
    Column("next_version", BigInteger, nullable=False, server_default="1"),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("retry_at", Micros),
    Column("quarantined", Integer, nullable=False, server_default="0"),
    Column("held_through", BigInteger),
    Column("token", BigInteger, nullable=False, server_default="0"),
    Column("holder", Text8),
    Column("expires_at", Micros),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("earned", Double, nullable=False, server_default="0"),
)
NOT_QUARANTINED = text("adapters.quarantined = 0")
"""Word for word what the due index says, or SQLite would not use that index."""
Index(
    "ix_adapters_due",
    adapters.c.base,
    adapters.c.pending.desc(),
    adapters.c.user_id,
    sqlite_where=text("quarantined = 0"),
    postgresql_where=text("quarantined = 0"),
)
ATTEMPTED = text("adapters.token > 0")
"""Word for word what the index of attempted users says."""
Index(
    "ix_adapters_attempted",
    adapters.c.base,
    adapters.c.user_id,
    sqlite_where=text("token > 0"),
    postgresql_where=text("token > 0"),
)

versions = Table(
    "versions",
    metadata,
    Column("user_id", Text8, primary_key=True),
    Column("base", Text8, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("parent", BigInteger),
    Column("token", BigInteger, nullable=False),
    Column("trained_through", BigInteger, nullable=False),
    Column("considered_through", BigInteger, nullable=False),
    Column("path", Text8, nullable=False),
    Column("digest", Text8, nullable=False),
    Column("metrics", Text8, nullable=False),
    Column("published_at", Micros, nullable=False),
    ForeignKeyConstraint(["user_id", "base"], ["adapters.user_id", "adapters.base"], ondelete="CASCADE"),
)

lifts = Table(
    "lifts",
    metadata,
    Column("user_id", Text8, primary_key=True),
    Column("base", Text8, primary_key=True),
    Column("through", BigInteger, primary_key=True, autoincrement=False),
    Column("events", BigInteger, nullable=False),
    Column("loss_live", Double, nullable=False),
    Column("loss_none", Double, nullable=False),
    Column("correct_live", BigInteger, nullable=False),
    Column("correct_none", BigInteger, nullable=False),
    Column("scored_at", Micros, nullable=False),
    ForeignKeyConstraint(["user_id", "base"], ["adapters.user_id", "adapters.base"], ondelete="CASCADE"),
)

# Append-only and outlives an erasure: it holds the keyed hash of a user id, never the id.
adapter_log = Table(
    "adapter_log",
    metadata,
    Column("id", _Serial, primary_key=True),
    Column("user_hash", Text8, nullable=False),
    Column("base", Text8, nullable=False),
    Column("at", Micros, nullable=False),
    Column("outcome", Text8, nullable=False),
    Column("version", BigInteger),
    Column("parent", BigInteger),
    Column("reason", Text8, nullable=False),
    Column("metrics", Text8, nullable=False),
    sqlite_autoincrement=True,
)
Index("ix_adapter_log_user", adapter_log.c.user_hash, adapter_log.c.base, adapter_log.c.id)

erasures = Table(
    "erasures",
    metadata,
    Column("user_hash", Text8, primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    Column("erased_at", Micros, nullable=False),
    Column("end_offsets", Text8, nullable=False),
)
