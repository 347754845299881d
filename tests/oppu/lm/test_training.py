"""Training in the bank against PEFT with ``torch.optim.AdamW``, user by user; and what must not spill over."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from oppu.lm import reading, training
from oppu.lm.bank import SlotBank
from oppu.lm.base import LoadedBase
from oppu.lm.dropout import Dropout, dropped, row_seed
from oppu.lm.encoding import Encoder, Reading, Target
from oppu.lm.forward import Runner, losses_of
from oppu.lm.port import Example, TrainConfig
from oppu.lm.sequence_packing import OWN_WIDTHS
from oppu.lm.targets import adapter_config, find_targets
from oppu.lm.training import Calls, SlotAdamW, SlotResult, slots_for, train_slots
from oppu.tasks import Tasks

Make = Callable[..., Any]
CONFIG = TrainConfig(learning_rate=1e-2, weight_decay=0.1, passes=3, batch=4)
CHOICES = ("alpha", "beta", "bravo", "be")


def examples(seed: int, count: int) -> list[Example]:
    """Choice and text examples of mixed lengths, one kind a user."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        text = "".join(chance.choice(list("abc ")) for _ in range(int(chance.integers(1, 40))))
        if seed % 2:
            made.append(Example("news_categorize", text, str(chance.choice(CHOICES)), CHOICES))
        else:
            made.append(Example("news_headline", text, text[: int(chance.integers(1, 6))] + "x"))
    return made


def targets_of(base: LoadedBase, tasks: Tasks, rows: Sequence[Example]) -> list[Target]:
    encoder = Encoder(base.prompts(), tasks, max_tokens=64, max_positions=base.max_positions)
    return encoder.targets(rows)


def new_bank(base: LoadedBase, adapters: Sequence[dict[str, Any]]) -> SlotBank:
    bank = SlotBank(find_targets(base.model, None), slots=len(adapters), rank=4, alpha=8.0, trainable=True)
    for slot, tensors in enumerate(adapters, start=1):
        bank.load(slot, tensors)
    return bank


def weights(bank: SlotBank, slot: int) -> list[torch.Tensor]:
    return [stack[slot].detach().clone() for pair in zip(bank.a, bank.b, strict=True) for stack in pair]


def train(
    base: LoadedBase,
    bank: SlotBank,
    users: Sequence[list[Target]],
    config: TrainConfig = CONFIG,
    *,
    seeds: Sequence[int] = (),
    shared: bool | None = None,
) -> list[SlotResult]:
    """Train; ``shared``: whether sequences share rows where they could, instead of where it costs less."""

    def plan(runner: Runner, readings: Sequence[Reading], *, apart: bool) -> list[reading.Group]:
        assert runner.packs
        return reading._groups(runner, readings, OWN_WIDTHS[-1] if shared else 0, apart=apart)

    runner = Runner(base)
    beats: list[None] = []
    try:
        planned = reading.planned if shared is None else plan
        with (
            mock.patch.object(training, "planned", planned),
            mock.patch.object(runner, "logits", wraps=runner.logits) as run,
        ):
            results = train_slots(runner, bank, users, config, Calls(lambda: beats.append(None)), seeds=seeds)
    finally:
        runner.close()
        bank.close()
    assert len(beats) >= max((result.steps for result in results if result.finite), default=0)
    if shared is not None:
        assert all(bool(call.kwargs["layouts"]) == shared for call in run.call_args_list)
    return results


def reference_loss(model: Any, target: Target) -> torch.Tensor:
    """One sequence alone, all logits, no bank and no buckets."""
    logits = model(input_ids=torch.tensor([target.ids])).logits[0]
    total = torch.zeros((), dtype=logits.dtype)
    for position, aim in zip(target.positions, target.aims, strict=True):
        row = logits[position] if aim.allowed is None else logits[position][list(aim.allowed)]
        total = total + torch.nn.functional.cross_entropy(row[None], torch.tensor([aim.index]))
    return total * target.scale + target.offset


