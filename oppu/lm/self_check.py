"""Whether a base reads and writes here as it does by itself: looked at once, when it is loaded.

Rows of unequal length share a batch, with explicit positions: padded on the right to be read, on the left to write. A
base that numbers its positions otherwise, or whose state cannot pass over padding, would answer wrongly without a word.
Layers that adapters cannot be added to are found here too, not at the first user's batch.
"""

import copy
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from oppu.errors import ConfigError
from oppu.lm.attention import DECODED_ROWS
from oppu.lm.bank import SlotBank
from oppu.lm.encoding import Reading
from oppu.lm.faults import device_fault, out_of_memory
from oppu.lm.forward import Runner
from oppu.lm.generation import left_padded
from oppu.lm.kv_cache import roomy_cache
from oppu.lm.prompts import Ids
from oppu.lm.reading import read_laid_out
from oppu.lm.sequence_packing import packed

logger = logging.getLogger(__name__)

_LONG, _SHORT = 11, 6
"""Tokens of the two sequences that share a batch."""
_STRIDE = 7919
"""A prime, to scatter their tokens over the vocabulary."""
_ALIKE, _ALIKE_ROUNDED = 1 - 1e-4, 0.9
"""Least cosine between logits, centred: equal but for rounding, in bfloat16 also but for an expert chosen otherwise."""
_ALIKE_PLAIN = 0.999
"""In bfloat16, with plain products for attention and without: large scores lose by rounding."""
_ALIKE_PACKED = 0.995
"""In bfloat16, of sequences that share a row: what cannot be told from a leak gets a row of its own, and no more."""
_FAULTS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def check_base(runner: Runner, bank: SlotBank, targets: Mapping[str, nn.Module]) -> bool:
    """Compare a base in a batch with itself alone.

    Args:
        runner: The base.
        bank: Any bank on it; what lies in its first slot is run, and not compared.
        targets: The layers that adapters attach to, by module name.

    Returns:
        Whether several continuations can share what is kept of one prompt; where not, it is read again for each.
        Whether rows may hold several sequences is left in the runner.

    Raises:
        ConfigError: Naming ``model.base`` and what it does otherwise; or ``model.lora_targets`` where none of them is
            run to read text, or the bank cannot serve one that is.
    """
    if runner.base.dtype == torch.float64:  # no setting names it; the library's masks overflow in it for some
        return True
    rows = _rows(runner)
    with torch.no_grad():
        try:
            alone, unread = _alone(runner, rows, targets)
            _choose_attention(runner, bank, rows, alone)
            faults = _faults(runner, bank, rows, alone)
        except _FAULTS as error:
            _not_the_bases(error)
            raise ConfigError(f"model.base: {runner.base.name!r} cannot be run row by row: {error}") from error
        if unread:
            raise ConfigError(f"model.lora_targets: reading text runs none of {', '.join(sorted(targets)[:3])}, …")
        if faults:
            raise ConfigError(
                f"model.base: {runner.base.name!r} answers otherwise beside another row than alone: {', '.join(faults)}"
            )
        _serve(runner, bank, rows)
        try:
            followed = _followed(runner, bank, rows[0], 2)
            shared, why = all(_alike(runner, one, alone[0]) for one in followed), "the answers differ"
        except _FAULTS as error:
            _not_the_bases(error)
            shared, why = False, str(error)
        # the first row once more: it lies between the two
        runner.packs = runner.packs and _packs(runner, bank, [*rows, *rows[:1]], [*alone, *alone[:1]])
    logger.info("base %s: short sequences %s rows", runner.base.name, "share" if runner.packs else "do not share")
    if not shared:
        logger.warning("base %s: each choice's line reads its prompt again: %s", runner.base.name, why)
    return shared


def _choose_attention(runner: Runner, bank: SlotBank, rows: list[Ids], alone: list[torch.Tensor]) -> None:
    """Leave the library's attention in its place where another one reads otherwise."""
    if runner.attention is None or runner.base.device.type != "cpu" or runner.base.dtype != torch.bfloat16:
        return
    try:
        with bank.use([0] * len(rows)):
            read = _read(runner, rows)
        decoded = _followed(runner, bank, rows[0], DECODED_ROWS)
        pairs = [*zip(read, alone, strict=True), *((one, alone[0]) for one in decoded)]
        same = all(_alike(runner, one, other, _ALIKE_PLAIN) for one, other in pairs)
    except _FAULTS as error:
        _not_the_bases(error)
        same = False  # whose fault it is shows without
    if not same:
        logger.info("base %s: its attention stays the library's", runner.base.name)
        runner.attention.close()


