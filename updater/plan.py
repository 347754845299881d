"""Decide whose adapter is trained next, and when a failed attempt may be repeated.

Pure: the caller passes what is due, the time and the budget. What is due is the store's business.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from oppu.settings import LONGEST_RETRY_SECONDS
from oppu.store.records import DueUser
from oppu.values import UserId

ACTIVITY_HALF_LIFE_HOURS = 24.0
"""A user's weight halves for each day without an event: whoever is active now meets the new adapter soonest."""
IDLE_WEIGHT = 0.05
"""The weight never falls below this, so that idle users wait for longer but not for ever."""


def plan(due: Sequence[DueUser], *, now: datetime, budget_users: int, budget_events: int | None = None) -> list[UserId]:
    """Order the users to train now: many pending events and recent activity first.

    Args:
        due: Candidates, each user once.
        now: Current time.
        budget_users: How many may be trained.
        budget_events: How many pending events may be trained on in all; the first user always fits.

    Returns:
        User ids, most urgent first.
    """
    ranked = sorted(due, key=lambda user: (-_urgency(user, now), user.user_id))
    chosen: list[UserId] = []
    events = 0
    for user in ranked[: max(budget_users, 0)]:
        events += user.pending
        if chosen and budget_events is not None and events > budget_events:
            break
        chosen.append(user.user_id)
    return chosen


def _urgency(user: DueUser, now: datetime) -> float:
    idle_hours = max((now - user.last_recorded_at).total_seconds(), 0.0) / 3600.0
    activity: float = 0.5 ** (idle_hours / ACTIVITY_HALF_LIFE_HOURS)
    return user.pending * max(activity, IDLE_WEIGHT)


def retry_at(failures: int, *, now: datetime, first_seconds: float) -> datetime:
    """Return when to try again after ``failures`` failures in a row: doubling from ``first_seconds``, capped."""
    # the exponent is capped in floats, where 2**1000 still is a number, before it becomes a time
    seconds = first_seconds * 2.0 ** min(max(failures - 1, 0), 900)
    return now + timedelta(seconds=min(seconds, LONGEST_RETRY_SECONDS))


def should_quarantine(failures: int, *, after: int) -> bool:
    """Say whether a user has failed so often in a row that only an operator's release tries again."""
    return failures >= after
