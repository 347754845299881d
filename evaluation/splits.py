"""Who is what, and which item lies on which side (protocol section 1). Pure, given the items' embeddings.

Users fall by hash and number of items into adapt, calibrate and target. Invariant: items that say the same (equal
text, near-duplicates) form one group, and a group lies on one side only: a target's test wins over calibrate, that
over a target's training part, that over adapt; what loses is dropped. Within a user a group's first item is kept.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from evaluation.corpus import Item, by_user
from oppu.errors import ConfigError

TRAIN_SHARE = 0.8
SAME_COSINE, SAME_JACCARD, GRAM = 0.95, 0.5, 8
_COMMON_GRAM = 200
"""A gram in more items than this is a phrase of the trade and makes no two items the same."""
_BLOCK = 2048

Vectors = NDArray[np.float32]


class Side(IntEnum):
    """Where an item lies; where a group's items disagree the highest wins."""

    ADAPT = 0
    TRAIN = 1
    CALIBRATE = 2
    TEST = 3


@dataclass(frozen=True, slots=True)
class Person:
    """A user's items in order of day; those from ``cut`` on are held back."""

    user_id: str = field(repr=False)
    items: tuple[Item, ...] = field(repr=False)
    groups: tuple[int, ...] = field(repr=False)
    cut: int

    @property
    def train(self) -> tuple[Item, ...]:
        """What may be trained on."""
        return self.items[: self.cut]

    @property
    def test(self) -> tuple[Item, ...]:
        """What is asked about."""
        return self.items[self.cut :]


