"""Read sequences of mixed users in few forwards: those of like length a row each, short ones several to a row.

Which is cheaper is reckoned for each call. Whatever shares a row or a batch, a sequence has the logits that it has
alone: where a row's numbers are not finite, which nothing keeps from spreading in it, its sequences are read again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from oppu.lm.bank import SlotBank
from oppu.lm.dropout import Dropout
from oppu.lm.encoding import Reading
from oppu.lm.forward import FORWARD_SHARE, Runner, buckets
from oppu.lm.sequence_packing import ATTENTION, OWN_WIDTHS, WIDTHS, Layout, cost, packed, parts
from oppu.lm.trunk import Memory


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences of one forward, by number, and where they lie: a row each where there is no layout."""

    members: list[int]
    layout: Layout | None
    cost: int


def read(runner: Runner, bank: SlotBank, readings: Sequence[Reading]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Read sequences under their slots' adapters.

    Args:
        runner: The base.
        bank: The adapters.
        readings: Each with at least one position.

    Yields:
        Numbers of readings, and the logits at their positions one's after the other's ``[t, vocabulary]``; every number
        once.
    """
    for group in planned(runner, readings):
        own = [readings[member] for member in group.members]
        said = read_laid_out(runner, bank, own, group.layout)
        spoilt = [] if group.layout is None else _spoilt(group.layout, own, said)
        if not spoilt:
            yield group.members, said
            continue
        sound = [number for number in range(len(own)) if number not in spoilt]
        parts = torch.split(said, [len(reading.positions) for reading in own])
        if sound:
            yield [group.members[number] for number in sound], torch.cat([parts[number] for number in sound])
        for again in _groups(runner, [own[number] for number in spoilt], 0):
            numbers = [spoilt[at] for at in again.members]
            yield (
                [group.members[number] for number in numbers],
                read_laid_out(runner, bank, [own[n] for n in numbers], None),
            )


def read_laid_out(
    runner: Runner,
    bank: SlotBank,
    readings: Sequence[Reading],
    layout: Layout | None,
    *,
    dropout: Dropout | None = None,
    memory: Memory | None = None,
) -> torch.Tensor:
    """Read sequences in one forward.

    Args:
        runner: The base.
        bank: The adapters.
        readings: Each with at least one position.
        layout: Where they lie; ``None``: a row each.
        dropout: As for ``SlotBank.use``.
        memory: As for ``Runner.logits``.

    Returns:
        ``[t, vocabulary]``, as ``Runner.logits``.
    """
    counts = [len(reading.positions) for reading in readings]
    layouts = () if layout is None else (layout, layout.narrowed(counts))
    with bank.use([reading.slot for reading in readings], dropout, layouts):
        return runner.logits(readings, memory, layouts=layouts)


def _spoilt(layout: Layout, readings: Sequence[Reading], said: torch.Tensor) -> list[int]:
    """Return the sequences in whose rows something is not finite; of a position's logits one tells of all."""
    owners = [number for number, reading in enumerate(readings) for _ in reading.positions]
    rows = {layout.places[owners[at]][0] for at in (~said[:, 0].isfinite()).nonzero()[:, 0].tolist()}
    return [number for number, (row, _) in enumerate(layout.places) if row in rows]


def planned(runner: Runner, readings: Sequence[Reading], *, apart: bool = False) -> list[Group]:
    """Return the forwards of least cost, with what each of them costs beside its tokens.

    Args:
        runner: The base.
        readings: Each with at least one position.
        apart: Whether a row holds sequences of one slot only: what is not finite in it, or learnt, is one user's.

    Returns:
        Each reading in one of them, and a forward's ascending by slot.
    """
    may_share = runner.packs and (apart or not torch.is_grad_enabled())  # what is added in place has no gradient
    widths = (OWN_WIDTHS if apart else WIDTHS) if may_share else ()
    short = {most: sum(len(reading.ids) <= most for reading in readings) for most in widths}
    differing = {count: most for most, count in reversed(short.items()) if count > 1}
    fixed = runner.tokens // FORWARD_SHARE * ATTENTION
    plans = (_groups(runner, readings, most, apart=apart) for most in (0, *differing.values()))
    return min(plans, key=lambda groups: sum(group.cost + fixed for group in groups))


def _groups(runner: Runner, readings: Sequence[Reading], most: int, *, apart: bool = False) -> list[Group]:
    """Group sequences of up to so many tokens to share rows, and the others by length."""
    lengths, reads = [len(reading.ids) for reading in readings], [len(reading.positions) for reading in readings]
    short = [number for number, length in enumerate(lengths) if length <= most]
    alone = [number for number, length in enumerate(lengths) if length > most]
    found = []
    by_slot = sorted(short, key=lambda number: readings[number].slot)
    for part in parts(by_slot, (lengths, runner.tokens), (reads, runner.reads)):
        owners = [readings[number].slot for number in part] if apart else ()
        layout = packed([lengths[number] for number in part], owners)
        found.append(Group(part, layout, layout.cost))
    for bucket in buckets([lengths[n] for n in alone], runner.tokens, [reads[n] for n in alone], runner.reads):
        members = sorted((alone[at] for at in bucket), key=lambda number: readings[number].slot)
        found.append(Group(members, None, cost(len(bucket), max(lengths[number] for number in members))))
    return found