def train_alone(
    model: Any,
    targets: Sequence[Target],
    config: TrainConfig,
    row: Callable[[int, int], None] = lambda _step, _at: None,
) -> list[torch.Tensor]:
    """A plain loop: PEFT, autograd, ``clip_grad_norm_``, ``torch.optim.AdamW``; ``row`` is told what comes next."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    batches = [targets[at : at + config.batch] for at in range(0, len(targets), config.batch)] * config.passes
    rise = max(1, math.ceil(0.1 * len(batches)))
    for step, batch in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = config.learning_rate * min(1.0, step / rise)
        optimizer.zero_grad()
        losses = []
        for at, target in enumerate(batch):
            row(step - 1, at)
            losses.append(reference_loss(model, target))
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_equals_training_each_user_alone_with_peft(
    family: str, shared: bool, make_base: Make, make_adapter: Make, as_peft: Make, tasks: Tasks
) -> None:
    base = make_base(family, torch.float64)
    adapters = [make_adapter(base.model, seed) for seed in range(3)]
    users = [targets_of(base, tasks, examples(seed, count)) for seed, count in ((1, 9), (2, 23), (3, 3))]
    config = adapter_config(base.model, find_targets(base.model, None), None, base="x", rank=4, alpha=8.0)
    models = [as_peft(base, tensors, config, trainable=True) for tensors in adapters]
    alone = [train_alone(model, user, CONFIG) for model, user in zip(models, users, strict=True)]
    bank = new_bank(base, adapters)
    results = train(base, bank, users, shared=shared)
    assert [result.steps for result in results] == [9, 18, 3]
    for slot, expected in enumerate(alone, start=1):
        for mine, theirs in zip(weights(bank, slot), expected, strict=True):
            assert (mine - theirs).abs().max() <= 1e-9 * theirs.abs().max()


class _Counted(torch.nn.Module):
    """In the place of PEFT's dropout: the bank's masks, for the row whose seed ``now`` holds."""

    def __init__(self, layer: int, now: list[int], rate: float) -> None:
        super().__init__()
        self.layer, self.now, self.rate = layer, now, rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropped(x, Dropout(self.rate, (self.now[0],)), self.layer)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_sharing_rows_changes_no_more_than_rounding(
    family: str, dtype: torch.dtype, near: float, make_base: Make, make_adapter: Make, tasks: Tasks
) -> None:
    base, config = make_base(family, dtype), replace(CONFIG, passes=2, learning_rate=1e-3, dropout=0.2)
    users = [targets_of(base, tasks, examples(seed, count)) for seed, count in ((1, 9), (2, 14), (3, 3))]
    losses = []
    for shared in (True, False):
        bank = new_bank(base, [make_adapter(base.model, seed) for seed in range(3)])
        results = train(base, bank, users, config, seeds=[1, 2, 3], shared=shared)
        losses.append([result.mean_loss for result in results])
    assert np.allclose(losses[0], losses[1], rtol=near)
    assert not np.allclose(losses[0], losses[0][::-1], rtol=near)


def test_long_examples_do_not_widen_the_rows_of_short_ones(make_base: Make) -> None:
    lengths = [*(10 + 7 * at % 41 for at in range(60)), *[200] * 4]
    readings = [Reading((5,) * length, (0,), 1 + at % 4) for at, length in enumerate(lengths)]
    runner = Runner(make_base("llama"))
    groups = reading.planned(runner, readings, apart=True)
    layouts = [group.layout for group in groups if group.layout is not None]
    assert layouts and max(layout.width for layout in layouts) <= OWN_WIDTHS[-1]
    assert sorted(member for group in groups for member in group.members) == list(range(64))
    runner.close()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_dropout_and_the_clip_norm_equal_pefts_under_the_same_masks(
    family: str, shared: bool, make_base: Make, make_adapter: Make, as_peft: Make, tasks: Tasks
) -> None:
    base = make_base(family, torch.float64)
    config = replace(CONFIG, passes=1, batch=3, dropout=0.3, clip_norm=0.05)
    adapters, counts = [make_adapter(base.model, seed) for seed in range(3)], (7, 6, 2)
    users = [targets_of(base, tasks, examples(seed, count)) for seed, count in enumerate(counts, start=1)]
    seeds, shape = (
        [11, 12, 13],
        adapter_config(base.model, find_targets(base.model, None), None, base="x", rank=4, alpha=8.0),
    )
    alone = []
    for tensors, user, seed in zip(adapters, users, seeds, strict=True):
        model, now = as_peft(base, tensors, shape, trainable=True), [0]
        for layer, module in enumerate(m for m in model.modules() if hasattr(m, "lora_dropout")):
            module.lora_dropout["default"] = _Counted(layer, now, config.dropout)

        def row(step: int, at: int, now: list[int] = now, seed: int = seed) -> None:
            now[0] = row_seed(seed, step, at)

        alone.append(train_alone(model, user, config, row))
    bank = new_bank(base, adapters)
    train(base, bank, users, config, seeds=seeds, shared=shared)
    for slot, expected in enumerate(alone, start=1):
        for mine, theirs in zip(weights(bank, slot), expected, strict=True):
            assert (mine - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def _apart(base: LoadedBase, users: Sequence[list[Target]], adapters: Sequence[dict[str, Any]], as_peft: Make) -> float:
    """Train in the bank and alone; return the largest relative difference of any user's weights."""
    config = adapter_config(base.model, find_targets(base.model, None), None, base="x", rank=4, alpha=8.0)
    models = [as_peft(base, tensors, config, trainable=True) for tensors in adapters]
    alone = [train_alone(model, user, CONFIG) for model, user in zip(models, users, strict=True)]
    bank = new_bank(base, adapters)
    train(base, bank, users)
    pairs = [pair for slot, own in enumerate(alone, start=1) for pair in zip(weights(bank, slot), own, strict=True)]
    return max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs)


