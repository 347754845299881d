"""Fuse what base, evidence and adapter say of a choice, each by what it has earned; and pick the answer. Pure.

A *stack* is a conditional logit over the sources' log probabilities, its coefficients fitted on users the base has
not seen (``oppu calibrate``). One stack is the evidence without an adapter; the adapter stands beside it as the second
expert of a mixture, for it has mostly learnt what kNN and prior already say, and a product would count that twice. Its
share rises with the user's history, from next to nothing to at most a half, so that no single event can cost more than
ln 2 against the evidence. What an adapter has *earned* on its user's own events, each scored before it was learnt,
moves the log odds of that share: a Bayes factor, tempered and slowly forgotten, for neighbouring events tell the same.

Letters: c choices, k experts; ``...`` any number of items' axes, none for one item alone. Invariants: an answer is
normalised; permuting the choices permutes it; an absent source changes nothing; items beside it change nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from oppu.errors import ConfigError
from oppu.tasks import Kind

Array = NDArray[np.float64]
Sources = Mapping[str, Array | None]
"""Log probabilities ``[..., c]`` by source (``base``, ``knn``, ``prior``, ``adapter``); ``None`` or absent: silent of
all items."""
Events = int | NDArray[np.int64]
"""How many events a user had before an item, ``[...]``."""

NAMES = ("base", "knn", "prior", "adapter")
FILE = "fusion.json"
"""Beside a base's weights: what was fitted for it."""

FLOOR = -20.0
"""A log probability is not worth less: one source alone cannot forbid a choice."""
LOG_SCALE = 5.0
"""A history of e^5 events moves a coefficient by its whole slope."""
MOST_SHARE = 0.5
"""No adapter has more than a half."""
KEPT, PACE, MOST_GAIN = 0.9, 0.25, 3.0
"""Of what an adapter has earned this much is kept at each event, and of an event's gain (nats, cut) this much is
added: an adapter that goes on costing half a nat an event falls from a half to a fifth. Chosen on development data,
where it is as good as no such weighing for the average user; faster paces are worse."""

PRIOR_SMOOTHING = 1.0
"""Pseudo-events spread evenly over the choices, so that an output not seen yet stays possible (the kNN vote has
the same)."""

_HALF = 0.5 - 1e-12
"""The median's mark, less what summing rounds away."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Coefficients by source: of its log probability, and of that times log(1 + events) / 5.

    A source that is not named has none. JSON form: ``{"base": [level, slope], ...}``.
    """

    coefficients: Mapping[str, tuple[float, float]]

    def scores(self, sources: Sources, events: Events) -> Array:
        """Weigh items' sources.

        Args:
            sources: What each says; at least one that is named here.
            events: The user's events before each item.

        Returns:
            Log probabilities ``[..., c]``, normalised.
        """
        at = length(events)[..., None]
        total: Array | None = None
        for name, (level, slope) in self.coefficients.items():
            said = sources.get(name)
            if said is not None:
                part = (level + slope * at) * np.maximum(said, FLOOR)
                total = part if total is None else total + part
        if total is None:
            raise ValueError(f"expected something of {', '.join(self.coefficients)}")
        return log_softmax(total)


@dataclass(frozen=True, slots=True)
class Fusion:
    """How one base's answers are made.

    Attributes:
        alone: The stack without an adapter.
        beside: The one with it; by default the adapter alone.
        share: Level and slope (over ``length``) of the log odds of ``beside`` in the mixture; the share that they
            give is cut at ``MOST_SHARE``.
    """

    alone: Stack
    beside: Stack
    share: tuple[float, float]

    def weights(self, events: Events, earned: float | Array = 0.0) -> Array:
        """Return the shares ``[..., 2]`` of ``alone`` and ``beside`` after so many events, by what adapters earned."""
        level, slope = self.share
        odds = np.minimum(level + slope * length(events), 0.0) + earned  # from its most a share falls at once
        share = np.minimum(1 / (1 + np.exp(-np.clip(odds, FLOOR, -FLOOR))), MOST_SHARE)
        return np.stack([1 - share, share], axis=-1)

    def gain(self, sources: Sources, events: int, right: int) -> float:
        """Return how many nats ``beside`` foresaw the outcome ``right`` better than ``alone`` did."""
        return float(self.beside.scores(sources, events)[right] - self.alone.scores(sources, events)[right])

    def scores(self, sources: Sources, events: Events, earned: float | Array = 0.0) -> Array:
        """Answer items.

        Args:
            sources: What each says; ``base`` always.
            events: The user's events before each item.
            earned: By each user's adapter, as of ``earn``, ``[...]``.

        Returns:
            Log probabilities ``[..., c]``, normalised.
        """
        if sources.get("adapter") is None:
            return self.alone.scores(sources, events)
        return mix(
            self.weights(events, earned), [self.alone.scores(sources, events), self.beside.scores(sources, events)]
        )

    def heard(self, sources: Sources) -> frozenset[str]:
        """Name the sources that ``scores`` weighs."""
        beside = self.beside.coefficients if sources.get("adapter") is not None else {}
        return frozenset(name for name in {*self.alone.coefficients, *beside} if sources.get(name) is not None)

    def adapter_share(self, events: int) -> float:
        """Return the adapter's share after so many events."""
        return float(self.weights(events)[1])

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        content = {
            "alone": {name: list(pair) for name, pair in self.alone.coefficients.items()},
            "beside": {name: list(pair) for name, pair in self.beside.coefficients.items()},
            "share": list(self.share),
        }
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


