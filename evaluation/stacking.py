"""Fit a stack's coefficients: a ridge-penalised conditional logit over many users' items (protocol section 1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from inference.fusion import FLOOR, LOG_SCALE, Stack

Array = NDArray[np.float64]
_RIDGE = 1e-3
_STEPS = 60
_BEGIN = {"base": 0.7, "knn": 0.5, "prior": 0.5, "adapter": 0.5}


@dataclass(frozen=True, slots=True)
class Seen:
    """One item to fit on: each source's log probabilities ``[c]`` (``None``: nothing), which choice was right, and
    how many events came before."""

    sources: Mapping[str, Array | None] = field(repr=False)
    right: int
    events: int


def fit(items: Sequence[Seen], names: Sequence[str]) -> Stack:
    """Fit coefficients by mean log loss.

    Args:
        items: All with the same number of choices.
        names: The sources to use.

    Returns:
        The stack.
    """
    blank = np.zeros(len(next(s for s in items[0].sources.values() if s is not None)))
    said = np.stack(
        [[np.maximum(blank if (x := item.sources[n]) is None else x, FLOOR) for n in names] for item in items]
    )  # [n, s, c]
    length = torch.tensor([np.log1p(item.events) / LOG_SCALE for item in items])[:, None, None]
    table = torch.from_numpy(said)
    features = torch.cat([table, table * length], dim=1)
    right = torch.tensor([item.right for item in items])
    begin = torch.tensor([_BEGIN[n] for n in names] + [0.0] * len(names), dtype=torch.float64)
    weights = begin.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = torch.einsum("nsc,s->nc", features, weights)
        value = torch.nn.functional.cross_entropy(logits, right) + _RIDGE * ((weights - begin) ** 2).sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = weights.detach().numpy()
    return Stack({n: (float(found[k]), float(found[k + len(names)])) for k, n in enumerate(names)})
