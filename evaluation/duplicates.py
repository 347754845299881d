"""Which texts say the same: equal, of nearly equal embedding, or sharing most of their word sequences. Pure."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

SAME_COSINE, SAME_JACCARD, GRAM = 0.95, 0.5, 8
BLOCK = 2048
_COMMON_GRAM, _COMMON_SHARE, _FEW = 200, 1 / 3, 20
"""A gram in more texts than this, or than such a share of them if that is less but not few, is a phrase of the trade or
an instruction, and makes no two of them the same."""

Vectors = NDArray[np.float32]


def same_groups(texts: Sequence[str], vectors: Vectors, more: Iterable[tuple[int, int]] = ()) -> list[int]:
    """Return a group number for each text: equal for equal texts and near-duplicates, transitively.

    Args:
        texts: Any.
        vectors: ``[n, dim] float32``, of unit length, or zero where they tell nothing of the text.
        more: Places of two texts that are the same for another reason.

    Returns:
        The first place of each one's group.
    """
    parent = list(range(len(texts)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    for a, b in chain(_same_pairs(texts, vectors), more):
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(at) for at in range(len(texts))]


def normal(text: str) -> str:
    """Return a text as it is compared: lower case, single spaces."""
    return " ".join(text.lower().split())


def phrases(texts: Sequence[str]) -> frozenset[int]:
    """Return the word sequences that are so common in texts that sharing them says nothing."""
    having = Counter(gram for text in texts for gram in _grams(text))
    most = min(_COMMON_GRAM, max(_FEW, int(_COMMON_SHARE * len(texts))))
    return frozenset(gram for gram, count in having.items() if count > most)


def similar_grams(texts: Sequence[str], common: frozenset[int] | None = None) -> Iterable[tuple[int, int]]:
    """Yield the pairs of texts that share more than half of their eight-word sequences (Jaccard).

    Args:
        texts: Any.
        common: The sequences that say nothing; ``None``: the ``phrases`` of these texts.

    Yields:
        Places of two texts, the lower one first.
    """
    common = phrases(texts) if common is None else common
    grams = [_grams(text) - common for text in texts]
    having: dict[int, list[int]] = defaultdict(list)
    for at, own in enumerate(grams):
        for gram in own:
            having[gram].append(at)
    shared: dict[tuple[int, int], int] = defaultdict(int)
    for members in having.values():
        if len(members) > 1:
            for k, a in enumerate(members):
                for b in members[k + 1 :]:
                    shared[a, b] += 1
    for (a, b), both in shared.items():
        if _alike(both, grams[a], grams[b]):
            yield a, b


def same_between(left: Sequence[str], right: Sequence[str], common: frozenset[int]) -> Iterable[tuple[int, int]]:
    """Yield which texts of two lists are equal, or share more than half of their eight-word sequences.

    Args:
        left: Any.
        right: Any.
        common: The sequences that say nothing, as of ``phrases``.

    Yields:
        A place in each.
    """
    equal: dict[str, list[int]] = defaultdict(list)
    having: dict[int, list[int]] = defaultdict(list)
    grams = [_grams(text) - common for text in left]
    for at, (text, own) in enumerate(zip(left, grams, strict=True)):
        equal[normal(text)].append(at)
        for gram in own:
            having[gram].append(at)
    for at, text in enumerate(right):
        own = _grams(text) - common
        shared = Counter(other for gram in own for other in having.get(gram, ()))
        near = {other for other, both in shared.items() if _alike(both, grams[other], own)}
        yield from ((other, at) for other in sorted(near.union(equal.get(normal(text), ()))))


def _alike(both: int, one: set[int], other: set[int]) -> bool:
    return both > SAME_JACCARD * (len(one) + len(other) - both)


def _same_pairs(texts: Sequence[str], vectors: Vectors) -> Iterable[tuple[int, int]]:
    first: dict[str, int] = {}
    for at, text in enumerate(map(normal, texts)):
        if first.setdefault(text, at) != at:
            yield first[text], at
    yield from similar_grams(texts)
    alike: dict[bytes, int] = {}
    for at, vector in enumerate(vectors):  # equal ones first: of n of them there would be n² pairs
        if vector.any() and alike.setdefault(vector.tobytes(), at) != at:
            yield alike[vector.tobytes()], at
    places = np.array(list(alike.values()), dtype=np.intp)
    some = vectors[places]
    for start in range(0, len(some), BLOCK):
        rows, columns = np.nonzero(some[start : start + BLOCK] @ some[start:].T > SAME_COSINE)
        yield from (
            (int(places[start + a]), int(places[start + b])) for a, b in zip(rows, columns, strict=True) if a < b
        )


def _grams(text: str) -> set[int]:
    words = normal(text).split()
    return {hash(tuple(words[k : k + GRAM])) for k in range(max(1, len(words) - GRAM + 1))}
