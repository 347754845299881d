"""The adapter bank: many users' LoRA weights stacked, so that one forward carries rows of different users.

Each target layer has A ``[slots, r, in]`` and B ``[slots, out, r]`` (float32, or the base's wider type); a hook
adds ``scale · B[slot] A[slot] x`` to every row by its slot. Slot 0 is the zero adapter and never written.
Names and layout are PEFT's. ``SlotBank`` holds tensors; ``AdapterBank`` decides which version lies in which slot.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from oppu.errors import AdapterUnreadable, Backpressure, ConfigError
from oppu.lm.port import AdapterRef, Tensors

_AUTOMATIC = (("q_proj", "v_proj"), ("query", "value"), ("c_attn",), ("query_key_value",), ("qkv_proj",))
"""Query and value, by the names that model families give them; the first that is found is taken."""
_PREFIX = "base_model.model."
_PINNED_RETRY_SECONDS = 0.1


def find_targets(model: nn.Module, endings: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the layers that adapters attach to, by module name, in the model's order.

    Args:
        model: The base.
        endings: Module name endings as in PEFT's ``target_modules``; ``None`` = query and value.

    Returns:
        At least one linear layer.

    Raises:
        ConfigError: Naming ``model.lora_targets`` where nothing matches or a match is not linear.
    """
    for group in [tuple(endings)] if endings else _AUTOMATIC:
        found = {name: module for name, module in model.named_modules() if _ends(name, group)}
        wrong = [name for name, module in found.items() if not isinstance(module, (nn.Linear, Conv1D))]
        if wrong:
            raise ConfigError(f"model.lora_targets: not linear layers: {', '.join(wrong[:3])}")
        if found:
            return found
    raise ConfigError(f"model.lora_targets: no layer of this base ends in {endings or 'query and value names'}")


def adapter_config(
    targets: Mapping[str, nn.Module], endings: Sequence[str] | None, *, base: str, rank: int, alpha: float
) -> dict[str, object]:
    """Return the content of PEFT's ``adapter_config.json`` for adapters on some target layers."""
    from peft import LoraConfig

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=0.0,
        target_modules=sorted(endings or {name.rpartition(".")[2] for name in targets}),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
    )
    return {name: _plain(value) for name, value in sorted(config.to_dict().items())}


