"""Compute the blocks below the lowest adapted one once: for all rows of equal tokens, and for passes that come again.

No adapter reaches what those blocks compute. Rows that differ in their adapters only share it, as a request's row
without an adapter and the one with it do; in training it is kept for the next pass over the same examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from oppu.lm.prompts import Ids
from oppu.lm.streams import OfThread
from oppu.lm.transfer import sent

_SHARING = {
    "BertLayer", "GPT2Block", "OPTDecoderLayer", "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer",
    "Qwen3DecoderLayer", "GemmaDecoderLayer", "Gemma2DecoderLayer", "Gemma3DecoderLayer",
}  # fmt: skip
"""Blocks that give a tensor and read nothing by row but tensors whose first dimension it is; others share nothing."""
MEMORY_BYTES = 256 * 2**20
"""Of one training call, shared by its streams: past it, what is read again is computed again."""


class Memory:
    """What the trunk computed of sequences, ``[t, d]`` each, up to so many bytes in all."""

    def __init__(self, limit: int = MEMORY_BYTES) -> None:
        """Hold nothing yet.

        Args:
            limit: Bytes; what would go over it is not kept.
        """
        self._left = limit
        self._kept: dict[Ids, torch.Tensor] = {}

    def holds(self, rows: Sequence[Ids]) -> bool:
        """Say whether every sequence is here."""
        return all(ids in self._kept for ids in rows)

    def keep(self, rows: Sequence[Ids], hidden: torch.Tensor) -> None:
        """Keep ``hidden`` ``[n, longest, d]`` of right-padded sequences, as far as there is room."""
        for ids, row in zip(rows, hidden.detach(), strict=True):
            size = len(ids) * row.shape[1] * row.element_size()
            if ids not in self._kept and size <= self._left:
                self._kept[ids] = row[: len(ids)].clone()
                self._left -= size

    def padded(self, rows: Sequence[Ids]) -> torch.Tensor:
        """Return ``[n, longest, d]`` of sequences that are here, zeros behind their ends."""
        return nn.utils.rnn.pad_sequence([self._kept[ids] for ids in rows], batch_first=True)


class _Forward(OfThread):
    """What is asked of a thread's next forward, and what it has seen."""

    rows: torch.Tensor | None = None
    sequences = 0
    given: torch.Tensor | None = None
    watching = False
    seen: torch.Tensor | None = None


class Trunk:
    """Hooks on a base's blocks, idle unless a thread asks for its next forward; none where the lowest block is
    adapted."""

    def __init__(self, model: Any, targets: Mapping[str, nn.Module] | None) -> None:
        """Attach to a base.

        Args:
            model: A Hugging Face causal language model.
            targets: The adapted layers by module name; ``None``: nobody shares anything.
        """
        self._forward = _Forward()
        self._hooks: list[Any] = []
        blocks, lowest = _blocks(model, list(targets or ()))
        self._lower, upper = blocks[:lowest], blocks[lowest:] if lowest else []
        for block in self._lower:
            block.forward = self._skipping(block.forward)
        for at, block in enumerate(upper):
            self._hooks.append(
                block.register_forward_pre_hook(self._entered if at == 0 else self._more, with_kwargs=True)
            )

    @property
    def known(self) -> bool:
        """Whether there are blocks that no adapter reaches."""
        return bool(self._lower)

    def close(self) -> None:
        """Leave the base as it was."""
        for hook in self._hooks:
            hook.remove()
        for block in self._lower:
            vars(block).pop("forward", None)
        self._hooks, self._lower = [], []

    @contextmanager
    def shared(self, rows: Sequence[int]) -> Iterator[None]:
        """Let the next forward read each sequence once, and from the lowest adapted block on have ``rows``.

        Args:
            rows: Of each row above, its sequence's number.
        """
        device = next(self._lower[0].parameters()).device
        self._forward.rows, self._forward.sequences = sent(rows, device), max(rows) + 1
        try:
            yield
        finally:
            self._forward.rows = None

    @contextmanager
    def given(self, hidden: torch.Tensor) -> Iterator[None]:
        """Let the next forward begin at the lowest adapted block, with ``hidden`` ``[n, t, d]``."""
        self._forward.given = hidden
        try:
            yield
        finally:
            self._forward.given = None

    @contextmanager
    def remembering(self, memory: Memory, rows: Sequence[Ids]) -> Iterator[None]:
        """Keep what the next forward of right-padded ``rows`` brings to the lowest adapted block."""
        own = self._forward
        own.watching = True
        try:
            yield
            if own.seen is not None:
                memory.keep(rows, own.seen)
        finally:
            own.watching, own.seen = False, None

    def _skipping(self, forward: Any) -> Any:
        def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(hidden, *args, **kwargs) if self._forward.given is None else hidden

        return run

    def _entered(self, _block: Any, args: Any, kwargs: Any) -> Any:
        """Prepare what the lowest adapted block reads."""
        own = self._forward
        if own.given is not None:
            return (own.given, *args[1:]), kwargs
        if own.watching:
            own.seen = args[0]
        return self._more(_block, args, kwargs)

    def _more(self, _block: Any, args: Any, kwargs: Any) -> Any:
        """Give every row its sequence's share of what a block reads: masks and positions too."""
        if self._forward.rows is None:
            return None
        return tuple(map(self._grown, args)), {name: self._grown(value) for name, value in kwargs.items()}

    def _grown(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._grown, value))
        own = self._forward
        by_sequence = isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == own.sequences
        return value.index_select(0, own.rows) if by_sequence else value


def _blocks(model: Any, names: Sequence[str]) -> tuple[list[Any], int]:
    """Return a base's blocks and which of them is the lowest that holds one of the named layers.

    Layers that lie in no list of blocks, or in several, leave nothing that could be shared; nor do unknown blocks.
    """
    places = [block_of(name) for name in names]
    lists = {place[0] for place in places if place is not None}
    if len(lists) != 1 or None in places:
        return [], 0
    blocks = list(model.get_submodule(lists.pop()))
    known = all(type(block).__name__ in _SHARING for block in blocks)
    return (blocks, min(place[1] for place in places if place is not None)) if known else ([], 0)


def block_of(name: str) -> tuple[str, int] | None:
    """Return the list of blocks that a layer lies in and the block's number, by the layer's module name."""
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else (".".join(parts[:number]), int(parts[number]))
