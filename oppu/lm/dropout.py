"""Dropout whose masks are counted instead of drawn in turn.

What is dropped of an example depends on its own seed, the layer, the position and the feature: not on who shares the
batch, where it stands in it, or how far it is padded. So a user's training stays the same in any company.
"""

import hashlib
from dataclasses import dataclass

import torch

from oppu.lm.sequence_packing import Layout
from oppu.lm.transfer import sent

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LAYER = 1 << 40
"""More features of a row than any layer's input has."""
_BITS = 24
_AT_ONCE = 1 << 22
"""Features hashed together: bounds the memory of their 64-bit counters."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """What a batch drops of its adapters' inputs: the share, and a seed a sequence. They have a row each, or lie as the
    one of ``layouts`` says that has as many columns."""

    rate: float
    seeds: tuple[int, ...]
    layouts: tuple[Layout, ...] = ()


def row_seed(user: int, step: int, example: int) -> int:
    """Return the seed of one example of a user's training, from 0 to 2**63 - 1.

    Args:
        user: The training's own seed, of user and version.
        step: Optimizer steps before this one.
        example: The row's place in its step.

    Returns:
        The seed.
    """
    return int.from_bytes(hashlib.blake2b(f"{user}:{step}:{example}".encode(), digest_size=8).digest(), "big") >> 1


def dropped(x: torch.Tensor, dropout: Dropout, layer: int) -> torch.Tensor:
    """Return ``x`` with features zeroed at the rate and the others scaled by 1 / (1 - rate), as ``nn.Dropout`` does.

    Args:
        x: ``[n, t, in]``.
        dropout: Of the batch in these rows.
        layer: Number of the layer that reads it.

    Returns:
        ``[n, t, in]``, differentiable.
    """
    return x * (kept(x, dropout, layer) / (1 - dropout.rate)).to(x.dtype)


def kept(like: torch.Tensor, dropout: Dropout, layer: int) -> torch.Tensor:
    """Return what stays of a layer's input, ``[n, t, in] bool``, on its device.

    Args:
        like: ``[n, t, in]``.
        dropout: Of the batch in these rows.
        layer: Number of the layer that reads it.

    Returns:
        The mask.
    """
    wide = like.shape[2]
    begins = sent([_wrapped(seed + layer * _LAYER * _GAMMA) for seed in dropout.seeds], like.device)
    layout = next((layout for layout in dropout.layouts if layout.width == like.shape[1]), None)
    if layout is None:
        begins, positions = begins[:, None], torch.arange(like.shape[1], device=like.device)
    else:  # what belongs to nobody is as good as the last one's
        begins, positions = begins[layout.owners()], layout.positions()
    counters = begins + positions * _wrapped(wide * _GAMMA)
    features = torch.arange(wide, device=like.device) * _wrapped(_GAMMA)
    parts = torch.split(counters, max(1, _AT_ONCE // max(1, like[0].numel())))
    return torch.cat([_hashed(part[:, :, None] + features) >= round(dropout.rate * (1 << _BITS)) for part in parts])


def _hashed(x: torch.Tensor) -> torch.Tensor:
    """Return ``_BITS`` random bits of each 64-bit counter: splitmix64.

    The generator is the one of Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = (x ^ _shifted(x, 30)) * _wrapped(_FIRST)
    x = (x ^ _shifted(x, 27)) * _wrapped(_SECOND)
    return _shifted(x ^ _shifted(x, 31), 64 - _BITS)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Shift right without the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _wrapped(number: int) -> int:
    """Return a number as 64 signed bits."""
    return ((number + (1 << 63)) % (1 << 64)) - (1 << 63)
