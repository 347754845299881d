"""The first schema: history, offsets, outbox, adapters, quality, erasures."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_SERIAL = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create all tables."""
    _history()
    _answers()
    _transport()
    _adapters()
    _versions()
    _audit()


def downgrade() -> None:
    """Drop all tables."""
    for name in (
        "erasures",
        "adapter_log",
        "lifts",
        "versions",
        "adapters",
        "bases",
        "outbox",
        "offsets",
        "answers",
        "events",
        "users",
    ):
        op.drop_table(name)


def _blob(name: str, *, optional: bool = False) -> "sa.Column[bytes]":
    return sa.Column(name, sa.LargeBinary, nullable=optional)


def _number(name: str, *, optional: bool = False, default: str | None = None) -> "sa.Column[int]":
    return sa.Column(name, sa.BigInteger, nullable=optional, server_default=default, autoincrement=False)


def _small(name: str) -> "sa.Column[int]":
    return sa.Column(name, sa.Integer, nullable=False, server_default="0")


def _owned(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["user_id"], ["users.user_id"], name=f"fk_{table}_users", ondelete="CASCADE")


def _of_adapter(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["user_id", "base"],
        ["adapters.user_id", "adapters.base"],
        name=f"fk_{table}_adapters",
        ondelete="CASCADE",
    )


def _partial(name: str, table: str, columns: list[str | sa.TextClause], condition: str) -> None:
    where = sa.text(condition)
    op.create_index(name, table, columns, sqlite_where=where, postgresql_where=where)


def _history() -> None:
    op.create_table(
        "users",
        _blob("user_id"),
        _number("epoch"),
        _number("last_seq"),
        _number("last_recorded_at", optional=True),
        sa.PrimaryKeyConstraint("user_id", name="pk_users"),
    )
    op.create_table(
        "events",
        _blob("user_id"),
        _number("seq"),
        _blob("event_id"),
        _blob("task"),
        _number("occurred_at"),
        _number("recorded_at"),
        _blob("input"),
        _blob("output"),
        _blob("choices", optional=True),
        _blob("in_reply_to", optional=True),
        _blob("digest"),
        _blob("embedder"),
        _blob("embedding"),
        sa.PrimaryKeyConstraint("user_id", "seq", name="pk_events"),
        sa.UniqueConstraint("user_id", "event_id", name="uq_events_user_id_event_id"),
        _owned("events"),
    )
    _partial("ix_events_in_reply_to", "events", ["user_id", "in_reply_to"], "in_reply_to IS NOT NULL")


def _answers() -> None:
    op.create_table(
        "answers",
        _blob("user_id"),
        _blob("request_id"),
        _blob("task"),
        _blob("arm"),
        _blob("output"),
        _number("answered_at"),
        _number("matched_seq", optional=True),
        _small("correct"),
        sa.PrimaryKeyConstraint("user_id", "request_id", name="pk_answers"),
        _owned("answers"),
    )
    op.create_index("ix_answers_answered_at", "answers", ["answered_at"])


def _transport() -> None:
    op.create_table(
        "offsets",
        _blob("cluster_id"),
        _blob("topic"),
        sa.Column("partition", sa.Integer, nullable=False, autoincrement=False),
        _number("next_offset"),
        _blob("topic_id", optional=True),
        sa.PrimaryKeyConstraint("cluster_id", "topic", "partition", name="pk_offsets"),
    )
    op.create_table(
        "outbox",
        sa.Column("id", _SERIAL, primary_key=True),
        _blob("topic"),
        _blob("key", optional=True),
        _blob("value", optional=True),
        _blob("headers"),
        sqlite_autoincrement=True,
    )


def _adapters() -> None:
    op.create_table(
        "bases",
        _blob("base"),
        sa.Column("number", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("base", name="pk_bases"),
        sa.UniqueConstraint("number", name="uq_bases_number"),
    )
    op.create_table(
        "adapters",
        _blob("user_id"),
        _blob("base"),
        _number("epoch"),
        _number("pending"),
        _number("considered_through", default="0"),
        _number("last_recorded_at"),
        _number("head_version", optional=True),
        _number("head_parent", optional=True),
        _number("trained_through", default="0"),
        _number("next_version", default="1"),
        _small("failures"),
        _number("retry_at", optional=True),
        _small("quarantined"),
        _number("held_through", optional=True),
        _number("token", default="0"),
        _blob("holder", optional=True),
        _number("expires_at", optional=True),
        _small("attempts"),
        sa.PrimaryKeyConstraint("user_id", "base", name="pk_adapters"),
        _owned("adapters"),
        sa.ForeignKeyConstraint(["base"], ["bases.base"], name="fk_adapters_bases"),
    )
    _partial("ix_adapters_due", "adapters", ["base", sa.text("pending DESC"), "user_id"], "quarantined = 0")
    _partial("ix_adapters_attempted", "adapters", ["base", "user_id"], "token > 0")


def _versions() -> None:
    op.create_table(
        "versions",
        _blob("user_id"),
        _blob("base"),
        _number("version"),
        _number("parent", optional=True),
        _number("token"),
        _number("trained_through"),
        _number("considered_through"),
        _blob("path"),
        _blob("digest"),
        _blob("metrics"),
        _number("published_at"),
        sa.PrimaryKeyConstraint("user_id", "base", "version", name="pk_versions"),
        _of_adapter("versions"),
    )
    op.create_table(
        "lifts",
        _blob("user_id"),
        _blob("base"),
        _number("through"),
        _number("events"),
        sa.Column("loss_live", sa.Double, nullable=False),
        sa.Column("loss_none", sa.Double, nullable=False),
        _number("correct_live"),
        _number("correct_none"),
        _number("scored_at"),
        sa.PrimaryKeyConstraint("user_id", "base", "through", name="pk_lifts"),
        _of_adapter("lifts"),
    )


def _audit() -> None:
    op.create_table(
        "adapter_log",
        sa.Column("id", _SERIAL, primary_key=True),
        _blob("user_hash"),
        _blob("base"),
        _number("at"),
        _blob("outcome"),
        _number("version", optional=True),
        _number("parent", optional=True),
        _blob("reason"),
        _blob("metrics"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_adapter_log_user", "adapter_log", ["user_hash", "base", "id"])
    op.create_table(
        "erasures",
        _blob("user_hash"),
        _number("epoch"),
        _number("erased_at"),
        _blob("end_offsets"),
        sa.PrimaryKeyConstraint("user_hash", name="pk_erasures"),
    )
