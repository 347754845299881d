"""Run token sequences through the base and read logits only where they are wanted.

Sequences are padded on the right with explicit positions; attention is causal, so padding cannot reach a real
token and a row's logits do not depend on its batch-mates. Where a row holds several, a mask keeps them apart. The
language-model head, and of most bases the last block's second half, see the read positions only.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from oppu.lm.attention import PlainAttention, one_sequence_a_row, unwarned
from oppu.lm.base import LoadedBase
from oppu.lm.encoding import Reading, Target
from oppu.lm.last_block import LastBlock
from oppu.lm.packed import Packed
from oppu.lm.prompts import Ids
from oppu.lm.scoring import aim_log_probs
from oppu.lm.sequence_packing import WIDTHS, Layout, looks_near
from oppu.lm.streams import OfThread, Streams
from oppu.lm.transfer import sent
from oppu.lm.trunk import Memory, Trunk

_CPU_TOKENS, _GPU_TOKENS = 4_096, 32_768
"""Most tokens of one forward, padding counted where sequences have a row each: on a CPU, a training step's activations
stay within some hundred megabytes. Shared rows have up to half as many places more: a user's last is seldom full."""
_CPU_LOGITS, _GPU_LOGITS = 2**26, 2**29
"""Most logits at once, where all of a text is aimed at: a training step holds a few copies, in float32."""
_MASKED = ("sdpa", "eager")
"""Kinds of attention, by the library's names, that take any mask; others may end the process."""
FORWARD_SHARE = 8
"""A forward's fixed cost, as a part of its most tokens; see ``buckets``."""


class _Forward(OfThread):
    """Rows and columns of what the head reads in a thread's next forward."""

    picked: tuple[torch.Tensor, torch.Tensor] | None = None


