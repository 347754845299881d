"""A run of minutes: few folds and users, short histories, a small population to adapt on. Never evidence. Pure."""

from dataclasses import replace

from evaluation.corpus import Item
from evaluation.splits import Fold, Person

FOLDS = 3
"""Each adapts bases of its own."""
ADAPT_ITEMS, ADAPT_CHARACTERS = 1500, 120_000
"""At most so many items, of about so many characters, adapt a base."""
LONGEST = 1000
"""Characters of an item that count; a prompt holds about as many."""
USER_CHARACTERS, LEAST_ITEMS, MOST_ITEMS = 24_000, 50, 90
"""A user's items are cut so that they are read in about the same time whatever their length."""
_TEST_SHARE = 5
"""One item in so many of those that are kept is asked about."""


def shortened(fold: Fold, users: int) -> Fold:
    """Cut a fold to its first users, their items around the cut, and as much of what adapts the base as is read soon.

    Sides stay as they are: what the whole fold holds back, or leaves closed, is not learnt here either.

    Args:
        fold: The whole.
        users: Most targets, and most calibrate users.

    Returns:
        The part.
    """
    target, calibrate = (tuple(_short(p) for p in people[:users]) for people in (fold.target, fold.calibrate))
    return replace(fold, target=target, calibrate=calibrate, adapt=_small(fold.adapt))


def _short(person: Person) -> Person:
    """Keep the newest training items and the first that are held back."""
    size = max(1, sum(map(_size, person.items)) // len(person.items))
    most = min(MOST_ITEMS, max(LEAST_ITEMS, USER_CHARACTERS // size))
    end = person.cut + min(len(person.test), max(most // _TEST_SHARE, most - person.cut))
    kept = slice(max(0, end - most), end)
    return Person(person.user_id, person.items[kept], person.groups[kept], person.cut - kept.start)


def _small(items: tuple[Item, ...]) -> tuple[Item, ...]:
    room, kept = ADAPT_CHARACTERS, 0
    while kept < min(len(items), ADAPT_ITEMS) and room > 0:
        room -= _size(items[kept])
        kept += 1
    return items[:kept]


def _size(item: Item) -> int:
    """Return the characters that are read of an item; a text's answer costs as its prompt does."""
    return min(LONGEST, len(item.input) + len(item.output))
