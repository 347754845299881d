"""Where sequences lie when several share a row of one forward, and what keeps them apart.

Sequences of a few dozen tokens, one a row, are mostly padding and small products. In shared rows each has positions
from its own beginning, and attention sees no other. Invariant: every sequence lies whole in one row.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch

WIDTHS = (64, 128, 256)
"""Tokens of a row that are tried, or as many as the longest sequence has. Of 48 and 32, where attention costs less but
its products are small, MiniLM gained nothing more."""
ATTENTION = 600
"""A token's attention over so many others takes about as long as the rest of a block."""
OWN_WIDTHS = (64, 128)
"""Of rows that hold one owner's sequences, in training: wider ones have no fast gradient of attention in bfloat16, and
rows of 200 tokens took half as long again as rows of up to 128 with the long sequences by themselves."""
_NOBODY = -1
_NEAR = ("sliding_window", "local_attention", "attention_window", "attention_chunk_size", "keep_window_size")
"""Settings of models in which some layers look at near tokens only; a mask that we give replaces that."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sequences in ``rows`` of ``width`` places: of each its row and first column, and how long it is."""

    rows: int
    width: int
    places: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]

    @property
    def cost(self) -> int:
        """What a block computes of it, in products of a token with another or as much work."""
        return cost(self.rows, self.width)

    def by_row(self, numbers: Sequence[int]) -> list[int] | None:
        """Return a row's number where its sequences have the same, of all rows; ``None`` where one has several."""
        found: dict[int, int] = {}
        for (row, _), number in zip(self.places, numbers, strict=True):
            if found.setdefault(row, number) != number:
                return None
        return [found[row] for row in range(self.rows)]

    @property
    def in_order(self) -> list[int]:
        """The sequences as they follow each other, row by row."""
        return sorted(range(len(self.places)), key=self.places.__getitem__)

    def cells(self, sequence: int) -> range:
        """Return where a sequence lies, counted over all rows."""
        row, first = self.places[sequence]
        return range(row * self.width + first, row * self.width + first + self.lengths[sequence])

    def filled(self, sequences: Sequence[Sequence[int]], fill: int = 0) -> torch.Tensor:
        """Return numbers of each sequence's tokens where those lie ``[rows, width] int64``, elsewhere ``fill``."""
        found = np.full((self.rows, self.width), fill, dtype=np.int64)
        for (row, first), numbers in zip(self.places, sequences, strict=True):
            found[row, first : first + len(numbers)] = numbers
        return torch.from_numpy(found)

    def positions(self, begin: int = 0) -> torch.Tensor:
        """Return positions within their sequence ``[rows, width] int64``, the first of each being ``begin``."""
        return self.filled([range(begin, begin + length) for length in self.lengths], begin)

    def owners(self) -> torch.Tensor:
        """Return the sequence that each place belongs to ``[rows, width] int64``; −1: none."""
        return self.filled([[number] * length for number, length in enumerate(self.lengths)], _NOBODY)

    def mask(self, dtype: torch.dtype, *, causal: bool) -> torch.Tensor:
        """Return what to add to attention's scores ``[rows, 1, width, width]``: 0 within a sequence, else −∞.

        What belongs to none sees its like, so that no place is masked as a whole. Nothing finite passes −∞, however
        large; what is not finite reaches all of its row.
        """
        owners = self.owners()
        hidden = owners[:, None, :, None] != owners[:, None, None, :]
        if causal:
            hidden |= torch.ones(self.width, self.width, dtype=torch.bool).triu(1)
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)

    def narrowed(self, counts: Sequence[int]) -> "Layout":
        """Return how the rows look when of each sequence only so many places are kept, its first ones at the front.

        Its width never is this one's, so that the two can be told apart.
        """
        filled, places = [0] * self.rows, [(0, 0)] * len(counts)
        for sequence in self.in_order:
            row = self.places[sequence][0]
            places[sequence] = row, filled[row]
            filled[row] += counts[sequence]
        width = max(filled)
        return Layout(self.rows, width + (width == self.width), tuple(places), tuple(counts))


def packed(lengths: Sequence[int], owners: Sequence[int] = ()) -> Layout:
    """Lay sequences out in the rows of least cost.

    Args:
        lengths: Of each, at least one.
        owners: Of each whose it is, ascending: then no row holds sequences of two, and rows are in their order.

    Returns:
        Where they lie.
    """
    widths = sorted({max(width, *lengths) for width in (OWN_WIDTHS if owners else WIDTHS)})
    numbers = range(len(lengths))
    groups = [list(own) for _, own in groupby(numbers, key=owners.__getitem__)] if owners else [numbers]
    return min((_apart(lengths, groups, width) for width in widths), key=lambda layout: layout.cost)


def parts(order: Sequence[int], *limits: tuple[Sequence[int], int]) -> Iterator[list[int]]:
    """Cut sequences where a forward of several would hold more than it may.

    Args:
        order: Their numbers; each part follows on the one before.
        *limits: What each sequence has of something, by number, and how much of it a forward may hold.

    Yields:
        The numbers of a forward's sequences.
    """
    part, held = list[int](), [0] * len(limits)
    for number in order:
        more = [have + sizes[number] for have, (sizes, _) in zip(held, limits, strict=True)]
        if part and any(have > most for have, (_, most) in zip(more, limits, strict=True)):
            yield part
            part, more = [], [sizes[number] for sizes, _ in limits]
        part.append(number)
        held = more
    if part:
        yield part


def cost(rows: int, width: int) -> int:
    """Return what a block computes of so many rows of so many tokens, in products of a token with another."""
    return rows * width * (ATTENTION + width)


def looks_near(config: object, reach: float) -> bool:
    """Say whether some of a model's layers look at near tokens only.

    Args:
        config: The model's.
        reach: So many tokens are near enough.

    Returns:
        Whether any layer sees fewer, or has a kind of attention that is not known.
    """
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    sizes = [size for name in _NEAR if (size := getattr(config, name, None))]
    if not kinds <= {"full_attention", "sliding_attention"}:
        return True
    if not sizes:
        return "sliding_attention" in kinds
    return any(not isinstance(size, int) or size < reach for size in sizes)


def _apart(lengths: Sequence[int], groups: Sequence[Sequence[int]], width: int) -> Layout:
    """Lay out groups of sequences, each in rows of its own."""
    own = [_best_fit([lengths[number] for number in group], width) for group in groups]
    begins = [0, *accumulate(layout.rows for layout in own)]
    places = [(begin + row, first) for begin, layout in zip(begins, own, strict=False) for row, first in layout.places]
    return Layout(begins[-1], max(layout.width for layout in own), tuple(places), tuple(lengths))


def _best_fit(lengths: Sequence[int], width: int) -> Layout:
    """Put each sequence, the longest first, into the fullest row that has room for it (best-fit decreasing)."""
    room, rows, places = list[tuple[int, int]](), 0, [(0, 0)] * len(lengths)  # of each row what is left, ascending
    for sequence in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[sequence]
        at = bisect_left(room, (length, 0))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row, rows = width, rows, rows + 1
        places[sequence] = row, width - left
        insort(room, (left - length, row))
    return Layout(rows, width - room[0][0], tuple(places), tuple(lengths))
