"""Leave out neurons of feed-forward layers, whole ones, so that the matrices get smaller.

Those with the smallest weights go, as Li et al. do with filters (arXiv 1608.08710).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import Linear, Parameter

_WIDTHS = ("intermediate_size", "hidden_dim")
"""What configurations call the number of a block's feed-forward neurons."""


def narrow(blocks: Iterable[torch.nn.Module], config: Any, share: float) -> int | None:
    """Keep a share of each block's feed-forward neurons; what stays computes what it did.

    Args:
        blocks: A transformer's; changed in place.
        config: Its configuration; changed too, so that what is saved is read again.
        share: Of the neurons, what is kept, at least one.

    Returns:
        How many a block has now; ``None`` where its layers cannot be told and stay whole: only those that lead to the
        neurons, a gate among them maybe, and the one that leads back may have their number, or a multiple of it, as a
        dimension (gate and values in one matrix, norms between them, and some attentions' matrices have it too).
    """
    held = list(blocks)
    for name in _WIDTHS:
        width = getattr(config, name, None)
        if not isinstance(width, int) or width < 1:
            continue
        told = [_feed_forward(block, width) for block in held]
        layers = [found for found in told if found is not None]
        if layers and len(layers) == len(held):
            kept = max(1, round(share * width))
            for leading, leads_back in layers:
                _keep(leading, leads_back, kept)
            setattr(config, name, kept)
            return kept
    return None


def _feed_forward(block: torch.nn.Module, width: int) -> tuple[list[Linear], Linear] | None:
    """Return what leads to so many neurons, and what leads back, where nothing else can have to do with them."""
    linear = [part for part in block.modules() if isinstance(part, Linear)]
    leading = [part for part in linear if part.out_features == width]
    back = [part for part in linear if part.in_features == width]
    if not leading or len(back) != 1 or back[0].out_features % width == 0:
        return None
    known = {id(weight) for part in (*leading, *back) for weight in part.parameters()}
    others = [weight for weight in block.parameters() if id(weight) not in known]
    if any(part.in_features % width == 0 for part in leading) or any(
        size % width == 0 for weight in others for size in weight.shape
    ):
        return None
    return leading, back[0]


def _keep(leading: Sequence[Linear], leads_back: Linear, count: int) -> None:
    """A neuron weighs as much as the product of the norms of what leads to it and from it."""
    norms = [part.weight.norm(dim=1) for part in leading]
    stay = torch.stack([*norms, leads_back.weight.norm(dim=0)]).prod(dim=0).topk(count).indices.sort().values
    for part in leading:
        part.weight, part.out_features = Parameter(part.weight[stay]), count
        if part.bias is not None:
            part.bias = Parameter(part.bias[stay])
    leads_back.weight, leads_back.in_features = Parameter(leads_back.weight[:, stay]), count
