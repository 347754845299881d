"""Which sequences of a batch have which adapter, and where in its rows their tokens lie.

Rows that hold one sequence each are taken as they lie, those of slot 0 in front. Where rows hold several, the adapted
ones' tokens are gathered, multiplied and added where they belong. Invariant: no two of them belong to one place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from oppu.lm.dropout import Dropout
from oppu.lm.places import Place
from oppu.lm.sequence_packing import Layout
from oppu.lm.transfer import sent

_LOOP_ROWS = 4
"""With so many rows a run of equal slots, a product a run costs less than a copy of its adapter a row."""
_LOOP_TOKENS = 128
"""The same in tokens, where rows hold several sequences."""
_PIECE_TOKENS = 16
"""What another piece of a sequence costs, its adapter's copy, in tokens that are gathered, multiplied and added."""
_Numbers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Gathered:
    """A batch's factors of some layers of a group: their A's transposes ``[k, in, r · layers]``, each one's B's
    transpose ``[k, r, out]``, and the scale that A lacks."""

    a: torch.Tensor
    b: tuple[torch.Tensor, ...]
    scale: float


@dataclass(frozen=True, slots=True)
class Spans:
    """Where adapted sequences lie in rows of several.

    ``slots`` ``[k]`` holds a slot a run. ``taken`` ``[k, m]`` are the places that are multiplied, counted over all
    rows; of these ``given`` ``[t]`` (``None``: all) are no padding, counted over all of them, and belong to ``places``
    ``[t]``. ``lengths`` are the runs' tokens where they differ: then ``taken`` is ``[1, t]``, and none is padded
    (empty: all runs have ``m``).
    """

    slots: torch.Tensor
    taken: torch.Tensor
    given: torch.Tensor | None
    places: torch.Tensor
    lengths: tuple[int, ...]

    def gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``[k, m, d]`` of ``[n, t, d]``."""
        return rows.flatten(0, 1).index_select(0, self.taken.flatten()).view(*self.taken.shape, -1)

    def add(self, y: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Add ``own``, ``[k, m, d]`` or flattened, in place to where it belongs in ``y`` ``[n, t, d]``."""
        flat = own.reshape(-1, own.shape[-1]).to(y.dtype)
        kept = flat if self.given is None else flat.index_select(0, self.given)
        y.view(-1, y.shape[-1]).index_add_(0, self.places, kept)
        return y


@dataclass(frozen=True, slots=True)
class Mix:
    """The sequences of a batch by adapter.

    Where ``rows`` hold one sequence each, ``slots`` ``[k]`` holds a slot a run of equal ones, the first ``plain`` rows
    have slot 0, and ``lengths`` are the runs' rows where they differ in length (empty: all have
    ``(rows - plain) / k``). Else ``spans`` say where the adapted tokens lie, by the columns of what a layer reads.
    ``kept`` are the factors, by the first layer that asks for them, that a next forward of the same batch finds
    gathered; ``None`` where they were gathered once and not kept.
    """

    rows: int
    slots: torch.Tensor
    plain: int = 0
    lengths: tuple[int, ...] = ()
    spans: dict[int, Spans] = field(default_factory=dict)
    kept: dict[Place, Gathered | None] = field(default_factory=dict)
    dropout: Dropout | None = None


def mixed(slots: Sequence[int], device: torch.device, dropout: Dropout | None = None) -> Mix:
    """Sort out a batch of a sequence a row.

    Args:
        slots: Of each row; not all 0.
        device: Where the weights are.
        dropout: Of the batch.

    Returns:
        The mix.
    """
    plain = next(row for row, slot in enumerate(slots) if slot)
    runs = [(slot, len(list(rows))) for slot, rows in groupby(slots[plain:])]
    lengths = {length for _, length in runs}
    if len(lengths) > 1 and len(slots) - plain < _LOOP_ROWS * len(runs):
        runs, lengths = [(slot, 1) for slot in slots[plain:]], {1}
    chosen = sent([slot for slot, _ in runs], device)
    return Mix(len(slots), chosen, plain, tuple(n for _, n in runs) if len(lengths) > 1 else (), dropout=dropout)


def mixed_in_rows(slots: Sequence[int], layouts: Sequence[Layout], dropout: Dropout | None = None) -> Mix:
    """Sort out a batch on a CPU whose rows hold several sequences.

    Args:
        slots: Of each sequence; not all 0.
        layouts: Where they lie: one for each number of columns that layers read.
        dropout: Of the batch; only where every row's sequences have one slot, and rows ascend by it.

    Returns:
        The mix.
    """
    by_row = layouts[0].by_row(slots)
    if by_row is not None and by_row == sorted(by_row):  # then padding may have the adapter too
        return mixed(by_row, torch.device("cpu"), dropout and dropout.laid_out(layouts))
    if dropout is not None:
        raise ValueError("dropout: expected rows whose sequences have one slot, ascending")
    adapted = sorted((number for number, slot in enumerate(slots) if slot), key=slots.__getitem__)
    runs = [list(own) for _, own in groupby(adapted, key=slots.__getitem__)]
    few = sum(layouts[0].lengths[number] for number in adapted) < _LOOP_TOKENS * len(runs)
    spans = {x.width: _in_pieces(x, slots, adapted) if few else _joined(x, slots, runs) for x in layouts}
    none = torch.empty(0, dtype=torch.int64)  # the spans have their own
    return Mix(layouts[0].rows, none, spans=spans)


def _in_pieces(layout: Layout, slots: Sequence[int], sequences: Sequence[int]) -> Spans:
    """Have sequences in pieces of equal length, each a run: what is beyond a sequence's end repeats its last token."""
    lengths = np.array([layout.lengths[number] for number in sequences])
    cells = np.array([layout.cells(number).start for number in sequences])
    size = _piece(lengths)
    counts = -(-lengths // size)
    owners = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its sequence
    along = number[:, None] * size + np.arange(size)
    ends = lengths[owners][:, None]
    taken, real = cells[owners][:, None] + np.minimum(along, ends - 1), along < ends
    given = None if real.all() else torch.from_numpy(np.flatnonzero(real))
    chosen = np.array([slots[number] for number in sequences])[owners]
    return Spans(torch.from_numpy(chosen), torch.from_numpy(taken), given, torch.from_numpy(taken[real]), ())


def _piece(lengths: _Numbers) -> int:
    """Return the length of pieces of least cost: few short ones, or many with much beyond the sequences' ends."""
    longest = int(lengths.max())
    sizes = [size for size in (*(1 << power for power in range(longest.bit_length())), longest)]
    return min(sizes, key=lambda size: int((-(-lengths // size)).sum()) * (size + _PIECE_TOKENS))


def _joined(layout: Layout, slots: Sequence[int], runs: Sequence[Sequence[int]]) -> Spans:
    """Have a run's sequences one after the other, and no padding."""
    tokens = [[cell for number in own for cell in layout.cells(number)] for own in runs]
    places = torch.tensor([cell for own in tokens for cell in own])
    chosen = torch.tensor([slots[own[0]] for own in runs])
    return Spans(chosen, places[None], None, places, tuple(map(len, tokens)))
