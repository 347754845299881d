"""What updater and inference ask of the retriever, as values.

Letters: q queries, k hits of a query.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from oppu.values import Event, UserId, UserState

TEMPERATURE = 0.1
"""Of neighbours' weights: a tenth of similarity is worth a factor of e."""


class Degradation(StrEnum):
    """Why an answer rests on less evidence than was asked for; the values of ``Retrieved.degraded``."""

    EPOCH_BEHIND = "epoch_behind"
    HISTORY_BEHIND = "history_behind"
    EMBEDDER_MISMATCH = "embedder_mismatch"


@dataclass(frozen=True, slots=True)
class Query:
    """One question to a user's history. ``before_seq`` hides events from that seq on (training sees the past only).

    ``exclude_input`` hides items with exactly this input, so that an item is never its own neighbour where its
    seq is not known.
    """

    user: UserState
    task: str
    text: str = field(repr=False)
    k: int
    neighbours: int = 0
    before_seq: int | None = None
    exclude_input: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved event; ``similarity`` is the cosine in [-1, 1] (NaN where the mode has none)."""

    event: Event
    similarity: float


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What one query found: ``hits`` for the prompt, best first; ``neighbours`` for the kNN distribution.

    ``hits`` hold no text twice; ``neighbours`` do, since every repeat is a vote. Their events carry
    no embedding, and of choices only whether there were any (an empty tuple).
    ``through_seq`` is the last event that could have been found; ``degraded`` is a :class:`Degradation`.
    """

    hits: tuple[Hit, ...]
    neighbours: tuple[Hit, ...]
    through_seq: int
    degraded: str | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """Statistics of one user's history in one task, up to ``through_seq``.

    ``prior`` maps outputs to recency-weighted counts; ``line`` is the prompt's sentence.
    """

    user_id: UserId = field(repr=False)
    version: str
    through_seq: int
    prior: dict[str, float] = field(repr=False)
    line: str = field(repr=False)


def nearness(neighbours: Sequence[Hit]) -> list[float]:
    """Return each neighbour's weight, exp(similarity / temperature), the nearest one's being 1 (kNN-LM's form)."""
    top = max((hit.similarity for hit in neighbours), default=0.0)
    return [math.exp((hit.similarity - top) / TEMPERATURE) for hit in neighbours]


def knn_distributions(neighbours: Sequence[Sequence[Hit]], choices: Sequence[str]) -> NDArray[np.float64]:
    """Return the similarity-weighted vote of each query's neighbours' outputs over the same ``choices``, smoothed.

    kNN-LM's form (Khandelwal et al., arXiv 1911.00172): weight exp(similarity / temperature), the nearest one's
    being 1. Neighbours without a similarity have no vote.

    Args:
        neighbours: Of each query.
        choices: The allowed outputs, distinct.

    Returns:
        ``[q, c] float64``; NaN throughout where no neighbour with a vote gave any of the choices.
    """
    shape = (len(neighbours), max(map(len, neighbours), default=0))
    number = {choice: at for at, choice in enumerate(choices)}
    others = len(choices)
    alike, given = np.full(shape, -np.inf), np.full(shape, others)
    for row, own in enumerate(neighbours):
        alike[row, : len(own)] = [hit.similarity for hit in own]
        given[row, : len(own)] = [number.get(hit.event.output, others) for hit in own]
    known = np.isfinite(alike)
    alike, given = np.where(known, alike, -np.inf), np.where(known, given, others)
    nearest = alike.max(axis=1, keepdims=True, initial=-1.0)
    weights = np.exp((alike - nearest) / TEMPERATURE)
    columns = others + 1
    places = given + columns * np.arange(shape[0])[:, None]
    counts = np.bincount(places.ravel(), weights.ravel(), columns * shape[0]).reshape(shape[0], columns)[:, :others]
    smooth = 1.0
    heard = (given < others).any(axis=1, keepdims=True)
    total = np.where(heard, counts.sum(axis=1, keepdims=True), np.nan)
    distributions: NDArray[np.float64] = (counts + smooth / others) / (total + smooth)
    return distributions


def knn_distribution(neighbours: Sequence[Hit], choices: Sequence[str]) -> NDArray[np.float64] | None:
    """Return one query's of ``knn_distributions``, ``[c]``; ``None`` where no vote is for any of the choices."""
    if not choices:
        return None
    found: NDArray[np.float64] = knn_distributions([neighbours], choices)[0]
    return None if np.isnan(found).any() else found
