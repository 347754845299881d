"""Where a bank keeps each target layer's factors: layers that read the same input side by side, a slot a row. Pure."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Layers of one parent that read the same input, by the names that model families give them."""
Rows = TypeVar("Rows", torch.Tensor, np.ndarray[Any, Any])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a target layer's factors lie: A at ``a`` and B's transpose at ``b`` in a row of ``weights[group]``;
    ``first`` is its place among the layers of the group."""

    group: int
    first: int
    a: int
    b: int
    wide: int
    out: int


def placed(targets: Mapping[str, nn.Module], rank: int) -> list[Place]:
    """Group the layers that read the same input; return each one's place.

    They are told by their names, and what reads the input of no other is a group of its own, so that nothing is
    gathered and multiplied that only other layers need. Where a name deceives, that is seen at run time.
    """
    keys = [(_reader(name), *_shape(module)) for name, module in targets.items()]
    groups = {key: at for at, key in enumerate(dict.fromkeys((reader, wide) for reader, wide, _ in keys))}
    sizes = Counter(groups[reader, wide] for reader, wide, _ in keys)
    members: Counter[int] = Counter()
    ends = {groups[reader, wide]: rank * wide * sizes[groups[reader, wide]] for reader, wide, _ in keys}
    places = []
    for reader, wide, out in keys:
        group = groups[reader, wide]
        places.append(Place(group, members[group], members[group] * rank * wide, ends[group], wide, out))
        members[group] += 1
        ends[group] += rank * out
    return places


def _reader(name: str) -> str:
    """Name what reads a layer's input: the layer, or the first of those that read it together."""
    parent, _, own = name.rpartition(".")
    return f"{parent}.{next((names[0] for names in _TOGETHER if own in names), own)}"


def factors_of(weights: Rows, place: Place, rank: int) -> tuple[Rows, Rows]:
    """Return A ``[k, r, in]`` and B's transpose ``[k, r, out]`` of one layer in ``weights`` ``[k, size]``; views."""
    a, b = (weights[:, at : at + rank * wide] for at, wide in ((place.a, place.wide), (place.b, place.out)))
    return a.reshape(len(weights), rank, place.wide), b.reshape(len(weights), rank, place.out)


def spans_of(weights: torch.Tensor, spans: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Return the columns of ``weights`` ``[k, size]`` from each start on, so many, in ascending order; views.

    One split, gaps and all, since the gradient of a view of its own would be as large as the whole.
    """
    sizes, wanted, at = list[int](), list[int](), 0
    for start, size in spans:
        sizes += [start - at, size]
        wanted.append(len(sizes) - 1)
        at = start + size
    parts = torch.split(weights, [*sizes, weights.shape[1] - at], 1)
    return [parts[place] for place in wanted]


def _shape(module: Any) -> tuple[int, int]:
    """Return (in, out); GPT-2's Conv1D keeps its weight the other way round."""
    first, second = (int(size) for size in module.weight.shape)
    return (first, second) if isinstance(module, Conv1D) else (second, first)