@dataclass(frozen=True, slots=True)
class Fold:
    """One base's users: the base is adapted on ``adapt``, everything is chosen on ``calibrate``."""

    name: str
    adapt: tuple[Item, ...] = field(repr=False)
    calibrate: tuple[Person, ...] = field(repr=False)
    target: tuple[Person, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Who can be what: least number of items; few targets are crossed, each fold leaving some out."""

    target: int = 50
    calibrate: int = 20
    folds_below: int = 12


def make_folds(items: Sequence[Item], vectors: Vectors, bounds: Bounds, *, final: bool) -> list[Fold]:
    """Divide users and items.

    Args:
        items: Of one task, oldest first.
        vectors: ``[n, dim] float32`` unit embeddings of the inputs.
        bounds: Who can be what.
        final: Whether the last fifth is opened; else it does not exist, and the fifth before it is held back.

    Returns:
        One fold, or one for each target where there are few.

    Raises:
        ConfigError: Nobody has enough items to be a target.
    """
    groups = dict(zip((item.item_id for item in items), same_groups([i.input for i in items], vectors), strict=True))
    people = by_user(items)
    targets = [user for user, own in people.items() if len(own) >= bounds.target]
    if not targets:
        raise ConfigError(f"events: expected some user with at least {bounds.target} items")
    if len(targets) < bounds.folds_below:
        roles = [(f"without-{user}", _crossed(people, targets, user)) for user in targets]
    else:
        roles = [("all", {user: _role(user, len(own), bounds) for user, own in people.items()})]
    return [_fold(name, people, role, groups, final=final) for name, role in roles]


def cut_index(items: Sequence[Item]) -> int:
    """Return where the last fifth begins, moved back to the beginning of its day, or on where all is one day."""
    at = min(int(TRAIN_SHARE * len(items)), len(items) - 1)
    first = next(k for k in range(len(items)) if items[k].day == items[at].day)
    if first > 0:
        return first
    return next((k for k in range(len(items)) if items[k].day > items[at].day), len(items))


def same_groups(texts: Sequence[str], vectors: Vectors) -> list[int]:
    """Return a group number for each text: equal for equal texts and near-duplicates, transitively."""
    parent = list(range(len(texts)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for a, b in _same_pairs(texts, vectors):
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(at) for at in range(len(texts))]


def clusters(people: Sequence[Person]) -> list[int]:
    """Return a cluster number for each person: persons who share a test group are one cluster (protocol section 4)."""
    owner: dict[int, int] = {}
    number = list(range(len(people)))
    for at, person in enumerate(people):
        for group in person.groups[person.cut :]:
            other = number[owner.setdefault(group, at)]
            if other != number[at]:
                number = [min(other, number[at]) if n in (other, number[at]) else n for n in number]
    return number


def normal(text: str) -> str:
    """Return a text as it is compared: lower case, single spaces."""
    return " ".join(text.lower().split())


def _role(user: str, count: int, bounds: Bounds) -> str:
    if count >= bounds.target:
        return "target"
    if count >= bounds.calibrate and hashlib.sha256(f"role:{user}".encode()).digest()[0] % 2:
        return "calibrate"
    return "adapt"


def _crossed(people: Iterable[str], targets: Sequence[str], user: str) -> dict[str, str]:
    """Return the roles of the fold that leaves one target out; the target after it calibrates."""
    other = targets[(targets.index(user) + 1) % len(targets)]
    return {u: {user: "target", other: "calibrate"}.get(u, "adapt") for u in people}


def _fold(
    name: str,
    people: Mapping[str, list[Item]],
    role: Mapping[str, str],
    groups: Mapping[str, int],
    *,
    final: bool,
) -> Fold:
    opened = {user: own if final or role[user] != "target" else own[: cut_index(own)] for user, own in people.items()}
    sides: dict[int, Side] = defaultdict(lambda: Side.ADAPT)
    placed: list[tuple[Item, Side]] = []
    for user, own in opened.items():
        cut = cut_index(own) if role[user] == "target" else len(own)
        held = {"adapt": Side.ADAPT, "calibrate": Side.CALIBRATE, "target": Side.TRAIN}[role[user]]
        placed += [(item, held if at < cut else Side.TEST) for at, item in enumerate(own)]
    for item, side in placed:
        sides[groups[item.item_id]] = max(sides[groups[item.item_id]], side)
    kept = by_user(_first_of_group((i for i, side in placed if sides[groups[i.item_id]] == side), groups))
    side_of = {item.item_id: side for item, side in placed}

    def person(user: str) -> Person:
        own = tuple(kept[user])
        cut = sum(side_of[item.item_id] != Side.TEST for item in own)
        return Person(user, own, tuple(groups[item.item_id] for item in own), cut)

    adapt = sorted((i for u, own in kept.items() if role[u] == "adapt" for i in own), key=lambda i: (i.day, i.item_id))
    chosen = {kind: [person(u) for u in kept if role[u] == kind] for kind in ("calibrate", "target")}
    able = tuple(p for p in chosen["target"] if 0 < p.cut < len(p.items))
    return Fold(name, tuple(adapt), tuple(chosen["calibrate"]), able)


def _first_of_group(items: Iterable[Item], groups: Mapping[str, int]) -> list[Item]:
    seen: set[tuple[str, int]] = set()
    kept = []
    for item in items:
        key = (item.user_id, groups[item.item_id])
        if key not in seen:
            seen.add(key)
            kept.append(item)
    return kept


def _same_pairs(texts: Sequence[str], vectors: Vectors) -> Iterable[tuple[int, int]]:
    first: dict[str, int] = {}
    for at, text in enumerate(map(normal, texts)):
        if first.setdefault(text, at) != at:
            yield first[text], at
    yield from _similar_grams(texts)
    for start in range(0, len(texts), _BLOCK):
        rows, columns = np.nonzero(vectors[start : start + _BLOCK] @ vectors[start:].T > SAME_COSINE)
        yield from ((start + int(a), start + int(b)) for a, b in zip(rows, columns, strict=True) if a < b)


def _similar_grams(texts: Sequence[str]) -> Iterable[tuple[int, int]]:
    grams = [_grams(text) for text in texts]
    having: dict[int, list[int]] = defaultdict(list)
    for at, own in enumerate(grams):
        for gram in own:
            having[gram].append(at)
    shared: dict[tuple[int, int], int] = defaultdict(int)
    for members in having.values():
        if 1 < len(members) <= _COMMON_GRAM:
            for k, a in enumerate(members):
                for b in members[k + 1 :]:
                    shared[a, b] += 1
    for (a, b), both in shared.items():
        if both > SAME_JACCARD * (len(grams[a]) + len(grams[b]) - both):
            yield a, b


def _grams(text: str) -> set[int]:
    words = normal(text).split()
    return {hash(tuple(words[k : k + GRAM])) for k in range(max(1, len(words) - GRAM + 1))}


def check(fold: Fold, vectors: Mapping[str, Vectors], sister: Fold | None = None) -> None:
    """Look for a leak in a fold, by the items themselves: whatever grouped and divided them is not trusted.

    Args:
        fold: What is about to be used.
        vectors: ``[dim] float32`` unit embedding by item id.
        sister: The same users' fold of another task that has the same inputs.

    Raises:
        ConfigError: Naming what lies on two sides, or is not in order.
    """
    held = {p.user_id: p.test for p in fold.target}
    used = [*fold.adapt, *(i for p in fold.target for i in p.train), *(i for p in fold.calibrate for i in p.items)]
    problems = []
    if _overlap([i for own in held.values() for i in own], used, vectors):
        problems.append("split: an item of some test part, or a near-duplicate, is also learnt or calibrated on")
    if sister is not None and _overlap([i for p in sister.target for i in p.test], used, {}):
        problems.append("split: an item of the sister task's test part is learnt or calibrated on")
    own = [i for p in (*fold.target, *fold.calibrate) for i in p.items]
    if _overlap(own, fold.adapt, vectors) or {i.user_id for i in own} & {i.user_id for i in fold.adapt}:
        problems.append("split: the base would be adapted on a target's or calibrate user's item")
    for p in (*fold.target, *fold.calibrate):
        if p.test and p.train and p.train[-1].day >= p.test[0].day:
            problems.append("split: a test item is not later than all of its user's training part")
        if any(a.day > b.day for a, b in zip(p.items, p.items[1:], strict=False)):
            problems.append("split: a user's items are not in order of time")
        if any(item.user_id != p.user_id for item in p.items):
            problems.append("split: another user's item is among a user's own")
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def _overlap(held: Sequence[Item], used: Sequence[Item], vectors: Mapping[str, Vectors]) -> bool:
    texts = {normal(item.input) for item in used}
    if any(normal(item.input) in texts for item in held):
        return True
    if not vectors or not held or not used:
        return False
    mine, others = (np.stack([vectors[i.item_id] for i in some]) for some in (held, used))
    return any((mine[k : k + _BLOCK] @ others.T > SAME_COSINE).any() for k in range(0, len(mine), _BLOCK))
