"""Ingest's one transaction: offsets, events, pending counters, answers, matches, dead letters.

Invariants: a user's events are numbered without a gap under the lock on the user's row; an event id is stored once
per user; an answer is matched once, by an event of its own user, whichever of the two comes second.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Select, bindparam, insert, select, update

from oppu.privacy import UserHash
from oppu.store.database import asked, chunks, insert_missing, lock_bases, upsert
from oppu.store.erasure import Erasure, LockedUser, drop_idle, lock_users, read_erasures
from oppu.store.records import IngestBatch, IngestResult, NewAnswer, NewEvent, NewRefusal
from oppu.store.schema import Text8, adapters, answers, bases, events, users
from oppu.store.transport import advance_offsets, enqueue
from oppu.values import OutRecord, UserId

_Key = tuple[str, str]
_LONGEST_USER_BYTES = 1024
"""Of 256 characters, as many as the contract allows; a key that is longer names nobody, and fits into no index."""


@dataclass(slots=True)
class _Sorted:
    """What becomes of each event of a batch."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    conflicts: list[OutRecord] = field(default_factory=list)
    duplicates: int = 0


def write_events(connection: Connection, user_hash: UserHash, batch: IngestBatch) -> IngestResult:
    """Write a batch; see :class:`oppu.store.port.HistoryStore`.

    Args:
        connection: In a write transaction, which the caller rolls back on any error.
        user_hash: Finds users' erasures.
        batch: What to write.

    Returns:
        What became of the batch.

    Raises:
        OffsetConflict: Some offset was not the expected one.
    """
    lock_bases(connection)  # before any row, as registering a base takes it before rows
    advance_offsets(connection, batch.cluster_id, batch.offsets)
    senders = [(refusal, _sender(refusal)) for refusal in batch.refused]
    locked = lock_users(
        connection,
        [
            *(event.user_id for event in batch.events),
            *(answer.user_id for answer in batch.answers),
            *(sender for _, sender in senders if sender is not None),
        ],
    )
    erased = read_erasures(connection, user_hash, locked)
    fresh = [event for event in batch.events if not _is_erased(erased, event.user_id, batch, event)]
    served = [answer for answer in batch.answers if not _answer_is_erased(erased, batch.cluster_id, answer)]
    set_aside = tuple(r for r, sender in senders if sender is None or not _is_erased(erased, sender, batch, r))
    result = _sort(fresh, _stored_digests(connection, fresh), locked)
    if result.rows:
        connection.execute(insert(events), result.rows)
    _update_users(connection, locked, erased, result.rows)
    insert_missing(connection, answers, map(_answer_row, served))
    matched = _match(connection, result.rows, served)
    enqueue(connection, [*(refusal.letter for refusal in set_aside), *result.conflicts])
    active = {row["user_id"] for row in result.rows} | {answer.user_id for answer in served}
    drop_idle(connection, [user for user, state in locked.items() if not state.last_seq and user not in active])
    read = len(batch.events) + len(batch.answers) + len(batch.refused)
    return IngestResult(
        written=len(result.rows),
        duplicates=result.duplicates,
        conflicts=len(result.conflicts),
        erased=read - len(fresh) - len(served) - len(set_aside),
        kept=len(served),
        set_aside=set_aside,
        matched=matched,
    )


def _sender(refusal: NewRefusal) -> UserId | None:
    """Return the user whom a refused record's key names, ``None`` where it can be nobody's."""
    key = refusal.letter.key or b""
    try:
        return UserId(key.decode()) if 0 < len(key) <= _LONGEST_USER_BYTES else None
    except UnicodeDecodeError:
        return None


def _is_erased(
    erased: dict[UserId, Erasure], user_id: UserId, batch: IngestBatch, record: NewEvent | NewRefusal
) -> bool:
    erasure = erased.get(user_id)
    return erasure is not None and erasure.covers(batch.cluster_id, record.partition, record.offset)


def _answer_is_erased(erased: dict[UserId, Erasure], cluster_id: str, answer: NewAnswer) -> bool:
    """Say whether an answer lies before its user's erasure, was made of what that took away, or answers what was asked
    before it. One that does not say what it was made of goes by its time."""
    erasure = erased.get(answer.user_id)
    if erasure is None:
        return False
    records = [(answer.partition, answer.offset), *([answer.request] if answer.request is not None else [])]
    if any(erasure.covers(cluster_id, partition, offset) for partition, offset in records):
        return True
    if answer.epoch is None:
        return answer.answered_at <= erasure.erased_at
    return answer.epoch < erasure.epoch


def _stored_digests(connection: Connection, fresh: Iterable[NewEvent]) -> dict[_Key, bytes]:
    keys = list({(event.user_id, event.event_id): None for event in fresh})
    found: dict[_Key, bytes] = {}
    for some in chunks(keys):
        wanted = asked(some, user_id=Text8, event_id=Text8)
        same = (events.c.user_id == wanted.c.user_id) & (events.c.event_id == wanted.c.event_id)
        rows = connection.execute(
            select(events.c.user_id, events.c.event_id, events.c.digest).join_from(wanted, events, same)
        )
        found |= {(row.user_id, row.event_id): row.digest for row in rows}
    return found


