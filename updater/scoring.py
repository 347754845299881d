"""Score examples under one user's weights, and decide whether a candidate is good enough to serve.

Letters: n examples. Losses are nats an example. The decision is pure; a candidate must beat both the parent and no
adapter by mean loss on events it has not seen, and a tie keeps the parent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oppu.lm.port import Example, LanguageModel, Tensors

CHUNK = 64
"""Examples scored between two heartbeats."""


@dataclass(frozen=True, slots=True, eq=False)
class Assessment:
    """``losses`` ``[n] float64`` nats; ``correct`` ``[n] bool``, false for free text; ``scores``: each example's log
    probabilities, of its choices ``[c] float64`` or of its text's tokens ``[t] float64``."""

    losses: NDArray[np.float64]
    correct: NDArray[np.bool_]
    scores: tuple[NDArray[np.float64], ...] = ()

    def last(self, n: int) -> "Assessment":
        """Return the part of the last ``n`` examples."""
        start = len(self.losses) - n
        return Assessment(self.losses[start:], self.correct[start:], self.scores[start:])

    @property
    def mean(self) -> float:
        """Mean loss; NaN of nothing."""
        return float(self.losses.mean()) if len(self.losses) else float("nan")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to publish, and why not."""

    publish: bool
    reason: str
    metrics: dict[str, float]


def assess(
    model: LanguageModel, examples: Sequence[Example], tensors: Tensors | None, beat: Callable[[], None]
) -> Assessment:
    """Score examples under one user's weights.

    Args:
        model: The base with a scoring path.
        examples: What to score.
        tensors: The weights; ``None`` for the base alone.
        beat: Called between chunks.

    Returns:
        Losses, hits and scores, in order; one forward gives them all: a choice example's loss is its output's negative
        log probability, a text's the mean over its tokens.
    """
    losses = np.zeros(len(examples), dtype=np.float64)
    correct = np.zeros(len(examples), dtype=np.bool_)
    scores: list[NDArray[np.float64]] = [np.zeros(0)] * len(examples)
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        for at, (example, said) in enumerate(zip(chunk, model.scores(chunk, tensors), strict=True), start):
            scores[at] = np.asarray(said, dtype=np.float64)
            if example.choices:
                right = example.choices.index(example.output)
                losses[at], correct[at] = -scores[at][right], int(np.argmax(said)) == right
            elif len(said):
                losses[at] = -scores[at].mean()
        beat()
    return Assessment(losses, correct, tuple(scores))


def verdict(candidate: Assessment, parent: Assessment | None, none: Assessment) -> Verdict:
    """Compare a candidate with what is served, on the same held-back events.

    Args:
        candidate: Under the trained weights.
        parent: Under the weights that are served now; ``None`` where there are none or they cannot be read.
        none: Under the base alone.

    Returns:
        Publish only where the candidate's mean loss is finite and lower than both others'.
    """
    metrics = {
        "holdout_events": float(len(candidate.losses)),
        "loss_candidate": candidate.mean,
        "loss_none": none.mean,
        "correct_candidate": float(candidate.correct.sum()),
        "correct_none": float(none.correct.sum()),
    }
    if parent is not None:
        metrics |= {"loss_parent": parent.mean, "correct_parent": float(parent.correct.sum())}
    if not np.isfinite(candidate.mean):
        return Verdict(False, "loss on held-back events is not finite", metrics)
    # written so that a loss that is no number on the other side never blocks a sound candidate
    if none.mean <= candidate.mean:
        return Verdict(False, "not better than no adapter on held-back events", metrics)
    if parent is not None and parent.mean <= candidate.mean:
        return Verdict(False, "not better than the parent on held-back events", metrics)
    return Verdict(True, "", metrics)
