"""Live quality and paired lift, computed from what is stored, so that restarts neither double nor reset them."""

from datetime import datetime

from sqlalchemy import Connection, delete, exists, func, select

from oppu.store.database import asked, chunks
from oppu.store.erasure import drop_idle, lock_present
from oppu.store.records import Lift, Quality
from oppu.store.schema import Text8, answers, lifts
from oppu.values import BaseId, UserId


def read_quality(connection: Connection) -> list[Quality]:
    """Return the kept answers by task and arm: how many, how many matched, how many of those were right."""
    rows = connection.execute(
        select(
            answers.c.task,
            answers.c.arm,
            func.count().label("answered"),
            func.count(answers.c.matched_seq).label("matched"),
            func.sum(answers.c.correct).label("correct"),
        )
        .group_by(answers.c.task, answers.c.arm)
        .order_by(answers.c.task, answers.c.arm)
    )
    return [Quality(row.task, row.arm, row.answered, row.matched, int(row.correct)) for row in rows]


def read_lift(connection: Connection, base: BaseId) -> Lift:
    """Return the sums over all users and scorings of one base."""
    names = ("events", "loss_live", "loss_none", "correct_live", "correct_none")
    sums = (func.coalesce(func.sum(lifts.c[name]), 0).label(name) for name in names)
    row = connection.execute(select(*sums).where(lifts.c.base == base)).one()
    return Lift(
        events=int(row.events),
        loss_live=float(row.loss_live),
        loss_none=float(row.loss_none),
        correct_live=int(row.correct_live),
        correct_none=int(row.correct_none),
    )


def purge_answers(connection: Connection, before: datetime, limit: int) -> int:
    """Delete the oldest answers given before a time, and the users of whom nothing else is kept.

    Args:
        connection: In a write transaction.
        before: The time.
        limit: Most answers.

    Returns:
        How many were deleted.
    """
    oldest = (
        select(answers.c.user_id, answers.c.request_id)
        .where(answers.c.answered_at < before)
        .order_by(answers.c.answered_at)
        .limit(limit)
    )
    gone = connection.execute(oldest).all()
    locked = lock_present(connection, {UserId(row.user_id) for row in gone})
    for some in chunks([(row.user_id, row.request_id) for row in gone]):
        wanted = asked(some, user_id=Text8, request_id=Text8)
        same = (answers.c.user_id == wanted.c.user_id) & (answers.c.request_id == wanted.c.request_id)
        connection.execute(delete(answers).where(exists(select(wanted).where(same))))
    drop_idle(connection, locked)
    return len(gone)
