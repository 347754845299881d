"""Mix next-token distributions of experts: base, adapter, and caches of texts that the user has at hand.

A cache (Grave et al., arXiv 1612.04426; Khandelwal et al., arXiv 1911.00172) of weighted texts gives two experts: how
often each token occurs in them (``NAME``), and what follows where the longest end of what is written so far occurs in
them (``NAME_next``). Generation and evaluation take distributions and weights from here, so that they cannot differ.

Invariants: weights sum to one over the experts that have something to say, of whom ``base`` always is one; a cache
never says more than its texts' tokens and the end. Knows no model library.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oppu.lm.prompts import Ids

Array = NDArray[np.float64]
Texts = tuple[tuple[str, float], ...]
"""Texts with positive weights."""

CACHES = ("knn", "prior", "input")
"""Outputs of the nearest items, the user's outputs by recency, and the input itself."""
CACHE_EXPERTS = tuple(f"{name}{kind}" for name in CACHES for kind in ("", "_next"))
EXPERTS = ("base", "adapter", *CACHE_EXPERTS)
LONGEST_MATCH = 4
"""Tokens of what is written that are looked up."""
_START = -1


@dataclass(frozen=True, slots=True)
class Blend:
    """How one text is written.

    Attributes:
        weights: By expert: log weight, and what each further matched token adds to it. Who is not named is silent.
        caches: By name, the texts of each cache.
    """

    weights: Mapping[str, tuple[float, float]]
    caches: Mapping[str, Texts] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Said:
    """One cache expert's distribution: ``tokens`` (each once) with ``probabilities`` summing to one, and how many
    tokens matched (0: not asked)."""

    expert: str
    tokens: NDArray[np.int64] = field(repr=False)
    probabilities: Array = field(repr=False)
    matched: int


class Cache:
    """Weighted token sequences of one source."""

    def __init__(self, name: str, texts: Sequence[tuple[Ids, float]]) -> None:
        """Index texts.

        Args:
            name: Of the source.
            texts: Token ids, the end token included, each with a positive weight.
        """
        self._name = name
        self._line: list[int] = []
        self._weights: list[float] = []
        self._places: dict[int, list[int]] = defaultdict(list)
        for ids, weight in texts:
            for token in (_START, *ids):
                self._places[token].append(len(self._line))
                self._line.append(token)
                self._weights.append(weight)
        self._words = self._said(name, [at for at, token in enumerate(self._line) if token != _START], 0)

    def after(self, written: Ids) -> list[Said]:
        """Return what the cache's two experts say of the token after ``written``; those without anything do not."""
        found = [self._words] if len(self._words.tokens) else []
        history = (_START, *written)
        places = [at + 1 for at in self._places.get(history[-1], ()) if self._goes_on(at + 1)]
        if not places:
            return found
        matched = 1
        for size in range(2, min(LONGEST_MATCH, len(history)) + 1):
            longer = [at for at in places if at >= size and self._line[at - size] == history[-size]]
            if not longer:
                break
            places, matched = longer, size
        return [*found, self._said(f"{self._name}_next", places, matched)]

    def _goes_on(self, at: int) -> bool:
        return at < len(self._line) and self._line[at] != _START

    def _said(self, expert: str, places: Sequence[int], matched: int) -> Said:
        sums: dict[int, float] = {}
        for at in places:
            sums[self._line[at]] = sums.get(self._line[at], 0.0) + self._weights[at]
        masses = np.fromiter(sums.values(), dtype=np.float64, count=len(sums))
        tokens = np.fromiter(sums, dtype=np.int64, count=len(sums))
        return Said(expert, tokens, masses / masses.sum() if len(masses) else masses, matched)


def shares(weights: Mapping[str, tuple[float, float]], matched: Mapping[str, int]) -> dict[str, float]:
    """Return the weights of those who speak.

    Args:
        weights: As in ``Blend``.
        matched: Matched tokens of every expert that has something to say (0 or 1: nothing is added).

    Returns:
        By expert, summing to one; those without a weight are left out.
    """
    levels = {
        name: weights[name][0] + weights[name][1] * max(0, n - 1) for name, n in matched.items() if name in weights
    }
    top = max(levels.values())
    odds = {name: float(np.exp(level - top)) for name, level in levels.items()}
    total = sum(odds.values())
    return {name: odd / total for name, odd in odds.items()}


def foreseen(caches: Sequence[Cache], wanted: Ids) -> tuple[Array, NDArray[np.int64]]:
    """Say how each cache expert foresees a text, token by token.

    Args:
        caches: Of one user and item.
        wanted: The text's tokens, the end token included.

    Returns:
        ``[t, e] float64`` probabilities in the order of ``CACHE_EXPERTS``, NaN where one is silent; and ``[t, e]
        int64`` matched tokens.
    """
    found = np.full((len(wanted), len(CACHE_EXPERTS)), np.nan)
    matched = np.zeros(found.shape, dtype=np.int64)
    for at, token in enumerate(wanted):
        for said in (one for cache in caches for one in cache.after(wanted[:at])):
            column = CACHE_EXPERTS.index(said.expert)
            found[at, column] = said.probabilities[said.tokens == token].sum()
            matched[at, column] = said.matched
    return found, matched


def mixed(said: Array, matched: NDArray[np.int64], weights: Mapping[str, tuple[float, float]]) -> Array:
    """Mix the experts' probabilities of a text's tokens: what ``shares`` gives, for whole arrays.

    Args:
        said: ``[..., e]`` probabilities in the order of ``EXPERTS``, NaN where an expert is silent.
        matched: ``[..., e]`` matched tokens.
        weights: As in ``Blend``.

    Returns:
        ``[...]`` probabilities.
    """
    levels = np.array([weights.get(name, (-np.inf, 0.0)) for name in EXPERTS])
    logits = np.where(np.isnan(said), -np.inf, levels[:, 0] + levels[:, 1] * np.maximum(matched - 1, 0))
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    total: Array = (odds * np.nan_to_num(said)).sum(-1) / odds.sum(-1)
    return total
