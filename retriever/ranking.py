"""Orders of a user's items, best first, and their fusion. Pure; items are positions in the user's view."""

from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_FUSION_K = 60
"""Damps the first ranks' lead; the value of Cormack, Clarke and Büttcher, SIGIR 2009."""


def by_score(scores: NDArray[np.float32], low: int, *, positive_only: bool) -> list[int]:
    """Order the positions from ``low`` on by their scores; of equal ones the newest first."""
    order = np.lexsort((-np.arange(len(scores)), -scores))
    if positive_only:
        order = order[scores[order] > 0]
    return [low + int(position) for position in order]


def fused(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Fuse rankings by reciprocal rank: an item scores the sum of 1 / (60 + rank), ranks from 1.

    Args:
        rankings: Best first; an item missing from one gets nothing from it.

    Returns:
        All their items, best first; of equal ones the newest.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, start=1):
            scores[item] = scores.get(item, 0.0) + 1.0 / (_FUSION_K + rank)
    return sorted(scores, key=lambda item: (-round(scores[item], 12), -item))


def without_repeats(ranking: Iterable[int], key: Callable[[int], Hashable], limit: int) -> list[int]:
    """Return the first ``limit`` items, the first of each key alone."""
    seen: set[Hashable] = set()
    kept: list[int] = []
    for item in ranking:
        if len(kept) >= limit:
            break
        if key(item) not in seen:
            seen.add(key(item))
            kept.append(item)
    return kept
