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
        How many a block has now; ``None`` where its layers cannot be told and stay whole: those that lead to the
        neurons, a gate among them maybe, and the one that leads back have a width that no others have (which gate and
        values in one matrix have not).
    """
    linear = [[part for part in block.modules() if isinstance(part, Linear)] for block in blocks]
    for name in _WIDTHS:
        width: int | None = getattr(config, name, None)
        leading = [[part for part in own if part.out_features == width] for own in linear]
        back = [[part for part in own if part.in_features == width] for own in linear]
        if width not in {None, config.hidden_size} and all(leading) and all(len(own) == 1 for own in back):
            kept = max(1, round(share * width))
            for own, [leads_back] in zip(leading, back, strict=True):
                _keep(own, leads_back, kept)
            setattr(config, name, kept)
            return kept
    return None


def _keep(leading: Sequence[Linear], leads_back: Linear, count: int) -> None:
    """A neuron weighs as much as the product of the norms of what leads to it and from it."""
    norms = [part.weight.norm(dim=1) for part in leading]
    stay = torch.stack([*norms, leads_back.weight.norm(dim=0)]).prod(dim=0).topk(count).indices.sort().values
    for part in leading:
        part.weight, part.out_features = Parameter(part.weight[stay]), count
        if part.bias is not None:
            part.bias = Parameter(part.bias[stay])
    leads_back.weight, leads_back.in_features = Parameter(leads_back.weight[:, stay]), count