class _ClipsAllTogether(SlotAdamW):
    def step(self, slots: Sequence[int], warm_up: Sequence[int], total: Sequence[int] | None = None) -> None:
        norm = torch.stack([s.grad.norm() for s in self._stacks if s.grad is not None]).norm()
        for stack in self._stacks:
            if stack.grad is not None:
                stack.grad /= max(float(norm), 1.0)
        super().step(slots, warm_up, total)


class _CountsStepsTogether(SlotAdamW):
    def step(self, slots: Sequence[int], warm_up: Sequence[int], total: Sequence[int] | None = None) -> None:
        super().step(slots, warm_up, total)
        self._count[:] = self._count.max()


class _DecaysIdleSlots(SlotAdamW):
    def step(self, slots: Sequence[int], warm_up: Sequence[int], total: Sequence[int] | None = None) -> None:
        super().step(slots, warm_up, total)
        with torch.no_grad():
            for stack in self._stacks:
                idle = [slot for slot in range(1, len(stack)) if slot not in slots]
                stack[idle] *= 1 - self._learning_rate * self._weight_decay


@pytest.mark.parametrize("bug", [None, _ClipsAllTogether, _DecaysIdleSlots, "token mean"])
def test_what_would_mix_users_is_noticed(
    bug: Any, make_base: Make, make_adapter: Make, as_peft: Make, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("llama", torch.float64)
    adapters = [make_adapter(base.model, seed) for seed in range(3)]
    users = [targets_of(base, tasks, examples(seed, count)) for seed, count in ((1, 9), (2, 14), (3, 3))]
    if bug == "token mean":

        def by_tokens(log_probs: torch.Tensor, targets: Sequence[Target]) -> torch.Tensor:
            return losses_of(log_probs, targets) * torch.tensor([float(len(t.positions)) for t in targets])

        monkeypatch.setattr(training, "losses_of", by_tokens)
    elif bug is not None:
        monkeypatch.setattr(training, "SlotAdamW", bug)
    apart = _apart(base, users, adapters, as_peft)
    assert apart <= 1e-9 if bug is None else apart > 1e-4


def test_float32_answers_are_the_same_after_fifty_steps(
    make_base: Make, make_adapter: Make, as_peft: Make, tasks: Tasks
) -> None:
    """Adam divides by the root of the second moment, so float32 weights drift apart; what they answer must not."""
    base, config = make_base("llama"), TrainConfig(learning_rate=1e-3, weight_decay=0.01, passes=10, batch=4)
    adapters = [make_adapter(base.model, seed) for seed in range(2)]
    users = [targets_of(base, tasks, examples(seed, 20)) for seed in (1, 2)]
    bank = new_bank(base, adapters)
    assert [result.steps for result in train(base, bank, users, config)] == [50, 50]
    peft_config = adapter_config(base.model, find_targets(base.model, None), None, base="x", rank=4, alpha=8.0)
    probe = torch.randint(2, 258, (64, 16), generator=torch.Generator().manual_seed(5))
    for slot, (tensors, user) in enumerate(zip(adapters, users, strict=True), start=1):
        alone = as_peft(base, tensors, peft_config, trainable=True)
        train_alone(alone, user, config)
        trained = SlotBank(find_targets(base.model, None), slots=1, rank=4, alpha=8.0)
        trained.load(1, bank.read(slot))
        with torch.no_grad(), trained.use([1] * len(probe)):
            mine = base.model(input_ids=probe).logits
        trained.close()
        with torch.no_grad():
            theirs = alone(input_ids=probe).logits
        assert (mine - theirs).abs().max() <= 1e-3 * theirs.abs().max()
        assert (mine.argmax(-1) == theirs.argmax(-1)).double().mean() >= 0.999


def test_batch_mates_and_their_order_do_not_matter(make_base: Make, make_adapter: Make, tasks: Tasks) -> None:
    base = make_base("llama", torch.float64)
    adapters = [make_adapter(base.model, seed) for seed in range(3)]
    users = [targets_of(base, tasks, examples(seed, 7)) for seed in range(3)]
    together, turned, single = new_bank(base, adapters), new_bank(base, adapters[::-1]), new_bank(base, adapters[:1])
    for bank, rows in ((together, users), (turned, users[::-1]), (single, users[:1])):
        train(base, bank, rows)
    for first, second, third in zip(weights(together, 1), weights(turned, 3), weights(single, 1), strict=True):
        assert torch.allclose(first, second, rtol=1e-10) and torch.allclose(first, third, rtol=1e-10)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("family", "endings"),
    [("llama", ("down_proj",)), ("bert", ("dense",)), ("gpt2", ("c_proj",)), ("opt", ("out_proj", "fc2"))],
)
def test_what_is_dropped_behind_the_last_attention_does_not_depend_on_batch_mates(
    family: str, endings: tuple[str, ...], shared: bool, make_base: Make, tasks: Tasks
) -> None:
    """A choice reads few positions, a bare text all of its own: whichever of them is longer in the batch, and whether
    they share rows or, by itself, a sequence has one."""
    base, config = make_base(family, torch.float64), replace(CONFIG, passes=2, batch=2, dropout=0.3)
    choice = [Example("news_categorize", "abc" * n, "alpha", CHOICES) for n in (2, 1, 3)]
    texts = [[Example("tweet_paraphrase", "word " * n, "") for n in lengths] for lengths in ((12, 11, 9), (1, 2, 1))]
    users = [targets_of(base, tasks, rows) for rows in (choice, *texts)]

    def trained(order: Sequence[int]) -> dict[int, list[torch.Tensor]]:
        layers = find_targets(base.model, endings)
        layers.pop("cls.predictions.transform.dense", None)
        bank = SlotBank(layers, slots=len(order), rank=4, alpha=8.0, trainable=True)
        for slot in range(1, len(order) + 1):
            bank.fresh(slot, 5)
        train(base, bank, [users[at] for at in order], config, seeds=order, shared=shared)
        return {user: weights(bank, slot) for slot, user in enumerate(order, start=1)}

    together, turned = trained([0, 1, 2]), trained([2, 0, 1])
    for user in range(3):
        for other in (turned[user], trained([user])[user]):
            for mine, theirs in zip(together[user], other, strict=True):
                assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_a_row_that_is_not_finite_stays_its_users_problem(
    shared: bool, make_base: Make, make_adapter: Make, tasks: Tasks
) -> None:
    base = make_base("llama", torch.float64)
    adapters = [make_adapter(base.model, seed) for seed in range(3)]
    users = [targets_of(base, tasks, examples(seed, 6)) for seed in (1, 3, 5)]
    clean, spoilt = new_bank(base, adapters), new_bank(base, adapters)
    with torch.no_grad():
        spoilt.b[0][2, 0, 0] = math.nan
    train(base, clean, users, shared=shared)
    results = train(base, spoilt, users, shared=shared)
    assert [result.finite for result in results] == [True, False, True]
    assert math.isnan(results[1].mean_loss)
    for slot in (1, 3):
        for mine, alone in zip(weights(spoilt, slot), weights(clean, slot), strict=True):
            assert torch.allclose(mine, alone, rtol=1e-9, atol=1e-12)


