"""Live quality and paired lift, computed from what is stored, so that restarts neither double nor reset them."""

from datetime import datetime

from sqlalchemy import Connection, bindparam, delete, func, select

from oppu.store.erasure import drop_idle, lock_present
from oppu.store.records import Lift, Quality
from oppu.store.schema import answers, lifts
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
    gone = sorted((row.user_id, row.request_id) for row in connection.execute(oldest))
    if gone:
        one = (answers.c.user_id == bindparam("user")) & (answers.c.request_id == bindparam("request"))
        keys = [{"user": user, "request": request} for user, request in gone]
        connection.execute(delete(answers).where(one), keys)  # by the key; a join would read the whole table
    # whoever is being written to now is not idle, and is not waited for: that could be for each other
    drop_idle(connection, lock_present(connection, {UserId(user) for user, _ in gone}, skip_locked=True))
    return len(gone)