class SlotBank:
    """Stacked adapters on a base's target layers, attached by hooks until ``close``."""

    def __init__(
        self, targets: Mapping[str, nn.Module], *, slots: int, rank: int, alpha: float, trainable: bool = False
    ) -> None:
        """Allocate zero adapters and attach to the layers.

        Args:
            targets: Layers by module name.
            slots: Adapters beside the zero adapter.
            rank: Rows of A; smaller adapters are padded with zeros, which changes nothing.
            alpha: Every delta is scaled by alpha / rank.
            trainable: Whether the stacks take gradients.
        """
        self.slots, self.rank, self.alpha = slots, rank, alpha
        self.scale = alpha / rank
        self._names = tuple(targets)
        self._active: torch.Tensor | None = None
        self.a: list[torch.Tensor] = []
        self.b: list[torch.Tensor] = []
        for module in targets.values():
            weight, (wide, out) = module.weight, _shape(module)
            kind = {
                "dtype": torch.promote_types(torch.float32, weight.dtype),  # type: ignore[arg-type]
                "device": weight.device,
            }
            self.a.append(torch.zeros(slots + 1, rank, wide, **kind, requires_grad=trainable))  # type: ignore[call-overload]
            self.b.append(torch.zeros(slots + 1, out, rank, **kind, requires_grad=trainable))  # type: ignore[call-overload]
        self._hooks = [module.register_forward_hook(self._hook(at)) for at, module in enumerate(targets.values())]

    @property
    def bytes(self) -> int:
        """Memory of the stacks."""
        return sum(stack.numel() * stack.element_size() for stack in (*self.a, *self.b))

    def close(self) -> None:
        """Take the hooks off the base."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def use(self, slots: Sequence[int]) -> Iterator[None]:
        """Give the rows of the next forwards their slots.

        Args:
            slots: One a row; all 0 means the base as it is.
        """
        self._active = torch.tensor(slots, device=self.a[0].device) if any(slots) else None
        try:
            yield
        finally:
            self._active = None

    def load(self, slot: int, tensors: Tensors) -> None:
        """Write an adapter into a slot.

        Args:
            slot: From 1.
            tensors: In PEFT's naming; a smaller rank r' is padded, its alpha / r' kept by scaling B.

        Raises:
            AdapterUnreadable: Names, shapes or values do not fit; the slot is unchanged.
        """
        rank = self._check(tensors)
        with torch.no_grad():
            for at, name in enumerate(self._names):
                a, b = self.a[at][slot].zero_(), self.b[at][slot].zero_()
                a[:rank] = torch.from_numpy(np.array(tensors[_key(name, "A")]))
                b[:, :rank] = torch.from_numpy(np.array(tensors[_key(name, "B")]))
                if rank != self.rank:
                    b *= self.rank / rank

    def fresh(self, slot: int, seed: int) -> None:
        """Start a slot as PEFT does: A uniform in ±1/√in from a generator of its own, B zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for a, b in zip(self.a, self.b, strict=True):
                bound = a.shape[-1] ** -0.5
                a[slot] = torch.empty(a.shape[1:]).uniform_(-bound, bound, generator=generator)
                b[slot].zero_()

    def read(self, slot: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Return a slot's weights in PEFT's naming, as float32 copies."""
        found: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
        for at, name in enumerate(self._names):
            for kind, stack in (("A", self.a[at]), ("B", self.b[at])):
                found[_key(name, kind)] = stack[slot].detach().to("cpu", torch.float32, copy=True).numpy()
        return found

    def _hook(self, at: int) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor | None]:
        def add(_module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            if self._active is None:
                return None
            x = args[0]
            a = self.a[at].index_select(0, self._active).to(x.dtype)
            b = self.b[at].index_select(0, self._active).to(x.dtype)
            return output + torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2)) * self.scale

        return add

    def _check(self, tensors: Tensors) -> int:
        expected = {_key(name, kind) for name in self._names for kind in "AB"}
        if set(tensors) != expected:
            odd = sorted(set(tensors) ^ expected)
            raise AdapterUnreadable(f"adapter and base differ in {len(odd)} tensors, the first is {odd[0]}")
        rank = int(tensors[_key(self._names[0], "A")].shape[0])
        if not 1 <= rank <= self.rank:
            raise AdapterUnreadable(f"adapter of rank {rank}, expected 1 to {self.rank}")
        for at, name in enumerate(self._names):
            shapes = {"A": (rank, self.a[at].shape[2]), "B": (self.b[at].shape[1], rank)}
            for kind, shape in shapes.items():
                tensor = tensors[_key(name, kind)]
                if tensor.shape != shape:
                    raise AdapterUnreadable(f"{_key(name, kind)}: shape {tensor.shape}, expected {shape}")
                if not np.isfinite(tensor).all():
                    raise AdapterUnreadable(f"{_key(name, kind)}: values that are not finite")
        return rank


class AdapterBank:
    """Which adapter version lies in which slot: least recently used goes first, never one that is pinned."""

    def __init__(self, bank: SlotBank, on_event: Callable[[str], None] = lambda _: None) -> None:
        """Manage a bank's slots.

        Args:
            bank: The tensors.
            on_event: Told ``hit``, ``miss``, ``load`` or ``evict``.
        """
        self._bank = bank
        self._on_event = on_event
        self._slots: OrderedDict[AdapterRef, int] = OrderedDict()
        self._free = list(range(bank.slots, 0, -1))
        self._pins: Counter[AdapterRef] = Counter()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, ref: AdapterRef) -> bool:
        known = ref in self._slots
        self._on_event("hit" if known else "miss")
        return known

    def install(self, ref: AdapterRef, tensors: Tensors) -> None:
        """Write a version into a slot; one that is there already is the same and stays.

        Args:
            ref: Names the version.
            tensors: The adapter's weights; ``None`` = the base alone.

        Raises:
            AdapterUnreadable: It does not fit this base; no slot has changed hands.
            Backpressure: Every slot is in use.
        """
        if ref in self._slots:
            self._slots.move_to_end(ref)
            return
        victim = None if self._free else self._victim()
        slot = self._free[-1] if victim is None else self._slots[victim]
        self._bank.load(slot, tensors)
        if victim is None:
            self._free.pop()
        else:
            del self._slots[victim]
            self._on_event("evict")
        self._slots[ref] = slot
        self._on_event("load")

    @contextmanager
    def pinned(self, refs: Iterable[AdapterRef]) -> Iterator[dict[AdapterRef, int]]:
        """Hold versions in their slots.

        Args:
            refs: Every one must be resident.

        Yields:
            Their slots.

        Raises:
            KeyError: One is not resident.
        """
        held = list(dict.fromkeys(refs))
        slots = {ref: self._slots[ref] for ref in held}
        self._pins.update(held)
        for ref in held:
            self._slots.move_to_end(ref)
        try:
            yield slots
        finally:
            self._pins.subtract(held)
            self._pins = +self._pins

    def _victim(self) -> AdapterRef:
        for ref in self._slots:
            if self._pins[ref] <= 0:
                return ref
        raise Backpressure(_PINNED_RETRY_SECONDS)


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def _key(name: str, kind: str) -> str:
    return f"{_PREFIX}{name}.lora_{kind}.weight"


def _shape(module: Any) -> tuple[int, int]:
    """Return (in, out); GPT-2's Conv1D keeps its weight the other way round."""
    first, second = (int(size) for size in module.weight.shape)
    return (first, second) if isinstance(module, Conv1D) else (second, first)


def _plain(value: Any) -> object:
    """Turn what ``LoraConfig.to_dict`` holds into JSON values."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
