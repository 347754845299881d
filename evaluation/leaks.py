"""Look for leaks in a fold, by the items themselves: whatever grouped and divided them is not trusted. Pure."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from evaluation.corpus import Item
from evaluation.duplicates import BLOCK, SAME_COSINE, Vectors, normal, phrases, same_between, similar_grams
from evaluation.splits import Fold
from oppu.errors import ConfigError


def check(fold: Fold, vectors: Mapping[str, Vectors], common: frozenset[int] | None = None) -> None:
    """Look for what the split should have kept apart.

    Args:
        fold: What is about to be used.
        vectors: ``[dim] float32`` embedding by item id, of unit length or zero.
        common: The ``phrases`` of all items, those that the fold leaves out too; ``None``: of what is compared.

    Raises:
        ConfigError: Naming what lies on two sides, or is not in order.
    """
    problems = [*_sides(fold, vectors, common), *_orders(fold)]
    if problems:
        raise ConfigError(*dict.fromkeys(f"split: {problem}" for problem in problems))


def _sides(fold: Fold, vectors: Mapping[str, Vectors], common: frozenset[int] | None) -> Iterable[str]:
    held = [i for p in fold.target for i in p.test]
    learnt, calibrate = [i for p in fold.target for i in p.train], [i for p in fold.calibrate for i in p.items]
    rest = calibrate if fold.shared else [*learnt, *calibrate]  # what nobody may learn who is asked by others
    own, used = [*held, *rest], [*rest, *fold.adapt]
    near = _near(held, rest, fold.adapt, common=common)
    if near & {(0, 1), (0, 2)} or _overlap(held, used, vectors):
        yield "an item of some test part, or a near-duplicate, is also learnt or calibrated on"
    if fold.shared and any(
        (0, 1) in _near(p.test, p.train, common=common) or _overlap(p.test, p.train, vectors) for p in fold.target
    ):
        yield "an item of a user's test part, or a near-duplicate, is also in his training part"
    asked = [(p.test, [*p.train, *used]) for p in fold.target] if fold.shared else [(held, [*learnt, *used])]
    if any(_written(texts, questions, common) for questions, texts in asked):
        yield "what a user is asked for is learnt as a text without an output"
    if any(normal(item.input) in fold.held for item in (*learnt, *used)):
        yield "an item of a sister task's test part is learnt or calibrated on"
    if near & {(0, 2), (1, 2)} or _overlap(own, fold.adapt, vectors) or _users(own) & _users(fold.adapt):
        yield "the base would be adapted on a target's or calibrate user's item"
    if {p.user_id for p in fold.target} & {p.user_id for p in fold.calibrate}:
        yield "a target would be calibrated on"


def _orders(fold: Fold) -> Iterable[str]:
    for p in (*fold.target, *fold.calibrate):
        if p.test and p.train and p.train[-1].day >= p.test[0].day:
            yield "a test item is not later than all of its user's training part"
        if any(a.day > b.day for a, b in zip(p.items, p.items[1:], strict=False)):
            yield "a user's items are not in order of time"
        if any(item.user_id != p.user_id for item in p.items):
            yield "another user's item is among a user's own"
    if fold.before is not None and any(item.day >= fold.before for item in fold.adapt):
        yield "the base would be adapted on an item that is not before the first test"


def _users(items: Iterable[Item]) -> set[str]:
    return {item.user_id for item in items}


def _written(texts: Sequence[Item], questions: Sequence[Item], common: frozenset[int] | None) -> bool:
    """Whether what is asked for, or nearly that, is among the texts without an output."""
    bare = [item.input for item in texts if item.bare]
    said = [item.output for item in questions] if bare else []
    return any(True for _ in same_between(bare, said, phrases(bare) if common is None else common))


def _near(*parts: Sequence[Item], common: frozenset[int] | None) -> set[tuple[int, int]]:
    """Return which parts, by number, share near-duplicates by their word sequences."""
    of = [number for number, part in enumerate(parts) for _ in part]
    pairs = similar_grams([item.input for part in parts for item in part], common)
    return {(min(of[a], of[b]), max(of[a], of[b])) for a, b in pairs}


def _overlap(held: Sequence[Item], used: Sequence[Item], vectors: Mapping[str, Vectors]) -> bool:
    texts = {normal(item.input) for item in used}
    if any(normal(item.input) in texts for item in held):
        return True
    if not held or not used:
        return False
    mine, others = (np.stack([vectors[i.item_id] for i in some]) for some in (held, used))
    return any((mine[k : k + BLOCK] @ others.T > SAME_COSINE).any() for k in range(0, len(mine), BLOCK))
