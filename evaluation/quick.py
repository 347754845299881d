"""A run of minutes: few users, short histories, a small population to adapt on. Never evidence. Pure."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date

from evaluation.corpus import Item, by_user
from evaluation.roles import Bounds

TARGETS, FEW_TARGETS, OTHERS = 8, 3, 12
"""Target users; those where the base is crossed (each has a base of his own); users who can calibrate."""
ALONE_TARGETS, FOLDS = 12, 3
"""Where there are targets only, each part of them has a base of its own: so many parts of so many users run."""
ADAPT_CHARACTERS = 150_000
"""Inputs of the population that the base is adapted on."""
USER_CHARACTERS, LEAST_ITEMS, MOST_ITEMS = 30_000, 60, 100
_QUERIES = 5
"""Of a user whose file holds queries, one in so many items is one."""


def shortened(items: Sequence[Item], bounds: Bounds) -> tuple[tuple[Item, ...], Bounds]:
    """Draw a small part of the users, by hash, with their newest items.

    Args:
        items: Of one task, oldest first.
        bounds: Who can be what in the whole.

    Returns:
        The part, in order, and bounds by which its users have the roles that they would have in the whole.
    """
    people = by_user(items)
    order = sorted(people, key=lambda user: hashlib.sha256(f"quick:{user}".encode()).digest())
    targets = [user for user in order if user not in bounds.population and len(people[user]) >= bounds.target]
    rest = [user for user in order if user not in targets and (not bounds.population or user in bounds.population)]
    crossed = len(targets) < bounds.folds_below and not bounds.population
    most = TARGETS if rest else ALONE_TARGETS
    able = [user for user in rest if len(people[user]) >= bounds.calibrate][:OTHERS]
    chosen = _ids(people, [*targets[: FEW_TARGETS if crossed else most], *able], bounds)
    room = ADAPT_CHARACTERS
    for user in rest:
        if len(people[user]) < bounds.calibrate and room > 0:
            chosen |= _ids(people, [user], bounds)
            room -= sum(len(item.input) for item in _newest(people[user], bounds))
    own = tuple(item for item in items if item.item_id in chosen)
    return own, replace(bounds, folds_below=bounds.folds_below if crossed else 0)


def alongside(items: Sequence[Item], others: Sequence[Item]) -> tuple[Item, ...]:
    """Return the other tasks' items of the users that are left, from each one's first item on."""
    first: dict[str, date] = {user: own[0].day for user, own in by_user(items).items()}
    return tuple(item for item in others if item.user_id in first and item.day >= first[item.user_id])


def _ids(people: Mapping[str, Sequence[Item]], users: Sequence[str], bounds: Bounds) -> set[str]:
    return {item.item_id for user in users for item in _newest(people[user], bounds)}


def _newest(own: Sequence[Item], bounds: Bounds) -> Sequence[Item]:
    """Return so many of the newest items that they are read in about the same time whatever their length; of a file
    with queries, the newest of the history and the first of the queries."""
    size = max(1, sum(len(item.input) for item in own) // len(own))
    most = max(min(MOST_ITEMS, max(LEAST_ITEMS, USER_CHARACTERS // size)), bounds.target)
    history = next((at for at, item in enumerate(own) if item.query), len(own))
    asked = own[history:][: max(most // _QUERIES, most - history)]
    return [*own[:history][-(most - len(asked)) :], *asked]
