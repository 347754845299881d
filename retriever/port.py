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


def nearness(neighbours: Sequence[Hit], *, temperature: float = 0.1) -> list[float]:
    """Return each neighbour's weight, exp(similarity / temperature), the nearest one's being 1 (kNN-LM's form)."""
    top = max((hit.similarity for hit in neighbours), default=0.0)
    return [math.exp((hit.similarity - top) / temperature) for hit in neighbours]


def knn_distribution(
    neighbours: tuple[Hit, ...], choices: tuple[str, ...], *, temperature: float = 0.1
) -> NDArray[np.float64] | None:
    """Return the similarity-weighted vote of the neighbours' outputs over ``choices``: ``[c] float64``, smoothed.

    kNN-LM's form (Khandelwal et al., arXiv 1911.00172): weight exp(similarity / temperature). ``None`` where no
    neighbour gave any of the choices.
    """
    weights = dict.fromkeys(choices, 0.0)
    if not any(hit.event.output in weights for hit in neighbours):
        return None
    for hit, weight in zip(neighbours, nearness(neighbours, temperature=temperature), strict=True):
        if hit.event.output in weights:
            weights[hit.event.output] += weight
    counts = np.array([weights[choice] for choice in choices], dtype=np.float64)
    total = counts.sum()
    smooth = 1.0
    distribution: NDArray[np.float64] = (counts + smooth / len(choices)) / (total + smooth)
    return distribution
