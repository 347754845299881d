"""The adapter bank: many users' LoRA weights stacked, so that one forward carries rows of different users.

Target layers that read the same input (query and value of one block) share one tensor, a slot a row, that holds their
A ``[r, in]`` and the transposes of their B ``[out, r]``: what a batch needs of it is gathered in one copy, into memory
that stays in the cache, and all A meet the input in one product. A hook adds ``scale · B A x`` of its slot to every
row. Slot 0 is the zero adapter and never written. Names and shapes outside are PEFT's. Which version lies in which
slot is decided in ``residence``, and which tokens have which slot in ``mix``. A layer that reads its rows' tokens
flattened, as OPT's ``fc1`` does, is told them apart by the number of rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from oppu.errors import AdapterUnreadable, ConfigError
from oppu.lm.dropout import Dropout, dropped
from oppu.lm.mix import Gathered, Mix, mixed, mixed_in_rows
from oppu.lm.places import Place, factors_of, placed, spans_of
from oppu.lm.port import Tensors
from oppu.lm.sequence_packing import Layout
from oppu.lm.streams import OfThread

_PREFIX = "base_model.model."
_NARROW_TOKENS = 4
"""From so many tokens a row a CPU multiplies faster in bfloat16; fewer in float32, widened once while decoding."""


@dataclass(frozen=True, slots=True)
class _Inner:
    """What the layers of a group have in common for one input ``x``: each one's B, and its ``scale · A x``
    ``[k, m, r]`` of ``m`` tokens a run, or ``[k · m, r]`` where runs differ in length."""

    group: int
    x: torch.Tensor
    b: tuple[torch.Tensor, ...]
    inner: tuple[torch.Tensor, ...]


class _Batch(OfThread):
    """What a thread's forwards have adapters of, and memory to gather them in."""

    mix: Mix | None = None
    inner: _Inner | None = None

    def __init__(self) -> None:
        self.buffers: dict[tuple[int, torch.dtype], torch.Tensor] = {}


