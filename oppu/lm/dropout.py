"""Dropout whose masks are counted instead of drawn in turn.

What is dropped of an example depends on its own seed, the layer, the position and the feature: not on who shares the
batch, where it stands in it, or how far it is padded. So a user's training stays the same in any company.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
    """What a batch drops of its adapters' inputs: the share, and a seed a sequence.

    Where rows hold several, ``places`` has each place's sequence and position in it, both ``[n, t] int64``, by the
    number of columns that a layer reads; empty: sequences have a row each.
    """

    rate: float
    seeds: tuple[int, ...]
    places: Mapping[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def laid_out(self, layouts: Sequence[Layout]) -> "Dropout":
        """Return the same for sequences that share rows, one layout for each number of columns that layers read."""
        return replace(self, places={layout.width: (layout.owners(), layout.positions()) for layout in layouts})


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
    """Return what stays ``[n, t, in] bool`` of a layer's input that looks like this one, on its device."""
    _, columns, wide = like.shape
    begins = sent([_wrapped(seed + layer * _LAYER * _GAMMA) for seed in dropout.seeds], like.device)
    if dropout.places:
        owners, positions = dropout.places[columns]
        begins = begins[owners]  # what belongs to nobody, −1, is as good as the last one's
    else:
        begins, positions = begins[:, None], torch.arange(columns, device=like.device)
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
