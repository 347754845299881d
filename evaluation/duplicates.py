"""Which texts say the same: equal, of nearly equal embedding, or sharing most of their word sequences. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

SAME_COSINE, SAME_JACCARD, GRAM = 0.95, 0.5, 8
BLOCK = 2048
_COMMON_GRAM = 200
"""A gram in more items than this is a phrase of the trade and makes no two items the same."""

Vectors = NDArray[np.float32]


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


def normal(text: str) -> str:
    """Return a text as it is compared: lower case, single spaces."""
    return " ".join(text.lower().split())


def similar_grams(texts: Sequence[str]) -> Iterable[tuple[int, int]]:
    """Yield the pairs of texts that share more than half of their eight-word sequences (Jaccard)."""
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


def _same_pairs(texts: Sequence[str], vectors: Vectors) -> Iterable[tuple[int, int]]:
    first: dict[str, int] = {}
    for at, text in enumerate(map(normal, texts)):
        if first.setdefault(text, at) != at:
            yield first[text], at
    yield from similar_grams(texts)
    for start in range(0, len(texts), BLOCK):
        rows, columns = np.nonzero(vectors[start : start + BLOCK] @ vectors[start:].T > SAME_COSINE)
        yield from ((start + int(a), start + int(b)) for a, b in zip(rows, columns, strict=True) if a < b)


def _grams(text: str) -> set[int]:
    words = normal(text).split()
    return {hash(tuple(words[k : k + GRAM])) for k in range(max(1, len(words) - GRAM + 1))}
