"""What of the library's attention is done another way: plain products, and no look for packed sequences.

Plain products are faster than torch's fused kernel for sequences of up to a few hundred tokens in bfloat16, on a CPU
that multiplies it:

- training: the fused kernel's backward takes six times as long (57 against 9 ms for 32 rows of 40 tokens), and torch's
  own unfused one multiplies in float32 and looks for rows that are masked out: 3.4 against 1.9 ms for 16 rows of 27
  tokens;
- reading and decoding, on processors with vectors of bfloat16 and without matrix units, which the fused kernel uses: .4
  to .7 of its time for rows of 8 to 256 tokens, .5 to .8 for a token of narrow heads after others (``python -m
  benchmarks.products``); with such units 1.1 to 1.7, a trial.

They round scores to bfloat16, as the library's own eager attention does and the fused kernel does not. Whoever serves
with them looks whether that changes a model first.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oppu.lm.hardware import fast_bfloat16, matrix_units, vector_bfloat16

_REPLACED = "sdpa"
_LIBRARY = ALL_ATTENTION_FUNCTIONS[_REPLACED]
_MARK = "_oppu_plain_attention"
_NUMBERS = itertools.count()
_PLAIN_TOKENS = 256
"""Up to so many, all products of a row's positions lie in memory without harm."""
_TRAINED_TOKENS = 192
"""The same while training, which holds a few copies of them."""
DECODED_ROWS = 8
"""With fewer, a token's attention takes the fused kernel, which is one call instead of five."""
_DECODED_WIDTH = 64
"""Of a head: with wider ones, or where heads share keys, the fused kernel decodes faster."""
_SCORES_BYTES = 4 << 20
"""Of products held at once while nothing is learnt, so that they stay in the cache; of 256 KiB to 64 MiB the best."""
_OTHERWISE = ("position_bias", "cache", "softcap")
"""Arguments of the library's under which it computes, or refuses, something else."""
_WARNING = "warn_if_padding_and_no_attention_mask"
_FIND_PACKED = masking_utils.find_packed_sequence_indices


class PlainAttention:
    """Lets a model whose attention is torch's use plain products where those are faster, and copies that are made of it
    meanwhile. All others stay as they are."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Attach to a model, in the place of whoever was attached to it.

        Args:
            model: Any.
        """
        self._number = next(_NUMBERS)
        self._modules = list(model.modules())
        self._attach(self._modules)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Leave the attention to the library for a while."""
        held = self._held()
        self.close()
        try:
            yield
        finally:
            self._attach(held)

    def close(self) -> None:
        """Leave the attention to the library; nothing happens where another one is attached by now."""
        for module in self._held():
            del vars(module)[_MARK]

    def _held(self) -> list[torch.nn.Module]:
        return [module for module in self._modules if vars(module).get(_MARK) == self._number]

    def _attach(self, modules: Sequence[torch.nn.Module]) -> None:
        for module in modules:
            vars(module)[_MARK] = self._number


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **how: Any,
) -> tuple[torch.Tensor, None]:
    """Stand in for the library's function: what is not marked, or is not faster, goes on to it."""
    if _MARK in vars(module) and _pays(query, key) and _fits(query, key, attention_mask, how):
        return attend(module, query, key, value, attention_mask, **how)
    found: tuple[torch.Tensor, None] = _LIBRARY(module, query, key, value, attention_mask, **how)
    return found


ALL_ATTENTION_FUNCTIONS[_REPLACED] = _attention  # once: threads that come and go must not take it from each other


def _fits(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, how: Mapping[str, object]) -> bool:
    """Say whether plain products are what is asked for. A mask of the library's may hide a row of several positions as
    a whole, padding on the left, which has no softmax."""
    length = query.shape[2]
    if len(query) != len(key) or how.get("dropout") or any(how.get(name) is not None for name in _OTHERWISE):
        return False
    if mask is None:
        return length in (1, key.shape[2])
    return mask.dim() == 4 and (length == 1 or mask.dtype != torch.bool)


def _pays(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Say whether plain products are faster."""
    rows, heads, length, width = query.shape
    half = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if not half or query.device.type != "cpu":
        return False
    if torch.is_grad_enabled():
        return length <= _TRAINED_TOKENS
    if not _slow_kernel() or key.shape[2] > _PLAIN_TOKENS:
        return False
    return length > 1 or (rows >= DECODED_ROWS and heads == key.shape[1] and width <= _DECODED_WIDTH)


@cache
def _slow_kernel() -> bool:
    """Say whether this is a processor like those that the fused kernel was found to be slower on."""
    return fast_bfloat16("cpu") and vector_bfloat16() and not matrix_units()


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

    Letters: h heads, g heads of keys and values (a divisor of h), d and e their widths.

    Args:
        module: The layer; its ``is_causal`` counts where nothing else says.
        query: ``[n, h, t, d]``.
        key: ``[n, g, s, d]``; ``s`` is ``t`` where there is no mask, unless ``t`` is 1.
        value: ``[n, g, s, e]``.
        attention_mask: ``[n or 1, h or 1, t, s]``: what is true is read, or numbers to add; ``None``: none.
        scaling: Of the products; ``None``: 1 / sqrt(d).
        is_causal: Whether, without a mask, later positions are hidden from several.

    Returns:
        ``[n, t, h, e]`` in the values' type, contiguous; no weights.
    """
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if (
        attention_mask is None
        and length > 1
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    ):
        attention_mask = torch.full((1, 1, length, length), -torch.inf, device=query.device).triu(1)
    elif attention_mask is not None and attention_mask.dtype == torch.bool:  # adding is faster than filling
        none = torch.zeros(attention_mask.shape, device=query.device)
        attention_mask = none.masked_fill_(~attention_mask, -torch.inf)
    scale = width**-0.5 if scaling is None else scaling
    if torch.is_grad_enabled():
        found = _weighed(query, key, value, attention_mask, scale)
    else:
        most = max(1, _SCORES_BYTES // (4 * query.shape[1] * query.shape[2] * key.shape[2]))
        parts = zip(*(_parts(x, rows, most) for x in (query, key, value, attention_mask)), strict=True)
        found = torch.cat([_weighed(q, k, v, mask, scale) for q, k, v, mask in parts])
    return found.reshape(rows, heads, length, value.shape[-1]).transpose(1, 2).contiguous(), None


def _weighed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return the values' means by the softmax of products, which is computed in at least float32."""
    products = query @ key.transpose(2, 3)
    scores = products.to(torch.promote_types(products.dtype, torch.float32)).mul_(scale)
    if mask is not None:
        scores = scores.add_(mask)
    return scores.softmax(-1).to(value.dtype) @ value


def _parts(x: torch.Tensor | None, rows: int, most: int) -> Sequence[torch.Tensor | None]:
    """Cut along the rows; what all rows share is repeated."""
    if x is None or len(x) != rows:
        return [x] * -(-rows // most)
    return torch.split(x, most)
