"""Buckets, and logits that are read at a few positions, against the whole model's."""

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from oppu.lm.bank import SlotBank
from oppu.lm.base import LoadedBase
from oppu.lm.encoding import Reading
from oppu.lm.forward import Runner, buckets
from oppu.lm.last_block import LastBlock
from oppu.lm.targets import find_targets

Make = Callable[..., Any]
FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gpt2", "bert", "opt")
READINGS = [
    Reading((5, 6, 7), (2,), 1),
    Reading((8, 9, 10, 11, 12, 13, 14), (3, 6), 1),
    Reading((9,), (0,), 2),
    Reading(tuple(range(20, 80)), (0, 44, 59), 0),
]


def every_position(base: LoadedBase, bank: SlotBank) -> torch.Tensor:
    """Each sequence alone, logits everywhere, and of those the wanted ones."""
    found = []
    for reading in READINGS:
        with bank.use([reading.slot]):
            logits = base.model(input_ids=torch.tensor([reading.ids]), use_cache=False).logits[0]
        found.append(logits[list(reading.positions)])
    return torch.cat(found)


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_model(
    family: str, trainable: bool, library: bool, make_base: Make, make_adapter: Make
) -> None:
    base = make_base(family, torch.float64)
    bank = SlotBank(find_targets(base.model, None), slots=2, rank=4, alpha=8.0, trainable=trainable)
    for slot in (1, 2):
        bank.load(slot, make_adapter(base.model, slot))
    runner = Runner(base, library=library)
    assert LastBlock(base.model, known=not library).known == (not library and family not in ("gpt2", "opt"))
    grads: list[tuple[torch.Tensor, ...]] = []
    for whole in (True, False):
        with torch.set_grad_enabled(trainable), bank.use([reading.slot for reading in READINGS]):
            logits = every_position(base, bank) if whole else runner.logits(READINGS)
        if trainable:
            grads.append(torch.autograd.grad(logits.square().sum(), bank.weights))
        grads.append((logits.detach(),))
    half = len(grads) // 2
    for wanted, given in zip(grads[:half], grads[half:], strict=True):
        for expected, found in zip(wanted, given, strict=True):
            assert (expected - found).abs().max() <= 1e-9 * expected.abs().max()


def test_adapters_behind_the_attention_of_the_last_block_still_fit_their_rows(make_base: Make) -> None:
    base = make_base("llama", torch.float64)
    bank = SlotBank(find_targets(base.model, ("o_proj", "down_proj")), slots=2, rank=4, alpha=8.0)
    chance = np.random.default_rng(0)
    for slot in (1, 2):
        bank.load(slot, {n: chance.normal(0, 0.3, x.shape).astype(np.float32) for n, x in bank.read(0).items()})
    runner = Runner(base)
    with torch.no_grad():
        expected = every_position(base, bank)
        with bank.use([reading.slot for reading in READINGS]):
            found = runner.logits(READINGS)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_closed_runner_leaves_the_base_as_it_was(make_base: Make) -> None:
    base = make_base("bert")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
        runner = Runner(base)
        runner.logits([Reading((5, 6, 7), (1,))])
        assert torch.allclose(base.model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-6)  # idle, though packed
        runner.close()
        assert torch.equal(base.model(input_ids=ids).logits, before)
    hooks = [module for module in base.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks


@pytest.mark.parametrize("seed", range(20))
def test_buckets_hold_every_index_once_within_their_bounds(seed: int) -> None:
    chance = np.random.default_rng(seed)
    lengths = [int(x) for x in chance.integers(1, 300, size=int(chance.integers(0, 60)))]
    groups = buckets(lengths, 1_000)
    assert sorted(at for group in groups for at in group) == list(range(len(lengths)))
    longest = [max(lengths[at] for at in group) for group in groups]
    assert longest == sorted(longest)
    for group, most in zip(groups, longest, strict=True):
        assert len(group) == 1 or len(group) * most <= 1_000
    cost = sum(len(group) * most + 1_000 / 8 for group, most in zip(groups, longest, strict=True))
    assert cost <= cheapest(sorted(lengths), 1_000) + 1e-6


def cheapest(lengths: Sequence[int], tokens: int) -> float:
    """The least cost of sorted lengths, by trying every last group."""

    @functools.cache
    def of(end: int) -> float:
        sizes = [size for size in range(1, end + 1) if size == 1 or size * lengths[end - 1] <= tokens]
        return min((of(end - size) + size * lengths[end - 1] + tokens / 8 for size in sizes), default=0.0)

    return of(len(lengths))


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([10, 12, 200, 11], [[0, 3, 1], [2]]),
        ([60] + [20] * 13, [list(range(1, 14)), [0]]),
        ([60] + [20] * 12, [[0, *range(1, 13)]]),
        ([3_000, 3_000], [[0], [1]]),
        ([9_000], [[0]]),
        ([], []),
    ],
)
def test_small_groups_are_merged_and_wasteful_ones_split(lengths: list[int], expected: list[list[int]]) -> None:
    assert [sorted(group) for group in buckets(lengths)] == [sorted(group) for group in expected]


@pytest.mark.parametrize("seed", range(8))
def test_buckets_hold_no_more_reads_than_they_may(seed: int) -> None:
    chance = random.Random(seed)
    lengths = [chance.randint(1, 90) for _ in range(80)]
    reads = [chance.randint(1, length) for length in lengths]
    groups = buckets(lengths, 1_000, reads, 100)
    assert sorted(index for group in groups for index in group) == list(range(80))
    assert all(len(group) == 1 or sum(reads[index] for index in group) <= 100 for group in groups)
    assert all(len(group) == 1 or max(lengths[i] for i in group) * len(group) <= 1_000 for group in groups)
    assert buckets(lengths, 1_000, reads, 10**9) == buckets(lengths, 1_000)
