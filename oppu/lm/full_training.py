"""What training a whole model takes beside its loss: batches, schedule, precision, and the folder that is written."""

import json
import logging
import os
import random
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from oppu.errors import ConfigError
from oppu.lm.hardware import fast_bfloat16

logger = logging.getLogger(__name__)

RECIPE = "oppu.json"
"""Beside the weights: how they were made; its presence marks a folder as ours."""
CLIP_NORM = 1.0
_WEIGHT_DECAY = 0.01
_WARM_UP_SHARE = 0.1
_SORTED_BATCHES = 16
"""Batches are cut from so many batches' worth of shuffled texts, sorted by length: little padding, still random."""


class Descent:
    """AdamW over all steps of a run: linear warm-up, then linear decay to zero."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], learning_rate: float, steps: int) -> None:
        """Begin at the first step.

        Args:
            parameters: What is learnt, in float32.
            learning_rate: Of the schedule's top.
            steps: Of the whole run.
        """
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=_WEIGHT_DECAY, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, _factor(steps))

    def step(self) -> bool:
        """Take one from the gradients, which are clipped and cleared.

        Returns:
            Whether it was taken: not with a gradient that is no longer finite.
        """
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, CLIP_NORM)
        if not bool(norm.isfinite()):
            return False
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        return True


def _factor(steps: int) -> Callable[[int], float]:
    rise = max(1, round(steps * _WARM_UP_SHARE))

    def factor(step: int) -> float:
        return min((step + 1) / rise, (steps - step) / max(1, steps - rise))

    return factor


def epoch(lengths: Sequence[int], size: int, chance: random.Random) -> list[list[int]]:
    """Cut texts of so many tokens into batches of similar lengths.

    Args:
        lengths: Of each text.
        size: Texts of a batch.
        chance: Orders texts and batches.

    Returns:
        The texts' numbers, each once, by batch.
    """
    order = list(range(len(lengths)))
    chance.shuffle(order)
    block = size * _SORTED_BATCHES
    batches = []
    for first in range(0, len(order), block):
        members = sorted(order[first : first + block], key=lengths.__getitem__)
        batches += [members[k : k + size] for k in range(0, len(members), size)]
    chance.shuffle(batches)
    return batches


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Compute in bfloat16 where the hardware multiplies it; weights and moments stay float32."""
    if dtype != torch.float32 or not fast_bfloat16(device):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def folder_problems(out_dir: Path, key: str) -> list[str]:
    """Say what speaks against writing a model to a folder, before it is made.

    Args:
        out_dir: Must be absent, empty, or an earlier result, in a folder that can be written.
        key: What the recipe of an earlier result holds: another kind of model is nobody's to replace.

    Returns:
        Nothing, or the problem.
    """
    place = _whole(out_dir)
    above = next(folder for folder in place.parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        return [f"OUT: {above} is no folder that can be written"]
    if place.exists() and not place.is_dir():
        return [f"OUT: not a folder: {out_dir}"]
    if place.is_dir() and any(place.iterdir()) and key not in recipe_of(place):
        return [f"OUT: {out_dir} holds other files; name an empty folder"]
    return []


def write(out_dir: Path, save: Callable[[str], object], recipe: Mapping[str, object]) -> None:
    """Write beside the target and swap, so that a crash leaves no half-written model under its name.

    Args:
        out_dir: Absent, empty, or an earlier result, which is replaced.
        save: Writes the model into an empty folder; what it raises leaves nothing behind.
        recipe: How it was made, as JSON values.

    Raises:
        ConfigError: It cannot be written.
    """
    place = _whole(out_dir)
    fresh = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}")
    try:
        fresh.mkdir(parents=True)
        save(str(fresh))
        (fresh / RECIPE).write_text(json.dumps(recipe, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if place.exists():
            shutil.rmtree(place)
        fresh.rename(place)
    except OSError as error:
        raise ConfigError(f"OUT: cannot write {out_dir}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    logger.info("written to %s", out_dir)


def _whole(out_dir: Path) -> Path:
    return out_dir.expanduser().resolve()


def recipe_of(folder: Path) -> Mapping[str, object]:
    """Return how a folder's model was made; empty where it is not ours."""
    try:
        found = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
