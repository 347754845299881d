"""Run token sequences through the base and read logits only where they are wanted.

Sequences are padded on the right with explicit positions; attention is causal, so padding cannot reach a real
token and a row's logits do not depend on its batch-mates. The language-model head sees the read positions only.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from oppu.lm.base import LoadedBase
from oppu.lm.encoding import Reading, Target
from oppu.lm.scoring import aim_log_probs

_CPU_TOKENS, _GPU_TOKENS = 4_096, 32_768
"""Most padded tokens of one forward: on a CPU, a training step's activations stay within some hundred megabytes."""
_PLAIN_ATTENTION_TOKENS = 192
_LENGTH_RATIO, _LENGTH_SLACK = 1.25, 8


class Runner:
    """Runs one base. Not thread-safe: its owner holds the lock."""

    def __init__(self, base: LoadedBase) -> None:
        """Attach to a base.

        Args:
            base: Its backbone gets a hook that picks the read positions.
        """
        self.base = base
        self.tokens = _GPU_TOKENS if base.device.type == "cuda" else _CPU_TOKENS
        self._picked: tuple[torch.Tensor, torch.Tensor] | None = None
        self._takes_positions = "position_ids" in inspect.signature(base.model.forward).parameters
        self._hook = base.model.base_model.register_forward_hook(self._pick)

    def close(self) -> None:
        """Take the hook off the base."""
        self._hook.remove()

    def logits(self, readings: Sequence[Reading]) -> torch.Tensor:
        """Run sequences of similar length.

        Args:
            readings: At least one, each with at least one position.

        Returns:
            ``[t, vocabulary]`` float32 (or the base's wider type), positions in the order of the readings.
        """
        ids = self.padded([reading.ids for reading in readings])
        rows = [row for row, reading in enumerate(readings) for _ in reading.positions]
        columns = [position for reading in readings for position in reading.positions]
        with self._picking(rows, columns), self._attention(ids.shape[1]):
            out = self.base.model(input_ids=ids, use_cache=False, **self.positions(ids))
        return self.widened(out.logits[0])

    def padded(self, rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """Return ``[n, longest] int64`` on the base's device, padded with token 0 on the right."""
        longest = max(len(row) for row in rows)
        return torch.tensor([[*row, *(0,) * (longest - len(row))] for row in rows], device=self.base.device)

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

    def _attention(self, length: int) -> AbstractContextManager[Any]:
        """Choose the plain kernel for training short bfloat16 sequences on a CPU.

        There the fused kernel's backward takes six times as long (57 against 9 ms for 32 rows of 40 tokens).
        """
        half = torch.is_autocast_enabled("cpu") or self.base.dtype == torch.bfloat16
        short = length <= _PLAIN_ATTENTION_TOKENS
        if half and short and self.base.device.type == "cpu" and torch.is_grad_enabled():
            chosen: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
            return chosen
        return nullcontext()

    @contextmanager
    def _picking(self, rows: list[int], columns: list[int]) -> Iterator[None]:
        device = self.base.device
        self._picked = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
        try:
            yield
        finally:
            self._picked = None

    def _pick(self, _module: torch.nn.Module, _args: Any, output: Any) -> Any:
        if self._picked is not None:
            rows, columns = self._picked
            output.last_hidden_state = output.last_hidden_state[rows, columns][None]
        return output


def target_losses(runner: Runner, targets: Sequence[Target], slots: Sequence[int]) -> torch.Tensor:
    """Return the losses of targets of similar length, ``[n]``, differentiable.

    Args:
        runner: The base.
        targets: Each with at least one position.
        slots: Bank slot of each.

    Returns:
        One loss a target.
    """
    pairs = zip(targets, slots, strict=True)
    logits = runner.logits([Reading(target.ids, target.positions, slot) for target, slot in pairs])
    log_probs = aim_log_probs(logits, [aim for target in targets for aim in target.aims])
    owners = [row for row, target in enumerate(targets) for _ in target.aims]
    zero = torch.zeros(len(targets), dtype=logits.dtype, device=logits.device)
    sums = zero.index_add(0, torch.tensor(owners, device=logits.device), log_probs)
    scale = torch.tensor([target.scale for target in targets], dtype=logits.dtype, device=logits.device)
    offset = torch.tensor([target.offset for target in targets], dtype=logits.dtype, device=logits.device)
    return offset - scale * sums


def buckets(lengths: Sequence[int], tokens: int = _CPU_TOKENS) -> list[list[int]]:
    """Group sequences of similar length, so that little padding is computed.

    Args:
        lengths: Tokens of each sequence.
        tokens: Most padded tokens of a group of several.

    Returns:
        Groups of indices, shortest first; every index once.
    """
    groups: list[list[int]] = []
    first = 0
    for at in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        fits = (
            groups
            and (len(groups[-1]) + 1) * lengths[at] <= tokens
            and lengths[at] <= first * _LENGTH_RATIO + _LENGTH_SLACK
        )
        if fits:
            groups[-1].append(at)
        else:
            groups.append([at])
            first = lengths[at]
    return groups
