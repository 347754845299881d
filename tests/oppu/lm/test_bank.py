"""The bank against PEFT, its slots, and its rules of residence."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oppu.errors import AdapterUnreadable, Backpressure, ConfigError
from oppu.lm.bank import SlotBank
from oppu.lm.base import LoadedBase
from oppu.lm.port import AdapterRef
from oppu.lm.residence import AdapterBank
from oppu.lm.targets import adapter_config, find_targets
from oppu.values import UserId

FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gpt2", "bert")
Make = Callable[..., Any]


def new_bank(
    base: LoadedBase, slots: int = 3, rank: int = 4, alpha: float = 8.0, *, trainable: bool = False
) -> SlotBank:
    return SlotBank(find_targets(base.model, None), slots=slots, rank=rank, alpha=alpha, trainable=trainable)


def config_of(base: LoadedBase, rank: int = 4, alpha: float = 8.0) -> dict[str, object]:
    return adapter_config(base.model, find_targets(base.model, None), None, base=base.name, rank=rank, alpha=alpha)


def ids(rows: int, length: int = 12) -> torch.Tensor:
    return torch.randint(2, 258, (rows, length), generator=torch.Generator().manual_seed(3))


def run(base: LoadedBase, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = base.model(input_ids=rows, use_cache=False).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_rows_equal_peft(family: str, make_base: Make, make_adapter: Make, as_peft: Make) -> None:
    base = make_base(family, torch.float64)
    adapters = [make_adapter(base.model, seed) for seed in (1, 2)]
    rows = ids(4)
    plain = run(base, rows)
    peft = [as_peft(base, tensors, config_of(base)) for tensors in adapters]
    bank = new_bank(base)
    for slot, tensors in enumerate(adapters, start=1):
        bank.load(slot, tensors)
    with bank.use([2, 0, 1, 2]):
        mixed = run(base, rows)
    for row, slot in enumerate([2, 0, 1, 2]):
        with torch.no_grad():
            alone = peft[slot - 1](input_ids=rows[row : row + 1]).logits[0] if slot else plain[row]
        assert torch.allclose(mixed[row], alone, rtol=1e-9, atol=1e-9)
    assert (mixed[0] - plain[0]).abs().max() > 1e-3
    assert torch.equal(run(base, rows), plain)


def test_a_smaller_rank_keeps_its_own_scale(make_base: Make, make_adapter: Make, as_peft: Make) -> None:
    base = make_base("llama", torch.float64)
    small = make_adapter(base.model, 5, rank=2)
    peft = as_peft(base, small, config_of(base, rank=2))
    bank = new_bank(base)
    bank.load(1, make_adapter(base.model, 6))
    bank.load(1, small)
    with bank.use([1]), torch.no_grad():
        assert torch.allclose(run(base, ids(1)), peft(input_ids=ids(1)).logits, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slots=st.lists(st.integers(0, 3), min_size=1, max_size=12), ordered=st.booleans(), training=st.booleans())
def test_any_mix_gives_each_row_what_it_has_alone(
    slots: list[int], ordered: bool, training: bool, make_base: Make, make_adapter: Make
) -> None:
    base = make_base("llama", torch.float64)
    bank = SlotBank(find_targets(base.model, None), slots=3, rank=4, alpha=8.0, trainable=training)
    for slot, rank in ((1, 4), (2, 2), (3, 1)):
        bank.load(slot, make_adapter(base.model, slot, rank=rank))
    slots = sorted(slots) if ordered else slots
    rows = ids(len(slots))
    alone = []
    for row, slot in enumerate(slots):
        with bank.use([slot]):
            alone.append(run(base, rows[row : row + 1])[0])
    with bank.use(slots), torch.set_grad_enabled(training):
        mixed = base.model(input_ids=rows, use_cache=False).logits
    assert mixed.requires_grad == (training and any(slots))
    assert torch.allclose(mixed, torch.stack(alone), rtol=1e-9, atol=1e-9)
    bank.close()


@pytest.mark.parametrize("training", [False, True])
def test_runs_of_unequal_length_take_a_product_a_run_and_are_equal(
    training: bool, make_base: Make, make_adapter: Make
) -> None:
    base = make_base("gpt2", torch.float64)
    bank = SlotBank(find_targets(base.model, None), slots=2, rank=4, alpha=8.0, trainable=training)
    for slot in (1, 2):
        bank.load(slot, make_adapter(base.model, slot))
    slots = [0, 0, *[1] * 9, *[2] * 4]
    rows = ids(len(slots))
    with bank.use(slots), torch.set_grad_enabled(training):
        mixed = base.model(input_ids=rows, use_cache=False).logits
    for slot in (0, 1, 2):
        own = [row for row, other in enumerate(slots) if other == slot]
        with bank.use([slot] * len(own)):
            assert torch.allclose(mixed[own], run(base, rows[own]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
def test_layers_of_one_parent_may_read_different_inputs(training: bool) -> None:
    torch.manual_seed(0)
    pair = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 4), "v_proj": torch.nn.Linear(6, 4)}).double()
    bank = SlotBank(find_targets(pair, None), slots=1, rank=2, alpha=2.0, trainable=training)
    chance = np.random.default_rng(0)
    tensors = {name: chance.standard_normal(x.shape).astype(np.float32) for name, x in bank.read(0).items()}
    bank.load(1, tensors)
    one, two = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)
    with bank.use([1, 0, 1]), torch.set_grad_enabled(training):
        for x in (one, two, one):
            for name in ("q_proj", "v_proj"):
                layer: Any = pair[name]
                a, b = (torch.from_numpy(tensors[f"base_model.model.{name}.lora_{k}.weight"]).double() for k in "AB")
                plain = x @ layer.weight.T + layer.bias
                expected = plain + x @ a.T @ b.T * torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
                assert torch.allclose(layer(x), expected, rtol=1e-9, atol=1e-9)


def any_adapter(bank: SlotBank, seed: int) -> dict[str, Any]:
    chance = np.random.default_rng(seed)
    return {name: chance.normal(0, 0.3, x.shape).astype(np.float32) for name, x in bank.read(0).items()}


FLATTENED = ("q_proj", "fc1", "fc2")


@pytest.mark.parametrize("slots", [[0, 2, 1, 2], [0, *[1] * 9, *[2] * 4]], ids=["a row each", "runs"])
@pytest.mark.parametrize("training", [False, True])
def test_layers_that_read_flattened_rows_equal_peft(
    slots: list[int], training: bool, make_base: Make, as_peft: Make
) -> None:
    base = make_base("opt", torch.float64)
    targets = find_targets(base.model, FLATTENED)
    config = adapter_config(base.model, targets, FLATTENED, base=base.name, rank=4, alpha=8.0)
    rows, bank = ids(len(slots)), SlotBank(targets, slots=2, rank=4, alpha=8.0, trainable=training)
    adapters = {slot: any_adapter(bank, slot) for slot in (1, 2)}
    for slot, tensors in adapters.items():
        bank.load(slot, tensors)
    with bank.use(slots), torch.set_grad_enabled(training):
        mixed = base.model(input_ids=rows, use_cache=False).logits
    bank.close()
    peft = {0: base.model} | {slot: as_peft(base, tensors, config) for slot, tensors in adapters.items()}
    for row, slot in enumerate(slots):
        with torch.no_grad():
            alone = peft[slot](input_ids=rows[row : row + 1]).logits[0]
        assert torch.allclose(mixed[row], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (6,)], ids=["flattened", "rows", "one vector"])
def test_a_layer_that_does_not_keep_the_rows_apart_is_refused(shape: tuple[int, ...]) -> None:
    pair = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 4), "v_proj": torch.nn.Linear(6, 4)})
    bank = SlotBank(find_targets(pair, None), slots=1, rank=2, alpha=2.0)
    layer: Any = pair["v_proj"]
    with bank.use([1, 0, 1]), torch.no_grad(), pytest.raises(ConfigError, match="model.lora_targets: .* v_proj"):
        layer(torch.ones(shape))


def test_what_reads_another_input_shares_nothing_and_a_forward_is_counted_once(make_base: Make) -> None:
    base = make_base("llama", torch.float64)
    bank = SlotBank(find_targets(base.model, ("q_proj", "v_proj", "o_proj")), slots=2, rank=4, alpha=8.0)
    for slot in (1, 2):
        bank.load(slot, any_adapter(bank, slot))
    gathered, outside = [], mock.Mock(wraps=bank._cut)
    with bank.use([1, 2]), mock.patch.object(bank, "_cut", outside):
        steps = []
        for _ in range(4):
            steps.append(run(base, ids(2)))
            gathered.append(outside.call_count)
        assert bank._batch.mix is not None
        products = [kept.a.shape[-1] for kept in bank._batch.mix.kept.values() if kept is not None]
    assert gathered == [4, 8, 8, 8]  # two groups a block: once to read, once for good
    assert sorted(products) == [4, 4, 8, 8]  # o alone, q and v together
    assert all(torch.allclose(step, steps[0], rtol=1e-12) for step in steps)


def test_names_that_deceive_do_not_make_one_forward_two() -> None:
    pair = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(6, 4), "v_proj": torch.nn.Linear(6, 4)})
    bank = SlotBank(find_targets(pair, None), slots=1, rank=2, alpha=2.0)
    layers: list[Any] = [pair["q_proj"], pair["v_proj"]]
    with bank.use([1, 0, 1]), torch.no_grad():
        for layer in layers:
            layer(torch.ones(3, 5, 6))
        assert bank._batch.mix is not None and list(bank._batch.mix.kept.values()) == [None, None]


def test_adapters_are_served_in_the_bases_type_and_trained_in_float32(make_base: Make, make_adapter: Make) -> None:
    base = make_base("llama", torch.bfloat16)
    tensors = make_adapter(base.model, 1)
    training = new_bank(base, trainable=True)
    training.load(1, tensors)
    assert all(np.array_equal(training.read(1)[name], tensors[name]) for name in tensors)
    training.close()
    bank = new_bank(base)
    bank.load(1, tensors)
    rounded = {name: torch.from_numpy(tensors[name]).to(torch.bfloat16).float().numpy() for name in tensors}
    assert all(np.array_equal(bank.read(1)[name], rounded[name]) for name in tensors)
    assert 2 * bank.bytes == training.bytes
    with bank.use([1, 0]):
        mixed = run(base, ids(2))
    assert mixed.dtype == torch.bfloat16
    assert not torch.equal(mixed[0], run(base, ids(2))[0])
    assert torch.equal(mixed[1], run(base, ids(2))[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [[1, 2, 3], [0, 2, 2], [1] * 9 + [2] * 4], ids=["a row each", "plain", "runs"])
def test_a_batch_keeps_the_versions_that_it_began_to_decode_with(
    slots: list[int], dtype: torch.dtype, make_base: Make, make_adapter: Make
) -> None:
    base = make_base("llama", dtype)
    bank = new_bank(base)
    for slot in (1, 2, 3):
        bank.load(slot, make_adapter(base.model, slot))
    rows = ids(len(slots), 3)
    with bank.use(slots):
        steps = [run(base, rows), run(base, rows)]
        bank.load(2, make_adapter(base.model, 9))
        steps.append(run(base, rows))
        assert all(torch.equal(step, steps[0]) for step in steps)
    with bank.use(slots):
        assert not torch.equal(run(base, rows), steps[0])


def test_read_gives_back_what_was_loaded(make_base: Make, make_adapter: Make) -> None:
    base = make_base()
    tensors = make_adapter(base.model, 1)
    bank = new_bank(base)
    bank.load(2, tensors)
    found = bank.read(2)
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    assert not any(found.any() for found in bank.read(0).values())


def test_closed_bank_leaves_the_base_as_it_was(make_base: Make, make_adapter: Make) -> None:
    base = make_base()
    plain = run(base, ids(1))
    bank = new_bank(base)
    bank.load(1, make_adapter(base.model, 1))
    bank.close()
    with bank.use([1]):
        assert torch.equal(run(base, ids(1)), plain)


def test_fresh_is_the_base_until_trained_and_follows_its_seed(make_base: Make) -> None:
    base = make_base()
    bank = new_bank(base)
    bank.fresh(1, seed=4)
    bank.fresh(2, seed=4)
    bank.fresh(3, seed=5)
    with bank.use([1]):
        assert torch.equal(run(base, ids(1)), run(base, ids(1)))
    first, same, other = (bank.read(slot) for slot in (1, 2, 3))
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t, name: t.pop(name),
        lambda t, name: t.update(other=t[name]),
        lambda t, name: t.update({name: t[name][:, :-1]}),
        lambda t, name: t.update({name: t[name] * np.float32("nan")}),
        lambda t, name: t.update({n: np.zeros((9, x.shape[1]), np.float32) for n, x in t.items() if "lora_A" in n}),
    ],
    ids=["missing", "extra", "shape", "nan", "rank"],
)
def test_unfit_weights_are_refused_and_change_nothing(spoil: Any, make_base: Make, make_adapter: Make) -> None:
    base = make_base()
    bank = new_bank(base)
    bank.load(1, make_adapter(base.model, 1))
    before = bank.read(1)
    tensors = make_adapter(base.model, 2)
    spoil(tensors, next(iter(tensors)))
    with pytest.raises(AdapterUnreadable):
        bank.load(1, tensors)
    after = bank.read(1)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_an_adapter_on_fewer_blocks_leaves_the_others_as_they_are(
    make_base: Make, make_adapter: Make, as_peft: Make
) -> None:
    base = make_base("llama", torch.float64)
    upper = find_targets(base.model, None, 0.5)
    tensors = {n: x for n, x in make_adapter(base.model, 2).items() if any(layer in n for layer in upper)}
    peft = as_peft(base, tensors, adapter_config(base.model, upper, None, base="x", rank=4, alpha=8.0))
    expected = run(peft, ids(1))
    bank = new_bank(base)
    bank.load(1, make_adapter(base.model, 1))
    bank.load(1, tensors)
    with bank.use([1]):
        assert torch.allclose(run(base, ids(1)), expected, rtol=1e-9, atol=1e-9)
    few = SlotBank(upper, slots=1, rank=4, alpha=8.0)
    with pytest.raises(AdapterUnreadable, match="differ in 4 tensors"):
        few.load(1, make_adapter(base.model, 1))
    with pytest.raises(AdapterUnreadable):
        few.load(1, {})


def test_targets(make_base: Make) -> None:
    model = make_base("llama").model
    assert set(find_targets(model, ("o_proj",))) == {f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)}
    with pytest.raises(ConfigError, match="no layer"):
        find_targets(model, ("proj",))
    with pytest.raises(ConfigError, match="not linear"):
        find_targets(model, ("self_attn",))


def ref(name: str, version: int = 1) -> AdapterRef:
    return AdapterRef(UserId(name), 0, version)


def test_least_recently_used_goes_first(make_base: Make, make_adapter: Make) -> None:
    base = make_base()
    events: list[str] = []
    adapters = AdapterBank(new_bank(base, slots=2), events.append)
    tensors = make_adapter(base.model, 1)
    adapters.install(ref("a"), tensors)
    adapters.install(ref("b"), tensors)
    adapters.install(ref("a"), tensors)  # used again
    adapters.install(ref("c"), tensors)
    assert [ref(name) in adapters for name in "abc"] == [True, False, True]
    assert len(adapters) == 2
    assert events == ["load", "load", "evict", "load", "hit", "miss", "hit"]


def test_pinned_versions_stay(make_base: Make, make_adapter: Make) -> None:
    base = make_base()
    bank = new_bank(base, slots=2)
    adapters = AdapterBank(bank)
    tensors = {name: make_adapter(base.model, at) for at, name in enumerate("abc")}
    adapters.install(ref("a"), tensors["a"])
    adapters.install(ref("b"), tensors["b"])
    with adapters.pinned([ref("a"), ref("b"), ref("a")]) as slots:
        with pytest.raises(Backpressure):
            adapters.install(ref("c"), tensors["c"])
        found = bank.read(slots[ref("a")])
        assert all(np.array_equal(found[name], tensors["a"][name]) for name in found)
    with adapters.pinned([ref("a")]):
        adapters.install(ref("c"), tensors["c"])
        assert ref("a") in adapters and ref("b") not in adapters
    with pytest.raises(KeyError), adapters.pinned([ref("b")]):
        pass


def test_a_refused_version_evicts_nobody(make_base: Make, make_adapter: Make) -> None:
    base = make_base()
    adapters = AdapterBank(new_bank(base, slots=1))
    adapters.install(ref("a"), make_adapter(base.model, 1))
    with pytest.raises(AdapterUnreadable):
        adapters.install(ref("b"), {})
    assert ref("a") in adapters


def test_a_write_that_breaks_off_leaves_nobody_in_its_slot(
    make_base: Make, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base()
    bank = new_bank(base, slots=2)
    adapters = AdapterBank(bank)
    tensors = {name: make_adapter(base.model, at) for at, name in enumerate("abc")}
    adapters.install(ref("a"), tensors["a"])
    adapters.install(ref("b"), tensors["b"])
    whole = bank.write

    def half(slot: int, tensors: Any, rank: int) -> None:
        whole(slot, {name: value * 2 for name, value in tensors.items()}, rank)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bank, "write", half)
    with pytest.raises(RuntimeError):
        adapters.install(ref("c"), tensors["c"])
    assert [ref(name) in adapters for name in "abc"] == [False, True, False]
    monkeypatch.setattr(bank, "write", whole)
    for name in "ac":
        adapters.install(ref(name), tensors[name])
        with adapters.pinned([ref(name)]) as slots:
            found = bank.read(slots[ref(name)])
        assert all(np.array_equal(found[key], tensors[name][key]) for key in found)
    assert len(adapters) == 2


@pytest.mark.parametrize(
    "spoil", [lambda value: value.astype(np.float64), lambda value: value[0], lambda value: np.float32(1).reshape(())]
)
@pytest.mark.parametrize("at", [0, -1])
def test_a_tensor_of_another_type_or_shape_is_refused_by_name(
    spoil: Callable[[Any], Any], at: int, make_base: Make, make_adapter: Make
) -> None:
    base = make_base()
    tensors = make_adapter(base.model, 1)
    name = list(tensors)[at]
    tensors[name] = spoil(tensors[name])
    with pytest.raises(AdapterUnreadable, match=name):
        new_bank(base).check(tensors)