def test_users_without_rows_and_slot_zero_stay_bit_identical(make_base: Make, make_adapter: Make, tasks: Tasks) -> None:
    base = make_base("bert")
    bank = new_bank(base, [make_adapter(base.model, seed) for seed in range(3)])
    before = {slot: weights(bank, slot) for slot in (0, 2)}
    results = train(base, bank, [targets_of(base, tasks, examples(1, 5)), [], targets_of(base, tasks, examples(3, 9))])
    assert results[1] == SlotResult(finite=True, steps=0, mean_loss=0.0)
    for slot, old in before.items():
        assert all(torch.equal(a, b) for a, b in zip(weights(bank, slot), old, strict=True))


def test_single_choice_examples_have_no_gradient_but_count(make_base: Make, make_adapter: Make, tasks: Tasks) -> None:
    base = make_base("llama", torch.float64)
    only = targets_of(base, tasks, [Example("citation", "x", "[1]", ("[1]",))] * 4)
    bank = new_bank(base, [make_adapter(base.model, 1)])
    before = weights(bank, 1)
    result = train(base, bank, [only], TrainConfig(learning_rate=1e-2, weight_decay=0.0, passes=1, batch=2))[0]
    assert result == SlotResult(finite=True, steps=2, mean_loss=0.0)
    assert all(torch.equal(a, b) for a, b in zip(weights(bank, 1), before, strict=True))


