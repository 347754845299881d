"""Run token sequences through the base and read logits only where they are wanted.

Sequences are padded on the right with explicit positions; attention is causal, so padding cannot reach a real
token and a row's logits do not depend on its batch-mates. The language-model head, and of most bases the last block's
second half, see the read positions only.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from oppu.lm.attention import one_sequence_a_row, plain_attention, unwarned
from oppu.lm.base import LoadedBase
from oppu.lm.encoding import Reading, Target
from oppu.lm.last_block import LastBlock
from oppu.lm.packed import Packed
from oppu.lm.prompts import Ids
from oppu.lm.scoring import aim_log_probs
from oppu.lm.transfer import sent
from oppu.lm.trunk import Memory, Trunk

_CPU_TOKENS, _GPU_TOKENS = 4_096, 32_768
"""Most padded tokens of one forward: on a CPU, a training step's activations stay within some hundred megabytes."""
_CPU_LOGITS, _GPU_LOGITS = 2**26, 2**29
"""Most logits of one forward, where all of a text is aimed at: a training step holds a few copies, in float32."""
_PLAIN_ATTENTION_TOKENS = 192
"""Up to so many, all products of a row's positions lie in memory without harm."""
_FORWARD_SHARE = 8
"""A forward's fixed cost, as a part of its most tokens; see ``buckets``."""


class Runner:
    """Runs one base. Not thread-safe: its owner holds the lock."""

    def __init__(
        self, base: LoadedBase, targets: Mapping[str, nn.Module] | None = None, *, library: bool = False
    ) -> None:
        """Attach to a base.

        Args:
            base: Its backbone gets a hook that picks the read positions.
            targets: The layers that adapters attach to, by module name: what lies below them is shared by rows of
                equal tokens. ``None``: any layer may be.
            library: Whether all blocks are computed as transformers does, to compare with; the head alone is narrowed,
                and no matrix is packed.
        """
        self.base, self._library = base, library
        unwarned(base.model)
        self._packed = None if library else Packed(base.model)
        self.tokens = _GPU_TOKENS if base.device.type == "cuda" else _CPU_TOKENS
        logits = _GPU_LOGITS if base.device.type == "cuda" else _CPU_LOGITS
        self.vocabulary = int(base.model.config.get_text_config().vocab_size)
        self.reads = max(1, logits // self.vocabulary)
        self._picked: tuple[torch.Tensor, torch.Tensor] | None = None
        self._trunk = Trunk(base.model, targets)  # its hooks come first: the last block may be the lowest adapted one
        self._last = LastBlock(base.model, known=not library)
        self._takes_positions = "position_ids" in inspect.signature(base.model.forward).parameters
        # what the head reads: OPT calls its decoder past the model around it
        self._hook = base.model.get_decoder().register_forward_hook(self._pick)

    def close(self) -> None:
        """Take the hooks off the base."""
        self._hook.remove()
        self._last.close()
        self._trunk.close()
        if self._packed is not None:
            self._packed.close()

    def logits(self, readings: Sequence[Reading], memory: Memory | None = None) -> torch.Tensor:
        """Run sequences of similar length.

        Args:
            readings: At least one, each with at least one position.
            memory: Keeps what no adapter reaches, for the next time that the same sequences are read.

        Returns:
            ``[t, vocabulary]`` float32 (or the base's wider type), positions in the order of the readings.
        """
        rows, below = self._below([reading.ids for reading in readings], memory)
        ids = self.padded(rows)
        positions = [reading.positions for reading in readings]
        with self._picking(positions), self._attention(ids.shape[1]), below, one_sequence_a_row():
            out = self.base.model(input_ids=ids, use_cache=False, **self.positions(ids))
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
        with self._picking(positions):
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

    def _attention(self, length: int) -> AbstractContextManager[None]:
        """Choose the plain products for training short bfloat16 sequences on a CPU."""
        half = torch.is_autocast_enabled("cpu") or self.base.dtype == torch.bfloat16
        short = length <= _PLAIN_ATTENTION_TOKENS
        plain = half and short and self.base.device.type == "cpu" and torch.is_grad_enabled() and not self._library
        return plain_attention() if plain else nullcontext()

    @contextmanager
    def _picking(self, positions: Sequence[tuple[int, ...]]) -> Iterator[None]:
        """Let the next forward give the hidden states of some positions of each row only.

        A known last block is always narrowed: which of its columns a row's dropout counts must not depend on how long
        the rows beside it are.
        """
        device = self.base.device
        rows = [row for row, own in enumerate(positions) for _ in own]
        columns = [column for own in positions for column in own]
        most = max(len(own) for own in positions)
        if self._last.known and most:
            read = [[*own, *(own[-1:] or (0,)) * (most - len(own))] for own in positions]
            self._last.read = sent(read, device)
            columns = [place for own in positions for place in range(len(own))]
        self._picked = sent(rows, device), sent(columns, device)
        try:
            yield
        finally:
            self._picked = self._last.read = None

    def _pick(self, _module: torch.nn.Module, _args: Any, output: Any) -> Any:
        if self._picked is not None:
            rows, columns = self._picked
            output.last_hidden_state = output.last_hidden_state[rows, columns][None]
        return output


def target_log_probs(
    runner: Runner, targets: Sequence[Target], slots: Sequence[int], memory: Memory | None = None
) -> torch.Tensor:
    """Return the log probabilities of all that targets of similar length aim at, one target's after the other's.

    Args:
        runner: The base.
        targets: Each with at least one position.
        slots: Bank slot of each.
        memory: As for ``Runner.logits``.

    Returns:
        ``[sum of aims]``, differentiable.
    """
    pairs = zip(targets, slots, strict=True)
    logits = runner.logits([Reading(target.ids, target.positions, slot) for target, slot in pairs], memory)
    return aim_log_probs(logits, [aim for target in targets for aim in target.aims])


def target_losses(
    runner: Runner, targets: Sequence[Target], slots: Sequence[int], memory: Memory | None = None
) -> torch.Tensor:
    """Return the losses of targets of similar length, ``[n]``, differentiable.

    Args:
        runner: The base.
        targets: Each with at least one position.
        slots: Bank slot of each.
        memory: As for ``Runner.logits``.

    Returns:
        One loss a target.
    """
    log_probs = target_log_probs(runner, targets, slots, memory)
    owners = [row for row, target in enumerate(targets) for _ in target.aims]
    zero = torch.zeros(len(targets), dtype=log_probs.dtype, device=log_probs.device)
    sums = zero.index_add(0, sent(owners, log_probs.device), log_probs)
    scale = sent([target.scale for target in targets], log_probs.device, log_probs.dtype)
    offset = sent([target.offset for target in targets], log_probs.device, log_probs.dtype)
    return offset - scale * sums


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
    wanted = np.cumsum([0, *(reads[i] for i in order)]) if reads else np.zeros(len(order) + 1, dtype=np.int64)
    least, begins = np.zeros(len(order) + 1), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        few = int(np.searchsorted(wanted[:end], wanted[end] - most_reads)) if reads else 0
        first = max(end - max(1, tokens // longest), min(few, end - 1), 0)
        costs = least[first:end] + longest * np.arange(end - first, 0, -1)
        begins[end] = first + int(costs.argmin())
        least[end] = costs.min() + tokens / _FORWARD_SHARE
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]