DEFAULT = Fusion(
    alone=Stack({"base": (0.5, -0.2), "knn": (0.5, -0.1), "prior": (0.15, 0.35)}),
    beside=Stack({"adapter": (1.0, 0.0)}),
    share=(-9.0, 10.5),
)
"""Where nothing was fitted: rounded from fits on the offline base. The share reaches a tenth at 24 events and a half at
70; log loss alone would let it rise more slowly, accuracy is better so."""


def read_fitted(path: Path, setting: str, parts: str) -> dict[str, Any]:
    """Read a file of fitted weights.

    Args:
        path: The JSON file.
        setting: Names it in errors.
        parts: What it should hold, for the error.

    Returns:
        Its object.

    Raises:
        ConfigError: It cannot be read, or is no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{setting}: {path}: expected an object with {parts}")
    return content


def are_finite(values: object, count: int) -> TypeGuard[list[float]]:
    """Say whether something read from JSON is a list of so many finite numbers."""
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(x, int | float) and not isinstance(x, bool) and bool(np.isfinite(x)) for x in values)
    )


def load_fusion(path: Path) -> Fusion:
    """Read what was fitted for a base.

    Args:
        path: The JSON file.

    Returns:
        Its content.

    Raises:
        ConfigError: Naming the file and the field.
    """
    content = read_fitted(path, "model.fusion", "alone, beside and share")
    share = _pair(path, "share", content.get("share"))
    alone, beside = _stack(path, content, "alone", NAMES[:3], "base"), _stack(path, content, "beside", NAMES, "adapter")
    return Fusion(alone, beside, share)


def sources_of(base: Array, adapter: Array | None, vote: Array | None, prior: Array | None) -> Sources:
    """Gather what is known of items.

    Args:
        base: Log probabilities ``[..., c]`` of the model alone.
        adapter: The same with the users' adapters.
        vote: The neighbours' distribution ``[..., c]``.
        prior: The users' own, as of ``recency_prior``.

    Returns:
        By source.
    """
    return {
        "base": base,
        "adapter": adapter,
        "knn": None if vote is None else np.log(vote),
        "prior": None if prior is None else np.log(prior),
    }


def earn(earned: float, gain: float) -> float:
    """Return what an adapter has earned after one more event.

    Args:
        earned: Log odds earned so far; 0 of a new adapter.
        gain: The evidence's log loss of the event less that of ``beside``, nats; cut at ``MOST_GAIN``. What is not a
            number counts as the largest loss.

    Returns:
        Log odds.
    """
    gain = -MOST_GAIN if math.isnan(gain) else gain
    return KEPT * earned + PACE * min(max(gain, -MOST_GAIN), MOST_GAIN)


def length(events: Events) -> Array:
    """Return the measure of a history that slopes go by, ``[...]``."""
    return np.asarray(np.log1p(events) / LOG_SCALE)


def mix(weights: Array, experts: Sequence[Array]) -> Array:
    """Mix experts' log probabilities, each ``[..., c]``, by positive weights ``[..., k]``; returns log probabilities
    ``[..., c]``."""
    said = [expert + np.log(weights[..., number, None]) for number, expert in enumerate(experts)]
    mixed: Array = reduce(np.logaddexp, said)
    return mixed


def log_softmax(scores: Array) -> Array:
    """Normalise log scores ``[..., c]``; a shift of an item's changes nothing."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    normalised: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalised


def recency_priors(counts: Sequence[Mapping[str, float]], choices: Sequence[str]) -> Array:
    """Turn users' recency-weighted counts of outputs into distributions over the same ``choices``.

    Args:
        counts: Of each user, the weight of each output given.
        choices: The allowed outputs.

    Returns:
        ``[n, c] float64``; NaN throughout for a user who never gave any of them.
    """
    given = [[own.get(choice, 0.0) for choice in choices] for own in counts]
    seen = np.maximum(np.array(given, dtype=np.float64).reshape(len(counts), len(choices)), 0.0)
    total = seen.sum(axis=1, keepdims=True)
    usable = (total > 0) & np.isfinite(total)
    priors: Array = (seen + PRIOR_SMOOTHING / len(choices)) / (np.where(usable, total, np.nan) + PRIOR_SMOOTHING)
    return priors


def recency_prior(counts: Mapping[str, float], choices: Sequence[str]) -> Array | None:
    """Return one user's of ``recency_priors``, ``[c]``, or ``None`` where that user never gave any of them."""
    prior: Array = recency_priors([counts], choices)[0]
    return None if np.isnan(prior).any() else prior


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


def _stack(path: Path, content: Mapping[str, Any], field_name: str, allowed: Sequence[str], needed: str) -> Stack:
    found = content.get(field_name)
    if not isinstance(found, dict) or needed not in found or not set(found) <= set(allowed):
        raise ConfigError(f"model.fusion: {path}: {field_name}: expected coefficients of {', '.join(allowed)}")
    return Stack({name: _pair(path, f"{field_name}.{name}", pair) for name, pair in found.items()})


def _pair(path: Path, field_name: str, pair: object) -> tuple[float, float]:
    if not are_finite(pair, 2):
        raise ConfigError(f"model.fusion: {path}: {field_name}: expected two finite numbers")
    return float(pair[0]), float(pair[1])
