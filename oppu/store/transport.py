"""Where ingest stands in Kafka, and the records that wait to be sent there.

Invariant: ``next_offset`` moves only from the value the caller read, so a worker that lost its partition writes
nothing. Outbox rows leave only after their record was acknowledged.
"""

import base64
import json
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, delete, func, insert, literal, or_, select, update

from oppu.errors import OffsetConflict
from oppu.store.database import chunks, upsert
from oppu.store.records import OffsetAdvance, OutboxRow, StoredOffset
from oppu.store.schema import offsets, outbox
from oppu.values import Headers, OutRecord, Partition

READ_BYTES = 8 * 2**20
"""Keys, values and packed headers of one read of the outbox: not a thousand records of a MiB at once."""


def read_offsets(connection: Connection, cluster_id: str, topics: Sequence[str]) -> dict[Partition, StoredOffset]:
    """Return the stored offsets of some topics."""
    rows = connection.execute(select(offsets).where(offsets.c.cluster_id == cluster_id, offsets.c.topic.in_(topics)))
    return {Partition(row.topic, row.partition): StoredOffset(row.next_offset, row.topic_id) for row in rows}


def advance_offsets(connection: Connection, cluster_id: str, advances: Iterable[OffsetAdvance]) -> None:
    """Move offsets, each only from its expected value.

    Args:
        connection: In a write transaction.
        cluster_id: Whose offsets.
        advances: What to move.

    Raises:
        OffsetConflict: One of them stood elsewhere, or belongs to another topic of that name.
    """
    for advance in sorted(advances, key=lambda advance: advance.partition):  # one lock order for all workers
        move = _insert if advance.expected is None else _swap
        if not move(connection, cluster_id, advance):
            raise OffsetConflict(
                f"offset of {advance.partition.topic}[{advance.partition.index}] is not {advance.expected} any more"
            )


def adopt_offset(connection: Connection, cluster_id: str, partition: Partition, stored: StoredOffset) -> None:
    """Set an offset and its topic's identity, whatever stood there."""
    row = {"next_offset": stored.next_offset, "topic_id": stored.topic_id}
    statement = upsert(connection, offsets).values(
        cluster_id=cluster_id, topic=partition.topic, partition=partition.index, **row
    )
    connection.execute(statement.on_conflict_do_update(index_elements=offsets.primary_key.columns, set_=row))


def enqueue(connection: Connection, records: Sequence[OutRecord]) -> None:
    """Put records into the outbox, in order."""
    rows = [
        {
            "topic": record.topic,
            "key": record.key,
            "value": record.value,
            "headers": _pack_headers(record.headers),
        }
        for record in records
    ]
    if rows:
        connection.execute(insert(outbox), rows)


def read_outbox(connection: Connection, limit: int, after: int) -> list[OutboxRow]:
    """Return the oldest rows after an id, as many as ``READ_BYTES`` allow, at least one."""
    parts = (outbox.c.key, outbox.c.value, outbox.c.headers)
    size = sum((func.coalesce(func.length(part), 0) for part in parts), literal(0))
    sizes = select(outbox.c.id, size).where(outbox.c.id > after).order_by(outbox.c.id).limit(limit)
    last, room = after, READ_BYTES
    for id_, size_bytes in connection.execute(sizes).all():
        if last != after and size_bytes > room:
            break
        last, room = id_, room - size_bytes
    rows = connection.execute(select(outbox).where(outbox.c.id > after, outbox.c.id <= last).order_by(outbox.c.id))
    return [OutboxRow(row.id, OutRecord(row.topic, row.key, row.value, _unpack_headers(row.headers))) for row in rows]


def delete_outbox(connection: Connection, ids: Sequence[int]) -> None:
    """Remove rows; those already gone do not matter."""
    for some in chunks(ids):
        connection.execute(delete(outbox).where(outbox.c.id.in_(some)))


def _insert(connection: Connection, cluster_id: str, advance: OffsetAdvance) -> bool:
    statement = upsert(connection, offsets).values(
        cluster_id=cluster_id,
        topic=advance.partition.topic,
        partition=advance.partition.index,
        next_offset=advance.next_offset,
        topic_id=advance.topic_id,
    )
    # Without the option PostgreSQL's driver does not say how many rows an INSERT wrote.
    done = connection.execute(statement.on_conflict_do_nothing(), execution_options={"preserve_rowcount": True})
    return bool(done.rowcount == 1)


def _swap(connection: Connection, cluster_id: str, advance: OffsetAdvance) -> bool:
    statement = update(offsets).where(
        offsets.c.cluster_id == cluster_id,
        offsets.c.topic == advance.partition.topic,
        offsets.c.partition == advance.partition.index,
        offsets.c.next_offset == advance.expected,
    )
    if advance.topic_id is None:
        statement = statement.values(next_offset=advance.next_offset)
    else:
        same_topic = or_(offsets.c.topic_id.is_(None), offsets.c.topic_id == advance.topic_id)
        statement = statement.where(same_topic).values(next_offset=advance.next_offset, topic_id=advance.topic_id)
    return connection.execute(statement).rowcount == 1


def _pack_headers(headers: Headers) -> bytes:
    return json.dumps([[name, base64.b64encode(value).decode()] for name, value in headers]).encode()


def _unpack_headers(packed: bytes) -> Headers:
    return tuple((name, base64.b64decode(value)) for name, value in json.loads(packed))
