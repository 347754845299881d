"""Fuse what base, evidence and adapter say of a choice, each by what it has earned.

Two layers, both pure. A *stack* is a conditional logit over the sources' log probabilities, its coefficients fitted
once on users the base has not seen; one stack knows the adapter, one does not. A user's *trust* is a fixed-share
Bayes mixture over the stacks (Herbster and Warmuth, Machine Learning 32, 1998): a stack's share grows with how well
it foresaw that user's own events, and some of it returns to the start at every event, so that trust can shift.
Invariant: with a start weight w of an expert, the mixture's cumulative log loss stays within
-ln w - T ln(1 - share) of that expert's, on every stream of T events.

Letters: c choices, s sources, n events, k experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from inference.combine import log_softmax

Array = NDArray[np.float64]

SOURCES = ("base", "knn", "prior", "adapter")
FLOOR = -20.0
"""A log probability is not worth less: one source alone cannot forbid a choice."""
LOG_SCALE = 5.0
"""A history of e^5 events moves a coefficient by its whole slope."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Coefficients by source: of its log probability, and of that times log(1 + events) / 5.

    A source that is not named has none. JSON form: ``{"base": [level, slope], ...}``.
    """

    coefficients: Mapping[str, tuple[float, float]]

    def scores(self, sources: Mapping[str, Array | None], events: int) -> Array:
        """Weigh one item's sources.

        Args:
            sources: Log probabilities ``[c]`` by source; ``None`` where one has nothing to say.
            events: The user's events before this item.

        Returns:
            Log probabilities ``[c]``, normalised.
        """
        length = np.log1p(events) / LOG_SCALE
        total = np.zeros(1)
        for name, (level, slope) in self.coefficients.items():
            said = sources.get(name)
            if said is not None:
                total = total + (level + slope * length) * np.maximum(said, FLOOR)
        return log_softmax(total) if total.size > 1 else total


@dataclass(frozen=True, slots=True)
class Trust:
    """How a user's experts are weighed; ``start`` ``[k]`` sums to one and is what a new user gets."""

    start: Array = field(repr=False)
    share: float = 0.01

    def after(self, weights: Array, losses: Array) -> Array:
        """Return the weights ``[k]`` after one event with each expert's log loss ``[k]``, nats."""
        scaled = weights * np.exp(-(losses - losses.min()))
        moved: Array = (1 - self.share) * scaled / scaled.sum() + self.share * self.start
        return moved


def mix(weights: Array, experts: Sequence[Array]) -> Array:
    """Mix experts' log probabilities, each ``[c]``, by weights ``[k]``; returns log probabilities ``[c]``."""
    mixed: Array = np.logaddexp.reduce(np.stack(experts) + np.log(weights)[:, None], axis=0)
    return mixed
