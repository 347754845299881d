"""A run of minutes: few users, short histories, a small population to adapt on. Never evidence. Pure."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from evaluation.corpus import Item, by_user
from evaluation.splits import Bounds

TARGETS, FEW_TARGETS, OTHERS = 8, 3, 12
"""Target users; those where the base is crossed (each has a base of his own); users who can calibrate."""
ADAPT_CHARACTERS = 150_000
"""Inputs of the population that the base is adapted on."""
USER_CHARACTERS, LEAST_ITEMS, MOST_ITEMS = 30_000, 60, 100


def shortened(items: Sequence[Item], bounds: Bounds) -> tuple[list[Item], Bounds]:
    """Draw a small part of the users, by hash, with their newest items.

    Args:
        items: Of one task, oldest first.
        bounds: Who can be what in the whole.

    Returns:
        The part, in order, and bounds by which its users have the roles that they would have in the whole.
    """
    people = by_user(items)
    order = sorted(people, key=lambda user: hashlib.sha256(f"quick:{user}".encode()).digest())
    targets = [user for user in order if len(people[user]) >= bounds.target]
    others = [user for user in order if bounds.calibrate <= len(people[user]) < bounds.target]
    crossed = len(targets) < bounds.folds_below
    kept = [*targets[: FEW_TARGETS if crossed else TARGETS], *others[:OTHERS]]
    chosen = {item.item_id for user in kept for item in _newest(people[user], bounds)}
    room = ADAPT_CHARACTERS
    for user in order:
        if len(people[user]) < bounds.calibrate and room > 0:
            own = _newest(people[user], bounds)
            chosen |= {item.item_id for item in own}
            room -= sum(len(item.input) for item in own)
    return [i for i in items if i.item_id in chosen], replace(bounds, folds_below=bounds.folds_below if crossed else 0)


def _newest(own: Sequence[Item], bounds: Bounds) -> Sequence[Item]:
    """Return so many of the newest items that they are read in about the same time whatever their length."""
    size = max(1, sum(len(item.input) for item in own) // len(own))
    fit = min(MOST_ITEMS, max(LEAST_ITEMS, USER_CHARACTERS // size))
    return own[-max(fit, bounds.target) :]