class SlotBank:
    """Stacked adapters on a base's target layers, attached by hooks until ``close``.

    Forwards of several threads may run at once, each with its own ``use``; slots are written while none does.
    """

    def __init__(
        self, targets: Mapping[str, nn.Module], *, slots: int, rank: int, alpha: float, trainable: bool = False
    ) -> None:
        """Allocate zero adapters and attach to the layers.

        Args:
            targets: Layers by module name.
            slots: Adapters beside the zero adapter.
            rank: Rows of A; smaller adapters are padded with zeros, which changes nothing.
            alpha: Every delta is scaled by alpha / rank.
            trainable: Whether the weights take gradients; then they are at least float32, whatever the base's type.
        """
        self.slots, self.rank, self.alpha = slots, rank, alpha
        self.scale = alpha / rank
        self._names = tuple(targets)
        self._batch = _Batch()
        self._places = placed(targets, rank)
        pairs = [(_key(name, "A"), _key(name, "B")) for name in self._names]
        self._keys = dict(zip(self._places, pairs, strict=True))
        self._groups = [list(own) for _, own in groupby(sorted(self._places, key=_group), key=_group)]
        self.weights: list[torch.Tensor] = []
        for own in self._groups:
            weight: Any = targets[self._names[self._places.index(own[0])]].weight
            dtype = torch.promote_types(torch.float32, weight.dtype) if trainable else weight.dtype
            size = slots + 1, sum(rank * (place.wide + place.out) for place in own)
            self.weights.append(torch.zeros(size, dtype=dtype, device=weight.device, requires_grad=trainable))
        self._hooks = [module.register_forward_hook(self._hook(at)) for at, module in enumerate(targets.values())]

    @property
    def a(self) -> list[torch.Tensor]:
        """Every layer's A ``[slots + 1, r, in]``, views."""
        return [factors_of(self.weights[place.group], place, self.rank)[0] for place in self._places]

    @property
    def b(self) -> list[torch.Tensor]:
        """Every layer's B ``[slots + 1, out, r]``, views."""
        return [factors_of(self.weights[p.group], p, self.rank)[1].transpose(1, 2) for p in self._places]

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(weights.numel() * weights.element_size() for weights in self.weights)

    def close(self) -> None:
        """Take the hooks off the base."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def use(
        self, slots: Sequence[int], dropout: Dropout | None = None, layouts: Sequence[Layout] = ()
    ) -> Iterator[None]:
        """Give the sequences of this thread's next forwards their slots.

        Args:
            slots: One a sequence; all 0 means the base as it is. Rows of one slot cost least side by side, those of
                slot 0 at the front.
            dropout: What the adapters do not see of their inputs, while training.
            layouts: Where the sequences lie, by what layers read of them; none: a row each. On a CPU, and while
                training only rows whose sequences have one slot.
        """
        self._batch.mix = self._mixed(slots, dropout, layouts) if any(slots) else None
        try:
            yield
        finally:
            self._batch.mix = self._batch.inner = None

    def _mixed(self, slots: Sequence[int], dropout: Dropout | None, layouts: Sequence[Layout]) -> Mix:
        return mixed_in_rows(slots, layouts, dropout) if layouts else mixed(slots, self.weights[0].device, dropout)

    def check(self, tensors: Tensors) -> int:
        """Return an adapter's rank.

        Args:
            tensors: In PEFT's naming; those of some layers may be missing, as of an adapter on fewer blocks.

        Returns:
            Its rank.

        Raises:
            AdapterUnreadable: Names, shapes or values do not fit.
        """
        own = [(place, pair) for place, pair in self._keys.items() if pair[0] in tensors or pair[1] in tensors]
        expected = {key for _, pair in own for key in pair}
        if set(tensors) != expected or not own:
            odd = sorted(set(tensors) ^ (expected or {self._keys[self._places[0]][0]}))
            raise AdapterUnreadable(f"adapter and base differ in {len(odd)} tensors, the first is {odd[0]}")
        for key, tensor in tensors.items():
            if tensor.ndim != 2 or tensor.dtype != np.float32:
                raise AdapterUnreadable(f"{key}: {tensor.ndim} dimensions of {tensor.dtype}, expected 2 of float32")
        rank = int(tensors[own[0][1][0]].shape[0])
        if not 1 <= rank <= self.rank:
            raise AdapterUnreadable(f"adapter of rank {rank}, expected 1 to {self.rank}")
        for place, pair in own:
            for key, shape in zip(pair, ((rank, place.wide), (place.out, rank)), strict=True):
                if tensors[key].shape != shape:
                    raise AdapterUnreadable(f"{key}: shape {tensors[key].shape}, expected {shape}")
                if not np.isfinite(tensors[key]).all():
                    raise AdapterUnreadable(f"{key}: values that are not finite")
        return rank

    def load(self, slot: int, tensors: Tensors, *, over: bool = False) -> None:
        """Write an adapter into a slot.

        Args:
            slot: From 1.
            tensors: In PEFT's naming; a smaller rank r' is padded, its alpha / r' kept by scaling B.
            over: Whether what the adapter lacks, layers or rank, stays as it lies in the slot instead of zero.

        Raises:
            AdapterUnreadable: Names, shapes or values do not fit; the slot is unchanged.
        """
        self.write(slot, tensors, self.check(tensors), over=over)

    def write(self, slot: int, tensors: Tensors, rank: int, *, over: bool = False) -> None:
        """Write an adapter that was checked, as ``load`` does: a group of layers at a time, so that a GPU is sent one
        copy a group.

        Args:
            slot: From 1.
            tensors: What ``check`` was given.
            rank: What it returned.
            over: As for ``load``.
        """
        whole = rank == self.rank and len(tensors) == 2 * len(self._names)
        for weights, own in zip(self.weights, self._groups, strict=True):
            kept = weights.detach()[slot]
            wide = torch.promote_types(torch.float32, kept.dtype)
            if kept.device.type == "cpu" and kept.dtype == wide:
                row = kept if whole or over else kept.zero_()
            else:
                row = kept.to("cpu", wide) if over else torch.zeros(kept.shape, dtype=wide)
            self._fill(row.numpy(), own, tensors, rank)
            if row is not kept:
                kept.copy_(row, non_blocking=True)

    def _fill(self, row: np.ndarray[Any, Any], own: Sequence[Place], tensors: Tensors, rank: int) -> None:
        """Put what an adapter has of some layers into their group's row."""
        for place in own:
            key_a, key_b = self._keys[place]
            if key_a in tensors:
                [a], [b] = factors_of(row[None], place, self.rank)
                a[:rank] = tensors[key_a]
                b[:rank] = tensors[key_b].T
                if rank != self.rank:
                    b *= self.rank / rank

    def fresh(self, slot: int, seed: int) -> None:
        """Start a slot as PEFT does: A uniform in ±1/√in from a generator of its own, B zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for a, b in zip(*self._of(slot), strict=True):
                bound = a.shape[-1] ** -0.5
                a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
                b.zero_()

    def read(self, slot: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Return a slot's weights in PEFT's naming, as float32 copies in row order, as files need them."""
        found: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
        for keys, a, b in zip(self._keys.values(), *self._of(slot), strict=True):
            for key, factor in zip(keys, (a, b), strict=True):
                found[key] = factor.detach().to("cpu", torch.float32, copy=True).contiguous().numpy()
        return found

    def _hook(self, at: int) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor | None]:
        def add(_module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            mix = self._batch.mix
            if mix is None:
                return None
            added = self._added(mix, at, args[0], self._by_row(mix, at, output))
            return added if added.dim() == output.dim() else added.view(output.shape)

        return add

    def _added(self, mix: Mix, at: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add the adapters' part to a layer's output ``y`` ``[n, t, out]`` of ``x``, ``[n, t, in]`` or flattened."""
        place, rows = self._places[at], self._by_row(mix, at, x)
        if mix.dropout is not None and torch.is_grad_enabled():  # every layer drops its own
            own = dropped(rows, mix.dropout, at)[mix.plain :]
            factors = self._factors_of(mix, mix.slots, own, [place], place)
            [b], [inner] = factors.b, _inside(own, factors, mix.lengths, self.rank)
        else:
            shared = self._shared(mix, place, x, rows)
            b, inner = shared.b[place.first], shared.inner[place.first]
        if mix.spans:
            spans = mix.spans[rows.shape[1]]
            return spans.add(y, _product(inner, b, spans.lengths))
        if torch.is_grad_enabled() and b.requires_grad:
            own = _product(inner, b, mix.lengths).view(len(y) - mix.plain, *y.shape[1:])
            return y + torch.cat([torch.zeros_like(y[: mix.plain]), own]) if mix.plain else y + own
        rest = y[mix.plain :] if mix.plain else y
        if mix.lengths or b.dtype != y.dtype:
            rest += _product(inner, b, mix.lengths).view(rest.shape).to(rest.dtype)
        else:  # y is the layer's own and fresh: adding in place saves two copies
            rest.view(len(b), -1, place.out).baddbmm_(inner, b)
        return y

    def _by_row(self, mix: Mix, at: int, x: torch.Tensor) -> torch.Tensor:
        """Return what a layer reads or gives as ``[n, t, d]``; a view."""
        flattened = x.dim() == 2 and len(x) % mix.rows == 0
        rows = x.view(mix.rows, len(x) // mix.rows, x.shape[1]) if flattened else x
        if rows.dim() != 3 or len(rows) != mix.rows or (mix.spans and rows.shape[1] not in mix.spans):
            found = f"{self._names[at]} reads {list(x.shape)} of a batch of {mix.rows} rows"
            raise ConfigError(f"model.lora_targets: expected layers that keep a batch's rows apart: {found}")
        return rows

    def _shared(self, mix: Mix, place: Place, x: torch.Tensor, rows: torch.Tensor) -> _Inner:
        """Return what the layers of a group that read ``x`` have in common, computed by the first of them."""
        found = self._batch.inner
        if found is None or found.group != place.group or found.x is not x:
            spans = mix.spans.get(rows.shape[1])
            own = rows[mix.plain :] if spans is None else spans.gathered(rows)
            slots = mix.slots if spans is None else spans.slots
            factors = self._factors_of(mix, slots, own, self._groups[place.group], place)
            inner = _inside(own, factors, mix.lengths if spans is None else spans.lengths, self.rank)
            found = self._batch.inner = _Inner(place.group, x, factors.b, inner)
        return found

    def _factors_of(
        self, mix: Mix, slots: torch.Tensor, own: torch.Tensor, places: Sequence[Place], asking: Place
    ) -> Gathered:
        """Return the factors of some slots for neighbouring layers of a group, in the type to multiply the rows in.

        The first forward of a batch gathers into memory that stays in the CPU's cache. When a layer asks again it is
        known to be decoding: then they are gathered for good, the scale with them, and the steps that follow only
        multiply.
        """
        weights = self.weights[asking.group]
        if torch.is_grad_enabled() and weights.requires_grad:
            return self._cut(weights.index_select(0, slots).to(own.dtype), places)
        found = mix.kept.get(asking)
        if found is None and asking in mix.kept:
            whole = weights.detach().index_select(0, slots).to(_product_type(own))
            whole[:, : places[0].b] *= self.scale
            found = mix.kept[asking] = replace(self._cut(whole, places), scale=1.0)
        if found is None:
            mix.kept[asking] = None
            found = self._cut(self._gathered(weights.detach(), slots), places)
        dtype = _product_type(own)
        if found.a.dtype == dtype:
            return found
        return Gathered(found.a.to(dtype), tuple(b.to(dtype) for b in found.b), found.scale)

    def _cut(self, weights: torch.Tensor, places: Sequence[Place]) -> Gathered:
        """Name the parts of gathered weights ``[k, size]``; views."""
        first, wide = places[0], places[0].wide
        spans = [(first.a, len(places) * self.rank * wide), *((p.b, self.rank * p.out) for p in places)]
        a, *own = spans_of(weights, spans)
        b = tuple(part.view(-1, self.rank, p.out) for part, p in zip(own, places, strict=True))
        return Gathered(a.view(len(weights), -1, wide).transpose(1, 2), b, self.scale)

    def _gathered(self, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Gather into memory that every group of this size uses again."""
        kind, buffers = (weights.shape[1], weights.dtype), self._batch.buffers
        buffer = buffers.get(kind)
        if buffer is None or len(buffer) < len(chosen):
            buffer = buffers[kind] = weights.new_empty(len(chosen), weights.shape[1])
        return torch.index_select(weights, 0, chosen, out=buffer[: len(chosen)])

    def _of(self, slot: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return one slot's A ``[r, in]`` and B ``[out, r]`` of every layer, views."""
        factors = [factors_of(self.weights[p.group][slot : slot + 1], p, self.rank) for p in self._places]
        return [a[0] for a, _ in factors], [b[0].T for _, b in factors]


def _product_type(own: torch.Tensor) -> torch.dtype:
    """Return the type in which rows ``[n, t, in]`` are multiplied fastest."""
    wider = own.device.type == "cpu" and own.shape[1] < _NARROW_TOKENS
    return torch.promote_types(torch.float32, own.dtype) if wider else own.dtype


def _inside(own: torch.Tensor, factors: Gathered, lengths: Sequence[int], rank: int) -> tuple[torch.Tensor, ...]:
    """Multiply the adapted tokens ``[…, in]`` by the A of some layers, and by the scale; one product a layer."""
    inner = _product(own.to(factors.a.dtype), factors.a, lengths)
    if factors.scale != 1.0:
        inner = inner * factors.scale
    return torch.split(inner, rank, -1)


def _product(x: torch.Tensor, factors: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return each run's tokens, ``[…, i]`` in order, under its own of ``factors`` ``[k, i, j]``: ``[k, m, j]``, or
    flattened where runs differ in length."""
    if lengths:
        return _run_by_run(x.reshape(-1, x.shape[-1]), factors, lengths)
    return torch.bmm(x.reshape(len(factors), -1, x.shape[-1]), factors)


def _run_by_run(x: torch.Tensor, factors: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Multiply each run's part of ``x`` ``[n · t, i]`` by its own of ``factors`` ``[k, i, j]``.

    Split and unbound as wholes: the gradient of a slice a run would be as large as all of them, once a run.
    """
    each = len(x) // sum(lengths)
    parts = torch.split(x, [length * each for length in lengths])
    return torch.cat([part @ factor for part, factor in zip(parts, factors.unbind(0), strict=True)])


def _group(place: Place) -> int:
    return place.group


def _key(name: str, kind: str) -> str:
    return f"{_PREFIX}{name}.lora_{kind}.weight"
