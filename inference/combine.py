"""Combine a choice's scores: base model, model with the user's adapter, kNN vote and recency prior.

Pure. Letter: c choices. The only place where sources are weighed: base, kNN and prior are a product of experts;
the user's adapter stands beside them as a mixture's second expert, for it has mostly learnt what kNN and prior
already say, and a product would count that twice.
Invariants: the result is normalised; permuting the choices permutes it; an absent part, or one of weight zero,
changes nothing. Where the weights come from is the caller's business.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oppu.tasks import Kind

Array = NDArray[np.float64]

PRIOR_SMOOTHING = 1.0
"""Pseudo-events spread evenly over the choices, so that an output not seen yet stays possible (the kNN vote has
the same)."""

_HALF = 0.5 - 1e-12
"""The median's mark, less what summing rounds away."""

_TINY = 1e-300
"""Keeps the logarithm finite where a source gives a choice no mass at all."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What each source says of the choices, each ``[c] float64``; ``None`` where it has nothing to say.

    Attributes:
        base: Log probabilities of the model without adapter.
        adapter: Log probabilities of the model with the user's adapter.
        knn: Probabilities by the vote of similar items.
        prior: Probabilities by the user's own recent outputs.
    """

    base: Array = field(repr=False)
    adapter: Array | None = field(default=None, repr=False)
    knn: Array | None = field(default=None, repr=False)
    prior: Array | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each source counts.

    Attributes:
        adapter: The adapter's weight in the mixture where other evidence stands beside it; alone it has all.
        knn: Factor of log kNN.
        prior: Factor of the log prior.
    """

    adapter: float
    knn: float
    prior: float


def combine(parts: Evidence, weights: Weights) -> Array:
    """Fuse all sources.

    Args:
        parts: What each says.
        weights: How much each counts.

    Returns:
        Log probabilities ``[c] float64``, normalised.
    """
    beside = [
        weight * np.log(np.maximum(source, _TINY))
        for source, weight in ((parts.knn, weights.knn), (parts.prior, weights.prior))
        if source is not None and weight > 0
    ]
    if parts.adapter is not None and not beside:
        return log_softmax(parts.adapter)
    evidence = log_softmax(np.sum([parts.base, *beside], axis=0))
    if parts.adapter is None or weights.adapter == 0:
        return evidence
    return _mixture(evidence, log_softmax(parts.adapter), weights.adapter)


def log_softmax(scores: Array) -> Array:
    """Normalise log scores ``[c]``; a shift of all changes nothing."""
    shifted = scores - scores.max()
    normalised: Array = shifted - np.log(np.exp(shifted).sum())
    return normalised


def recency_prior(
    counts: Mapping[str, float], choices: Sequence[str], *, smoothing: float = PRIOR_SMOOTHING
) -> Array | None:
    """Turn recency-weighted counts of outputs into a distribution over ``choices``.

    Args:
        counts: Weight of each output the user gave.
        choices: The allowed outputs.
        smoothing: Pseudo-events spread evenly over the choices.

    Returns:
        ``[c] float64``, or ``None`` where the user never gave any of them.
    """
    seen = np.array([max(counts.get(choice, 0.0), 0.0) for choice in choices], dtype=np.float64)
    total = float(seen.sum())
    if total <= 0 or not np.isfinite(total):
        return None
    prior: Array = (seen + smoothing / len(choices)) / (total + smoothing)
    return prior


def pick(kind: Kind, choices: Sequence[str], probabilities: Array) -> str:
    """Choose the answer: the likeliest choice, or the (lower) median of a rating.

    The median is what minimises the expected absolute error, by which ratings are judged.

    Args:
        kind: ``choice`` or ``rating``; the choices of a rating are numbers.
        choices: The allowed outputs.
        probabilities: ``[c] float64``, summing to one.

    Returns:
        One of ``choices``.
    """
    if kind != "rating":
        return choices[int(np.argmax(probabilities))]
    order = sorted(range(len(choices)), key=lambda i: float(choices[i]))
    reached = np.cumsum(probabilities[order])
    return choices[order[min(int(np.searchsorted(reached, _HALF)), len(order) - 1)]]


def _mixture(evidence: Array, adapter: Array, share: float) -> Array:
    if share == 1:  # never 0 x -inf
        return adapter
    mixed: Array = np.logaddexp(np.log1p(-share) + evidence, np.log(share) + adapter)
    return mixed