def test_loss_falls_and_its_mean_is_over_all_rows(make_base: Make, make_adapter: Make, tasks: Tasks) -> None:
    base = make_base("llama")
    rows = targets_of(base, tasks, examples(1, 8))
    still = TrainConfig(learning_rate=1e-12, weight_decay=0.0, passes=1, batch=3)
    start = train(base, new_bank(base, [make_adapter(base.model, 1)]), [rows], still)[0]
    more = TrainConfig(learning_rate=1e-2, weight_decay=0.0, passes=15, batch=3)
    end = train(base, new_bank(base, [make_adapter(base.model, 1)]), [rows], more)[0]
    runner = Runner(base)
    bank = new_bank(base, [make_adapter(base.model, 1)])
    with bank.use([1]), torch.no_grad():
        one_by_one = [float(reference_loss(base.model, row)) for row in rows]
    runner.close()
    assert start.mean_loss == pytest.approx(np.mean(one_by_one), rel=1e-4)
    assert end.mean_loss < 0.7 * start.mean_loss


@st.composite
def job_lists(draw: st.DrawFn) -> tuple[int, list[int], int]:
    """Slots, each user's number of examples, and the one whose weights are not finite (or nobody's)."""
    counts = draw(st.lists(st.integers(0, 9), min_size=1, max_size=7))
    return draw(st.integers(1, 4)), counts, draw(st.integers(-3, len(counts) - 1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(job_lists(), st.sampled_from([1, 5, 100]))
def test_who_takes_a_slot_after_another_equals_training_alone(
    make_base: Make, make_adapter: Make, tasks: Tasks, jobs: tuple[int, list[int], int], look: int
) -> None:
    """However late it is seen that a user's gradient is not finite."""
    slots, counts, spoilt = jobs
    base, config = make_base("llama", torch.float64), TrainConfig(1e-2, 0.1, passes=2, batch=3)
    adapters = [make_adapter(base.model, seed) for seed in range(len(counts))]
    if spoilt >= 0:
        next(iter(adapters[spoilt].values()))[:] = 1e30
    users = [targets_of(base, tasks, examples(seed, count)) for seed, count in enumerate(counts)]
    alone = {}
    for at, (adapter, user) in enumerate(zip(adapters, users, strict=True)):
        bank = new_bank(base, [adapter])
        alone[at] = train(base, bank, [user], config)[0], weights(bank, 1)
    bank, runner, found = new_bank(base, adapters[:slots]), Runner(base), {}
    calls = Calls(
        lambda: None,
        begin=lambda user, slot: bank.load(slot, adapters[user]),
        end=lambda user, slot: found.update({user: weights(bank, slot)}),
    )
    with mock.patch.object(training, "_LOOK_STEPS", {"cpu": look}):
        results = train_slots(runner, bank, users, config, calls)
    runner.close()
    bank.close()
    for at, (result, own) in alone.items():
        assert (results[at].finite, results[at].steps) == (result.finite, result.steps)
        assert results[at].mean_loss == pytest.approx(result.mean_loss, rel=1e-9, nan_ok=True)
        if result.finite:
            assert all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(found[at], own, strict=True))


@pytest.mark.parametrize("forgets", [True, False])
def test_a_past_that_stays_in_a_slot_is_noticed(
    forgets: bool, make_base: Make, make_adapter: Make, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, found = make_base("llama", torch.float64), []
    adapter, user = make_adapter(base.model, 1), targets_of(base, tasks, examples(1, 9))
    if not forgets:
        monkeypatch.setattr(SlotAdamW, "clear", lambda _self, _slot: None)
    bank, runner = new_bank(base, [adapter]), Runner(base)
    calls = Calls(
        lambda: None, lambda _, slot: bank.load(slot, adapter), lambda _, slot: found.append(weights(bank, slot))
    )
    train_slots(runner, bank, [user, user], CONFIG, calls)
    runner.close()
    bank.close()
    apart = max(float((mine - other).abs().max() / other.abs().max()) for mine, other in zip(*found, strict=True))
    assert apart <= 1e-9 if forgets else apart > 1e-4


def test_the_bank_stays_full(make_base: Make, make_adapter: Make, tasks: Tasks) -> None:
    base, config = make_base("llama"), TrainConfig(1e-3, 0.0, passes=1, batch=1)
    users = [targets_of(base, tasks, examples(1, count)) for count in (1, 2, 6, 1, 2)]
    bank, runner = new_bank(base, [make_adapter(base.model, 1)] * 2), Runner(base)
    seen: list[tuple[str, int, int]] = []
    calls = Calls(
        lambda: None,
        begin=lambda user, slot: seen.append(("begin", user, slot)),
        end=lambda user, slot: seen.append(("end", user, slot)),
    )
    steps = mock.Mock(wraps=SlotAdamW.step)
    with mock.patch.object(SlotAdamW, "step", lambda self, *args: steps(self, *args)):
        train_slots(runner, bank, users, config, calls)
    runner.close()
    bank.close()
    assert [len(call.args[1]) for call in steps.call_args_list] == [2] * 6
    assert [entry for entry in seen if entry[0] == "begin"] == [
        ("begin", 1, 1), ("begin", 2, 2), ("begin", 4, 1), ("begin", 0, 1), ("begin", 3, 1)
    ]  # fmt: skip
    assert sorted(user for kind, user, _ in seen if kind == "end") == [0, 1, 2, 3, 4]


def test_slots_are_as_many_as_fill_a_forward(make_base: Make) -> None:
    runner = Runner(make_base())
    config = TrainConfig(1e-3, 0.0, passes=1, batch=16)
    assert [slots_for(runner, users, config) for users in (0, 3, 500)] == [1, 3, runner.tokens // 256]
    assert slots_for(runner, 5, TrainConfig(1e-3, 0.0, passes=1, batch=100_000)) == 1


class TestSlotAdamW:
    """Slots that take turns, against one ``torch.optim.AdamW`` each."""

    TURNS = ((0, 2), (1,), (0, 1, 2), (2,), (0,), (0, 1), (2, 0))

    def run(self, stacks: list[torch.Tensor], kind: type[SlotAdamW] = SlotAdamW) -> None:
        optimizer = kind(stacks, learning_rate=0.1, weight_decay=0.2)
        for turn, slots in enumerate(self.TURNS):
            for at, stack in enumerate(stacks):
                stack.grad = torch.zeros_like(stack)
                for slot in slots:
                    stack.grad[slot] = self.gradient(turn, at, slot, stack)
            optimizer.step(slots, [3] * len(slots))
            assert all(stack.grad is None for stack in stacks)

    def gradient(self, turn: int, at: int, slot: int, stack: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(100 * turn + 10 * at + slot)
        size = 10.0 if slot == 2 else 0.01  # one slot is clipped, the others are not
        return size * torch.randn(stack.shape[1:], generator=generator, dtype=stack.dtype)

    def stacks(self) -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def test_each_slot_equals_torch(self) -> None:
        stacks = self.stacks()
        starts = [stack.detach().clone() for stack in stacks]
        self.run(stacks)
        for slot in range(3):
            parameters = [torch.nn.Parameter(start[slot].clone()) for start in starts]
            optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.2)
            turns = [turn for turn, slots in enumerate(self.TURNS) if slot in slots]
            for step, turn in enumerate(turns, start=1):
                optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, step / 3)
                for at, parameter in enumerate(parameters):
                    parameter.grad = self.gradient(turn, at, slot, stacks[at])
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            for stack, parameter in zip(stacks, parameters, strict=True):
                assert torch.allclose(stack[slot], parameter, rtol=1e-10, atol=1e-12)

    def test_a_linear_schedule_falls_to_zero_by_each_slots_own_steps(self) -> None:
        stacks = self.stacks()
        starts = [stack.detach().clone() for stack in stacks]
        optimizer, steps = SlotAdamW(stacks, learning_rate=0.1, weight_decay=0.2), {0: 4, 1: 9}
        for step in range(9):
            slots = [slot for slot, count in steps.items() if step < count]
            for at, stack in enumerate(stacks):
                stack.grad = torch.zeros_like(stack)
                for slot in slots:
                    stack.grad[slot] = self.gradient(step, at, slot, stack)
            optimizer.step(slots, [2] * len(slots), [steps[slot] for slot in slots])
        for slot, count in steps.items():
            parameters = [torch.nn.Parameter(start[slot].clone()) for start in starts]
            alone = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.2)
            for step in range(count):
                alone.param_groups[0]["lr"] = 0.1 * min((step + 1) / 2, (count - step) / (count - 2))
                for at, parameter in enumerate(parameters):
                    parameter.grad = self.gradient(step, at, slot, stacks[at])
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                alone.step()
            for stack, parameter in zip(stacks, parameters, strict=True):
                assert torch.allclose(stack[slot], parameter, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("bug", [_ClipsAllTogether, _CountsStepsTogether, _DecaysIdleSlots])
    def test_a_step_that_mixes_slots_is_noticed(self, bug: type[SlotAdamW]) -> None:
        right, wrong = self.stacks(), self.stacks()
        self.run(right)
        self.run(wrong, bug)
        assert not torch.allclose(right[0][:2], wrong[0][:2], rtol=1e-4)

    def test_a_dropped_slot_is_never_touched_again(self) -> None:
        stacks = self.stacks()
        optimizer = SlotAdamW(stacks, learning_rate=0.1, weight_decay=0.2)
        before = stacks[0][1].detach().clone()
        for stack in stacks:
            stack.grad = torch.ones_like(stack)
        assert stacks[0].grad is not None
        stacks[0].grad[1, 0, 0] = math.inf
        optimizer.step([0, 1], [1, 1])
        for stack in stacks:
            stack.grad = torch.ones_like(stack)
        optimizer.step([0, 1], [1, 1])
        assert optimizer.finite.tolist() == [True, False, True]
        assert torch.equal(stacks[0][1], before)

    def test_who_is_not_in_a_step_or_dropped_in_it_keeps_every_bit(self) -> None:
        stacks = [*self.stacks(), torch.randn(3, 4, dtype=torch.float64).mul(-0.0).requires_grad_()]
        optimizer = SlotAdamW(stacks, learning_rate=0.1, weight_decay=0.2)
        everything = [*stacks, *optimizer._first, *optimizer._second, optimizer._count]

        def step(slots: list[int], spoilt: float) -> None:
            for stack in stacks:
                stack.grad = torch.randn_like(stack)
            grad = stacks[1].grad
            assert grad is not None
            grad[1] = spoilt
            optimizer.step(slots, [2] * len(slots), [9] * len(slots))

        def bits(slot: int) -> list[torch.Tensor]:
            return [part.detach()[slot].clone().view(torch.int64) for part in everything]

        step([0, 1, 2], 1.0)
        for slots, spoilt in (([0, 1], math.nan), ([0, 1], 1.0), ([0], 1.0), ([1], math.inf)):
            before = [bits(slot) for slot in range(3)]
            step(slots, spoilt)
            for slot in (1, 2):
                assert all(map(torch.equal, bits(slot), before[slot]))
            assert (0 in slots) != all(map(torch.equal, bits(0), before[0]))

    @pytest.mark.parametrize("first", [math.nan, math.inf])
    def test_a_slot_whose_first_gradient_is_not_finite_keeps_its_weights(self, first: float) -> None:
        stacks = self.stacks()
        optimizer, before = SlotAdamW(stacks, learning_rate=0.1, weight_decay=0.2), stacks[0].detach().clone()
        for stack in stacks:
            stack.grad = torch.full_like(stack, first)
        optimizer.step([1], [1])
        assert torch.equal(stacks[0], before) and optimizer.finite.tolist() == [True, False, True]
        assert all(moment.isfinite().all() for moment in (*optimizer._first, *optimizer._second))


def test_a_gpu_is_asked_for_what_is_not_finite_only_now_and_then(
    make_base: Make, make_adapter: Make, tasks: Tasks
) -> None:
    base, config = make_base("llama"), TrainConfig(1e-3, 0.0, passes=1, batch=1)
    users = [targets_of(base, tasks, examples(1, count)) for count in (9, 3)]
    bank, runner = new_bank(base, [make_adapter(base.model, seed) for seed in range(2)]), Runner(base)
    with torch.no_grad():
        bank.b[0][2, 0, 0] = math.nan
    steps = mock.Mock(wraps=SlotAdamW.step)
    with (
        mock.patch.object(training, "_LOOK_STEPS", {"cpu": 2}),
        mock.patch.object(SlotAdamW, "step", lambda self, *args: steps(self, *args)),
    ):
        results = train_slots(runner, bank, users, config, Calls(lambda: None))
    runner.close()
    bank.close()
    assert [len(call.args[1]) for call in steps.call_args_list] == [2, 2, *[1] * 7]  # it left after the second
    assert [result.finite for result in results] == [True, False] and math.isnan(results[1].mean_loss)


class _Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Counts what a GPU would be waited for: numbers that are read by Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mistral", "qwen3", "gemma3"])
def test_a_gpu_is_not_waited_for_between_steps(
    make_base: Make, make_adapter: Make, tasks: Tasks, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(training, "_LOOK_STEPS", {"cpu": 1000})  # looks are at the ends alone
    base = make_base(family)
    counted = []
    for passes in (2, 8):
        bank = new_bank(base, [make_adapter(base.model, 1)])
        with _Waits() as waits:
            train(base, bank, [targets_of(base, tasks, examples(1, 8))], replace(CONFIG, passes=passes))
        counted.append(waits.count)
    assert counted[0] == counted[1]  # 4 steps and 16