def _sort(fresh: Iterable[NewEvent], digests: dict[_Key, bytes], locked: dict[UserId, LockedUser]) -> _Sorted:
    result = _Sorted()
    given: Counter[UserId] = Counter()
    for event in fresh:
        key = (event.user_id, event.event_id)
        stored = digests.get(key)
        if stored is None:
            digests[key] = event.digest
            given[event.user_id] += 1
            result.rows.append(_event_row(event, locked[event.user_id].last_seq + given[event.user_id]))
        elif stored == event.digest:
            result.duplicates += 1
        else:
            result.conflicts.append(event.conflict)
    return result


def _event_row(event: NewEvent, seq: int) -> dict[str, Any]:
    return {
        "user_id": event.user_id,
        "seq": seq,
        "event_id": event.event_id,
        "task": event.task,
        "occurred_at": event.occurred_at,
        "recorded_at": event.recorded_at,
        "input": event.input,
        "output": event.output,
        "choices": None if event.choices is None else json.dumps(event.choices),
        "in_reply_to": event.in_reply_to,
        "digest": event.digest,
        "embedder": event.embedder,
        "embedding": event.embedding,
    }


def _answer_row(answer: NewAnswer) -> dict[str, Any]:
    return {
        "user_id": answer.user_id,
        "request_id": answer.request_id,
        "task": answer.task,
        "arm": answer.arm,
        "output": answer.output,
        "answered_at": answer.answered_at,
    }


def _update_users(
    connection: Connection,
    locked: dict[UserId, LockedUser],
    erased: dict[UserId, Erasure],
    rows: list[dict[str, Any]],
) -> None:
    newest: dict[UserId, dict[str, Any]] = {row["user_id"]: row for row in rows}  # the last of each user
    epochs = {
        user_id: max(user.epoch, erased[user_id].epoch if user_id in erased else 0) for user_id, user in locked.items()
    }
    behind = [
        {"key": user_id, "epoch": epochs[user_id]}
        for user_id, user in locked.items()
        if user_id not in newest and epochs[user_id] != user.epoch
    ]
    grown = [
        {
            "key": user_id,
            "epoch": epochs[user_id],
            "last_seq": row["seq"],
            "last_recorded_at": row["recorded_at"],
        }
        for user_id, row in newest.items()
    ]
    one = update(users).where(users.c.user_id == bindparam("key"))
    for some in filter(None, (behind, grown)):
        connection.execute(one.values({name: bindparam(name) for name in some[0] if name != "key"}), some)
    _count_pending(connection, grown)


def _count_pending(connection: Connection, grown: list[dict[str, Any]]) -> None:
    if not grown:
        return
    names = connection.execute(select(bases.c.base).order_by(bases.c.base)).scalars().all()
    rows = [
        {
            "user_id": user["key"],
            "base": base,
            "epoch": user["epoch"],
            "pending": user["last_seq"],
            "last_recorded_at": user["last_recorded_at"],
        }
        for user in grown
        for base in names
    ]
    if rows:
        statement = upsert(connection, adapters)
        counted = {
            "pending": statement.excluded.pending - adapters.c.considered_through,
            "last_recorded_at": statement.excluded.last_recorded_at,
        }
        connection.execute(
            statement.on_conflict_do_update(index_elements=adapters.primary_key.columns, set_=counted), rows
        )


def _match(connection: Connection, rows: list[dict[str, Any]], served: list[NewAnswer]) -> int:
    replies = [(row["user_id"], row["in_reply_to"]) for row in rows if row["in_reply_to"] is not None]
    keys = list(dict.fromkeys([*replies, *((answer.user_id, answer.request_id) for answer in served)]))
    pairs: dict[_Key, dict[str, Any]] = {}
    for some in chunks(keys):
        for row in connection.execute(_unmatched(some)):
            match = {
                "user": row.user_id,
                "request": row.request_id,
                "seq": row.seq,
                "right": int(row.answered == row.done),
            }
            pairs.setdefault((row.user_id, row.request_id), match)
    if pairs:
        connection.execute(_MATCH, list(pairs.values()))
    return len(pairs)


def _unmatched(keys: Sequence[_Key]) -> Select[Any]:
    wanted = asked(keys, user_id=Text8, request_id=Text8)
    of_user = (answers.c.user_id == wanted.c.user_id) & (answers.c.request_id == wanted.c.request_id)
    replying = (events.c.user_id == answers.c.user_id) & (events.c.in_reply_to == answers.c.request_id)
    return (
        select(
            answers.c.user_id,
            answers.c.request_id,
            events.c.seq,
            answers.c.output.label("answered"),
            events.c.output.label("done"),
        )
        .join_from(wanted, answers, of_user)
        .join(events, replying)
        .where(answers.c.matched_seq.is_(None))
        .order_by(answers.c.user_id, events.c.seq)  # the first event that replies is the match
    )


_MATCH = (
    update(answers)
    .where(answers.c.user_id == bindparam("user"), answers.c.request_id == bindparam("request"))
    .values(matched_seq=bindparam("seq"), correct=bindparam("right"))
)
