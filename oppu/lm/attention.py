"""What of the library's attention is done another way: plain products, and no look for packed sequences.

Plain products are for training short sequences in bfloat16 on a CPU. There the fused kernel's backward takes six times
as long (57 against 9 ms for 32 rows of 40 tokens), and torch's own unfused one multiplies in float32 and looks for
rows that are masked out: 3.4 against 1.9 ms for 16 rows of 27 tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_REPLACED = "sdpa"
_WARNING = "warn_if_padding_and_no_attention_mask"
_FIND_PACKED = masking_utils.find_packed_sequence_indices


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let models whose attention is torch's use plain products instead."""
    ALL_ATTENTION_FUNCTIONS[_REPLACED] = attend
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_REPLACED]


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Let the library take for granted that no row holds several sequences: it would wait for a GPU to tell."""
    masking_utils.find_packed_sequence_indices = _not_packed
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = _FIND_PACKED


def _not_packed(_positions: torch.Tensor) -> None:
    return None


def unwarned(model: torch.nn.Module) -> None:
    """Keep a model from looking for padding in its input at every forward, which would wait for a GPU; it has masks
    where it needs them."""
    for module in model.modules():
        if hasattr(module, _WARNING):
            setattr(module, _WARNING, lambda *_: None)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention without dropout, by transformers' interface; no row may be masked out as a whole.

    Letters: h heads, g heads of keys and values (a divisor of h), d their width.

    Args:
        module: The layer; its ``is_causal`` counts where nothing else says.
        query: ``[n, h, t, d]``.
        key: ``[n, g, t, d]``.
        value: ``[n, g, t, d]``.
        attention_mask: ``[n or 1, h or 1, t, t]``: what is true is read, or numbers to add; ``None``: none.
        scaling: Of the products; ``None``: 1 / sqrt(d).
        is_causal: Whether, without a mask, later positions are hidden.

    Returns:
        ``[n, t, h, d]`` in the query's type; no weights.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    products = (query @ key.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32))
    scores = products * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        hidden = attention_mask.dtype == torch.bool
        scores = scores.masked_fill(~attention_mask, -torch.inf) if hidden else scores + attention_mask
    elif getattr(module, "is_causal", True) if is_causal is None else is_causal:
        scores = scores + torch.full(scores.shape[2:], -torch.inf, device=scores.device).triu(1)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2), None
