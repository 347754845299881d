"""Fit a stack's coefficients: a ridge-penalised conditional logit over many users' items (protocol section 1)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import logsigmoid

from oppu.fusion import DEFAULT, FLOOR, Stack, length

Array = NDArray[np.float64]
_RIDGE = 1e-3
_STEPS = 60
PRIOR_DEVIATION = 1.0
_BEGIN = {"base": 0.7, "knn": 0.5, "prior": 0.5, "adapter": 0.5}


@dataclass(frozen=True, slots=True)
class Seen:
    """One item to fit on: each source's log probabilities ``[c]`` (``None``: nothing), which choice was right, and
    how many events came before."""

    sources: Mapping[str, Array | None] = field(repr=False)
    right: int
    events: int


def fit(items: Sequence[Seen], names: Sequence[str], order: Sequence[int] | None = None) -> Stack:
    """Fit coefficients by mean log loss; of ratings, by the mean ranked probability score.

    That score (Epstein, Journal of Applied Meteorology 8, 1969) sums the squared distances of the cumulated
    distribution: unlike the log loss it knows which wrong ratings are near, by which a median is judged.

    Args:
        items: At least one; choices that an item lacks of the longest have no part in its softmax.
        names: The sources to use.
        order: Of ratings, the choices from the lowest to the highest.

    Returns:
        The stack.
    """
    counts = np.array([len(next(s for s in item.sources.values() if s is not None)) for item in items])
    said = np.zeros((len(items), len(names), counts.max()))  # [n, s, c]
    for at, item in enumerate(items):
        for k, name in enumerate(names):
            source = item.sources[name]
            if source is not None:
                said[at, k, : counts[at]] = np.maximum(source, FLOOR)
    absent = torch.from_numpy(np.arange(counts.max()) >= counts[:, None])
    lengths = torch.from_numpy(length(np.array([item.events for item in items])))[:, None, None]
    table = torch.from_numpy(said)
    features = torch.cat([table, table * lengths], dim=1)
    right = torch.tensor([item.right for item in items])
    begin = torch.tensor([_BEGIN[n] for n in names] + [0.0] * len(names), dtype=torch.float64)
    weights = begin.clone().requires_grad_(True)

    def loss() -> torch.Tensor:
        logits = torch.einsum("nsc,s->nc", features, weights).masked_fill(absent, -torch.inf)
        ridge = _RIDGE * ((weights - begin) ** 2).sum()
        if order is None:
            return torch.nn.functional.cross_entropy(logits, right) + ridge
        return _ranked_score(logits[:, list(order)], torch.tensor(list(order)).argsort()[right]) + ridge

    found = minimised(weights, loss)
    return Stack({n: (float(found[k]), float(found[k + len(names)])) for k, n in enumerate(names)})


def _ranked_score(logits: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Return the mean ranked probability score of ``[n, c]`` logits in order of value; ``rank`` ``[n]`` was right."""
    reached = (torch.arange(logits.shape[1]) >= rank[:, None]).to(logits.dtype)
    score: torch.Tensor = ((logits.softmax(-1).cumsum(-1) - reached) ** 2).sum(-1).mean()
    return score


def mixture_share(truths: Array, events: Sequence[int]) -> tuple[float, float]:
    """Return level and slope of the second expert's log odds that explain outcomes best.

    They are shrunk towards the built-in ones by a normal prior of deviation ``PRIOR_DEVIATION``: a sample of short
    histories says little of long ones.

    Args:
        truths: ``[n, 2]`` log probability of what happened, by expert.
        events: Of each, how many came before it.

    Returns:
        As ``Fusion.share``.
    """
    begin = torch.tensor(DEFAULT.share, dtype=torch.float64)
    odds = begin.clone().requires_grad_(True)
    lengths = torch.from_numpy(length(np.array(events)))
    said = torch.from_numpy(truths)

    def loss() -> torch.Tensor:
        logits = odds[0] + odds[1] * lengths
        both = torch.stack([logsigmoid(-logits), logsigmoid(logits)], dim=1) + said
        return (((odds - begin) / PRIOR_DEVIATION) ** 2).sum() / 2 - both.logsumexp(dim=1).sum()

    level, slope = minimised(odds, loss)
    return float(level), float(slope)


def minimised(weights: torch.Tensor, loss: Callable[[], torch.Tensor]) -> Array:
    """Return the weights ``[…] float64`` at which a loss of them is least, by L-BFGS from where they stand.

    Args:
        weights: Leaf that takes gradients; changed in place.
        loss: Returns the loss of ``weights`` as they are, a scalar.

    Returns:
        The weights.
    """
    optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(step)  # type: ignore[no-untyped-call]
    found: Array = weights.detach().numpy()
    return found