def _packs(runner: Runner, bank: SlotBank, rows: list[Ids], alone: list[torch.Tensor]) -> bool:
    """Say whether sequences that share a row are read as each alone, and so beside one whose layers add an adapter."""
    layout = packed([len(row) for row in rows])
    plain = len(rows) - 1  # the last one may have an adapter, and is not compared
    try:
        for last in (0, 1):
            slots = [*[0] * plain, last]
            readings = [Reading(row, (len(row) - 1,), slot) for row, slot in zip(rows, slots, strict=True)]
            found = read_laid_out(runner, bank, readings, layout)
            pairs = zip(found[:plain], alone[:plain], strict=True)
            why = "" if all(_alike(runner, one, other, _ALIKE_PACKED) for one, other in pairs) else "the answers differ"
            if why:
                break
    except (*_FAULTS, ConfigError) as error:
        _not_the_bases(error)
        why = str(error) or type(error).__name__
    if why:
        logger.info("base %s: a row of several sequences is not read as each alone: %s", runner.base.name, why)
    return not why


def _not_the_bases(error: Exception) -> None:
    """Raise what says nothing about the base."""
    if (lost := device_fault(error)) is not None:
        raise lost from error
    if out_of_memory(error):
        raise error


def _alone(runner: Runner, rows: list[Ids], targets: Mapping[str, nn.Module]) -> tuple[list[torch.Tensor], bool]:
    """Return the next token's logits as the library computes them for each sequence by itself, and whether that passes
    all targets by, as those of a model that see or hear."""
    run: list[nn.Module] = []
    hooks = [layer.register_forward_hook(lambda own, *_: run.append(own)) for layer in targets.values()]
    try:
        with nullcontext() if runner.attention is None else runner.attention.set_aside():
            found = [runner.base.model(input_ids=runner.padded([row]), use_cache=False).logits[0, -1] for row in rows]
    finally:
        for hook in hooks:
            hook.remove()
    return found, not run


def _faults(runner: Runner, bank: SlotBank, rows: list[Ids], alone: list[torch.Tensor]) -> list[str]:
    read, written = _together(runner, bank, rows, 0)
    followed = _followed(runner, bank, rows[0], 1)
    return [
        name
        for name, found, wanted in (
            ("when sequences are read", read, alone),
            ("when texts are written", written, alone),
            ("when a text goes on", followed, alone[:1]),
        )
        if not all(_alike(runner, one, other) for one, other in zip(found, wanted, strict=True))
    ]


def _serve(runner: Runner, bank: SlotBank, rows: list[Ids]) -> None:
    """Run the rows with an adapter: without one the bank's hooks are idle, and serve any layer."""
    try:
        _together(runner, bank, rows, 1)
    except _FAULTS as error:
        _not_the_bases(error)
        raise ConfigError(f"model.lora_targets: expected layers that adapters can be added to: {error}") from error


def _together(runner: Runner, bank: SlotBank, rows: list[Ids], slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next token's logits of the rows beside each other, as sequences are read and as texts are written."""
    with bank.use([slot] * len(rows)):
        return _read(runner, rows), _left(runner, rows)


def _rows(runner: Runner) -> list[Ids]:
    vocabulary = runner.vocabulary
    return [tuple((at * _STRIDE + 5) % vocabulary for at in range(size)) for size in (_LONG, _SHORT)]


def _read(runner: Runner, rows: list[Ids]) -> torch.Tensor:
    return runner.logits([Reading(row, (len(row) - 1,)) for row in rows])


def _left(runner: Runner, rows: list[Ids]) -> torch.Tensor:
    ids, mask, positions = left_padded(rows, runner.base.device)
    given = runner.given_positions(positions)
    out: Any = runner.base.model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **given)
    logits: torch.Tensor = out.logits[:, -1]
    return logits


def _followed(runner: Runner, bank: SlotBank, row: Ids, times: int) -> torch.Tensor:
    """Read all but a sequence's last token, keep that, and read the last one so many times beside each other."""
    cache = roomy_cache(runner.base.model.config, 0)
    with bank.use([0]):
        runner.logits_after([row[:-1]], [(len(row) - 2,)], cache, 0)
    if times > 1:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(times)
    with bank.use([0] * times):
        return runner.logits_after([row[-1:]] * times, [(0,)] * times, cache, len(row) - 1)


def _alike(runner: Runner, one: torch.Tensor, other: torch.Tensor, rounded: float = _ALIKE_ROUNDED) -> bool:
    mine, wanted = (logits.double() - logits.double().mean() for logits in (one, other))
    cosine = torch.nn.functional.cosine_similarity(mine, wanted, dim=0)
    least = rounded if runner.base.dtype == torch.bfloat16 else _ALIKE
    return bool(cosine > least)