class Runner:
    """Runs one base. Its owner holds the lock; under it, forwards may run on several threads, each under a bank's
    ``use`` of its own."""

    def __init__(
        self, base: LoadedBase, targets: Mapping[str, nn.Module] | None = None, *, library: bool = False
    ) -> None:
        """Attach to a base.

        Args:
            base: Its backbone gets a hook that picks the read positions.
            targets: The layers that adapters attach to, by module name: what lies below them is shared by rows of
                equal tokens. ``None``: any layer may be.
            library: Whether all blocks and their attention are computed as transformers does, to compare with; the head
                alone is narrowed, and no matrix is packed.
        """
        self.base = base
        unwarned(base.model)
        self._packed = None if library else Packed(base.model)
        self.attention = None if library else PlainAttention(base.model)
        """What replaces the library's attention, if anything."""
        self.tokens = _GPU_TOKENS if base.device.type == "cuda" else _CPU_TOKENS
        logits = _GPU_LOGITS if base.device.type == "cuda" else _CPU_LOGITS
        self.vocabulary = int(base.model.config.get_text_config().vocab_size)
        self.streams = Streams(base.device)
        """Threads for parts of a call."""
        self.reads = max(1, logits // self.vocabulary // self.streams.count)
        self._forward = _Forward()
        self._trunk = Trunk(base.model, targets)  # its hooks come first: the last block may be the lowest adapted one
        self._last = LastBlock(base.model, known=not library)
        self._takes_positions = "position_ids" in inspect.signature(base.model.forward).parameters
        self.packs = not library and self._may_pack()
        """Whether rows may hold several sequences."""
        # what the head reads: OPT calls its decoder past the model around it
        self._hook = base.model.get_decoder().register_forward_hook(self._pick)

    @property
    def shares(self) -> bool:
        """Whether sequences of equal tokens share what is computed below the lowest adapted block."""
        return self._trunk.known

    def close(self) -> None:
        """Take the hooks off the base, and end the threads."""
        self.streams.close()
        self._hook.remove()
        self._last.close()
        self._trunk.close()
        if self._packed is not None:
            self._packed.close()
        if self.attention is not None:
            self.attention.close()

    def logits(
        self, readings: Sequence[Reading], memory: Memory | None = None, layouts: Sequence[Layout] = ()
    ) -> torch.Tensor:
        """Run sequences of similar length, or where they lie several to a row.

        Args:
            readings: At least one, each with at least one position.
            memory: Keeps what no adapter reaches, for the next time that the same sequences are read; only where they
                have a row each.
            layouts: Where the sequences lie, and of what is read of them, its narrowed one; none: a row each. For bases
                that ``packs`` allows.

        Returns:
            ``[t, vocabulary]`` float32 (or the base's wider type), positions in the order of the readings.
        """
        if layouts:
            return self._logits_in_rows(readings, *layouts)
        rows, below = self._below([reading.ids for reading in readings], memory)
        ids = self.padded(rows)
        positions = [reading.positions for reading in readings]
        with self._reading(positions), below, one_sequence_a_row():
            out = self.base.model(input_ids=ids, use_cache=False, **self.positions(ids))
        return self.widened(out.logits[0])

    def _logits_in_rows(self, readings: Sequence[Reading], whole: Layout, read: Layout) -> torch.Tensor:
        """Run sequences of which rows hold several."""
        pairs = list(zip(whole.places, readings, strict=True))
        if self._last.known:
            narrow = read.filled([[first + at for at in own.positions] for (_, first), own in pairs])
            picked = [divmod(cell, read.width) for number in range(len(pairs)) for cell in read.cells(number)]
        else:
            narrow, picked = None, [(row, first + at) for (row, first), own in pairs for at in own.positions]
        with self._picking(picked, narrow):
            out = self.base.model(
                input_ids=whole.filled([reading.ids for reading in readings]),
                attention_mask=whole.mask(self.base.dtype, causal=True),
                use_cache=False,
                **self.given_positions(whole.positions()),
            )
        return self.widened(out.logits[0])

    def logits_after(
        self, rows: Sequence[Ids], positions: Sequence[tuple[int, ...]], cache: Any, begin: int
    ) -> torch.Tensor:
        """Run what follows sequences whose keys and values are kept, and keep its own there.

        Args:
            rows: What follows, at least one token each.
            positions: Of each row, the places in it that are read; all may be none but not those of all rows.
            cache: What ``past_key_values`` takes, with as many rows.
            begin: Tokens in the cache.

        Returns:
            As ``logits``.
        """
        ids = self.padded(rows)
        at = torch.arange(begin, begin + ids.shape[1], device=ids.device)
        with self._reading(positions):
            out = self.base.model(
                input_ids=ids,
                attention_mask=torch.ones(len(ids), begin + ids.shape[1], dtype=torch.int64, device=ids.device),
                past_key_values=cache,
                use_cache=True,
                **self.given_positions(at.expand(ids.shape)),
            )
        return self.widened(out.logits[0])

    def _below(self, rows: list[Ids], memory: Memory | None) -> tuple[list[Ids], AbstractContextManager[object]]:
        """Return the sequences to run below the lowest adapted block, and the context to run them in."""
        if not self._trunk.known:
            return rows, nullcontext()
        if memory is not None and memory.holds(rows):
            return rows, self._trunk.given(memory.padded(rows))
        number = {ids: at for at, ids in enumerate(dict.fromkeys(rows))}
        below = ExitStack()
        if len(number) < len(rows):
            below.enter_context(self._trunk.shared([number[ids] for ids in rows]))
        if memory is not None:
            below.enter_context(self._trunk.remembering(memory, list(number)))
        return list(number), below

    def padded(self, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Return ``[n, longest] int64`` on the base's device, padded with token 0 on the right."""
        longest = max(len(row) for row in rows)
        return sent([[*row, *(0,) * (longest - len(row))] for row in rows], self.base.device)

    def positions(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model's position argument for right-padded ids, where it takes one."""
        at = torch.arange(ids.shape[1], device=ids.device)
        return self.given_positions(at.expand(ids.shape))

    def given_positions(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return positions as the model's argument, where it takes one."""
        return {"position_ids": positions} if self._takes_positions else {}

    @staticmethod
    def widened(logits: torch.Tensor) -> torch.Tensor:
        """Return logits in at least float32."""
        return logits if logits.dtype == torch.float64 else logits.float()

    def _may_pack(self) -> bool:
        """Say whether rows of several sequences are worth trying: they are measured on CPUs, and blocks that no adapter
        reaches are shared by rows of one."""
        longest, base, config = WIDTHS[-1], self.base, self.base.model.config.get_text_config()
        masked = getattr(config, "_attn_implementation", None) in _MASKED
        sees = masked and base.max_positions >= longest and not looks_near(config, longest)
        return base.device.type == "cpu" and self._takes_positions and sees and not self._trunk.known

    def _reading(self, positions: Sequence[tuple[int, ...]]) -> AbstractContextManager[None]:
        """Let the next forward give the hidden states of some positions of each row only.

        A known last block is always narrowed: which of its columns a row's dropout counts must not depend on how long
        the rows beside it are.
        """
        most = max(len(own) for own in positions)
        if not (self._last.known and most):
            return self._picking([(row, column) for row, own in enumerate(positions) for column in own], None)
        read = [[*own, *(own[-1:] or (0,)) * (most - len(own))] for own in positions]
        picked = [(row, place) for row, own in enumerate(positions) for place in range(len(own))]
        return self._picking(picked, sent(read, self.base.device))

    @contextmanager
    def _picking(self, picked: Sequence[tuple[int, int]], read: torch.Tensor | None) -> Iterator[None]:
        """Let the last block be narrowed to ``read`` ``[n, p]``, if anything, and the head see (row, column) of it."""
        rows, columns = zip(*picked, strict=True) if picked else ((), ())
        self._forward.picked = sent(rows, self.base.device, torch.int64), sent(columns, self.base.device, torch.int64)
        self._last.read = read
        try:
            yield
        finally:
            self._forward.picked = self._last.read = None

    def _pick(self, _module: torch.nn.Module, _args: Any, output: Any) -> Any:
        if self._forward.picked is not None:
            rows, columns = self._forward.picked
            output.last_hidden_state = output.last_hidden_state[rows, columns][None]
        return output


def target_readings(targets: Sequence[Target], slots: Sequence[int]) -> list[Reading]:
    """Return what targets read, each under its bank slot."""
    pairs = zip(targets, slots, strict=True)
    return [Reading(target.ids, target.positions, slot) for target, slot in pairs]


def target_log_probs(logits: torch.Tensor, targets: Sequence[Target]) -> torch.Tensor:
    """Return the log probabilities of all that targets aim at, one target's after the other's.

    Args:
        logits: ``[t, vocabulary]`` at the targets' positions.
        targets: In the same order.

    Returns:
        ``[t]``, differentiable.
    """
    return aim_log_probs(logits, [aim for target in targets for aim in target.aims])


def losses_of(log_probs: torch.Tensor, targets: Sequence[Target]) -> torch.Tensor:
    """Return the losses of targets from ``target_log_probs``, ``[n]``, differentiable."""
    owners = [row for row, target in enumerate(targets) for _ in target.aims]
    zero = torch.zeros(len(targets), dtype=log_probs.dtype, device=log_probs.device)
    sums = zero.index_add(0, sent(owners, log_probs.device), log_probs)
    scale = sent([target.scale for target in targets], log_probs.device, log_probs.dtype)
    offset = sent([target.offset for target in targets], log_probs.device, log_probs.dtype)
    return offset - scale * sums


def target_losses(runner: Runner, targets: Sequence[Target], slots: Sequence[int]) -> torch.Tensor:
    """Return the losses of targets of similar length, a row each, ``[n]``, differentiable.

    Args:
        runner: The base.
        targets: Each with at least one position.
        slots: Bank slot of each.

    Returns:
        One loss a target.
    """
    logits = runner.logits(target_readings(targets, slots))
    return losses_of(target_log_probs(logits, targets), targets)


def target_buckets(runner: Runner, targets: Sequence[Target]) -> list[list[int]]:
    """Group targets that aim at something by length, within what a forward holds in tokens and in logits."""
    reads = [len(target.positions) for target in targets]
    return buckets([len(target.ids) for target in targets], runner.tokens, reads, runner.reads)


def buckets(
    lengths: Sequence[int], tokens: int = _CPU_TOKENS, reads: Sequence[int] = (), most_reads: int = 0
) -> list[list[int]]:
    """Group sequences of similar length, so that little padding is computed, but not in too many forwards.

    Of all ways to cut the sorted sequences, the one of least cost, the sum over groups of padded tokens and of what a
    forward costs beside them: that is counted as ``tokens / 8``. Measured training MiniLM in bfloat16 on AMX,
    examples a second against groups of lengths within a quarter of each other: with padding worth 64 tokens a group
    1.04, 192 1.10, 1,000 1.13; in float32 on one core 0.98, 0.93, 0.93, on two cores 1,000 gave 1.23.

    Args:
        lengths: Tokens of each sequence.
        tokens: Most padded tokens of a group of several.
        reads: Positions of each that logits are wanted at; none: they are few.
        most_reads: Most of those of a group of several.

    Returns:
        Groups of indices, shortest first; every index once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    wanted = np.cumsum([0, *(reads[i] if reads else 0 for i in order)])
    few = np.searchsorted(wanted, wanted[1:] - most_reads).tolist()  # the first that each may share a group with
    least, begins, members = np.zeros(len(order) + 1), [0] * (len(order) + 1), np.arange(len(order), 0, -1)
    for last, index in enumerate(order):
        longest = lengths[index]
        first = max(last + 1 - max(1, tokens // longest), min(few[last], last), 0)
        costs = members[first - last - 1 :] * longest + least[first : last + 1]
        cheapest = int(costs.argmin())
        begins[last + 1] = first + cheapest
        least[last + 1] = costs[cheapest] + tokens / FORWARD_SHARE
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]
