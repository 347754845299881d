"""Attention as plain products against transformers' own call of torch's."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oppu.lm import attention
from oppu.lm.attention import PlainAttention, attend
from oppu.lm.bank import SlotBank
from oppu.lm.encoding import Reading
from oppu.lm.forward import Runner
from oppu.lm.targets import find_targets

ROWS, TOKENS = 3, 7
SEEN = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool).tril() & (torch.arange(TOKENS) != 2)
SEEN[:, :, 2, 0] = True


@pytest.mark.parametrize(
    "how",
    [
        {"attention_mask": None},
        {"attention_mask": None, "is_causal": False},
        {"attention_mask": None, "scaling": 0.7},
        {"attention_mask": SEEN},
        {"attention_mask": torch.zeros(SEEN.shape, dtype=torch.float64).masked_fill(~SEEN, -1e30)},
    ],
    ids=["causal", "both ways", "scaled", "true is read", "added"],
)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_equals_torch(how: dict[str, Any], groups: int, causal: bool) -> None:
    torch.manual_seed(0)
    module = SimpleNamespace(is_causal=causal, num_key_value_groups=groups, training=False)
    query = torch.randn(ROWS, 4, TOKENS, 6, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(ROWS, 4 // groups, TOKENS, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = []
    for work in (attend, sdpa_attention_forward):
        output = work(module, query, key, value, **how)[0]
        found.append((output, *torch.autograd.grad(output.square().sum(), (query, key, value))))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("held", [1, 1600, 1 << 20])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("length", [1, TOKENS])
def test_reads_and_decodes_as_torch_does_however_much_is_held_at_once(
    length: int, shared: bool, groups: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SCORES_BYTES", held)
    generator = torch.Generator().manual_seed(0)
    module = SimpleNamespace(is_causal=True, num_key_value_groups=groups, training=False)
    query = torch.randn(ROWS, 4, length, 6, dtype=torch.float64, generator=generator)
    key, value = (torch.randn(ROWS, 4 // groups, TOKENS, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    rows = SEEN[:1] if shared else SEEN.clone()
    if not shared:
        rows[1, :, -1, 0] = False
    seen = rows[:, :, -length:]
    for mask in (None, seen, torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)):
        with torch.no_grad():
            mine, theirs = (work(module, query, key, value, mask)[0] for work in (attend, sdpa_attention_forward))
        assert mine.shape == theirs.shape
        assert mine.is_contiguous()
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_models_that_it_is_not_attached_to_stay_as_they_are() -> None:
    model = torch.nn.Sequential(torch.nn.Identity())
    before = copy.deepcopy(model)
    first = PlainAttention(model)
    twin = copy.deepcopy(model)
    PlainAttention(twin).close()
    query = torch.randn(ROWS, 4, TOKENS, 6, dtype=torch.bfloat16)
    with mock.patch.object(attention, "attend", wraps=attend) as taken, torch.enable_grad():
        for module, calls in ((model[0], 1), (before[0], 1), (twin[0], 1)):
            ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, query, query, None)
            assert taken.call_count == calls
        first.close()
        with first.set_aside():
            pass
        ALL_ATTENTION_FUNCTIONS["sdpa"](model[0], query, query, query, None)
        assert taken.call_count == 1
        second = PlainAttention(model)
        first.close()
        ALL_ATTENTION_FUNCTIONS["sdpa"](model[0], query, query, query, None)
        assert taken.call_count == 2
        with second.set_aside():
            ALL_ATTENTION_FUNCTIONS["sdpa"](model[0], query, query, query, None)
        assert taken.call_count == 2


LEFT_PADDED = torch.ones(8, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
LEFT_PADDED[1, :, :, :2] = False


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "mask", "others", "plain"),
    [
        ((8, 4, TOKENS, 6), torch.bfloat16, None, {}, True),
        ((8, 4, TOKENS, 6), torch.bfloat16, torch.zeros(1, 1, TOKENS, TOKENS), {}, True),
        ((8, 4, TOKENS, 6), torch.bfloat16, LEFT_PADDED, {}, False),
        ((8, 4, TOKENS, 6), torch.bfloat16, torch.zeros(TOKENS, TOKENS), {}, False),
        ((8, 4, TOKENS, 6), torch.float32, None, {}, False),
        ((8, 4, 300, 6), torch.bfloat16, None, {}, False),
        ((8, 4, TOKENS, 6), torch.bfloat16, None, {"position_bias": torch.zeros(1, 4, TOKENS, TOKENS)}, False),
        ((8, 4, 1, 6), torch.bfloat16, torch.ones(1, 1, 1, 1, dtype=torch.bool), {}, True),
        ((2, 4, 1, 6), torch.bfloat16, None, {}, False),
        ((8, 4, 1, 80), torch.bfloat16, None, {}, False),
    ],
    ids=["ours", "added", "hides a row", "flat", "float32", "long", "biased", "decoding", "decoding few", "wide heads"],
)
def test_reading_takes_it_where_it_is_faster_and_right(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    mask: torch.Tensor | None,
    others: dict[str, torch.Tensor],
    plain: bool,
    slow: bool,
) -> None:
    model, query = torch.nn.Identity(), torch.randn(*shape).to(dtype)
    PlainAttention(model)
    given = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    extra = {name: value.to(dtype) for name, value in others.items()}
    patched = mock.patch.object(attention, "_slow_kernel", return_value=slow)
    with mock.patch.object(attention, "attend", wraps=attend) as taken, patched, torch.no_grad():
        found = ALL_ATTENTION_FUNCTIONS["sdpa"](model, query, query, query, given, **extra)[0]
    assert taken.called == (plain and slow)
    expected = sdpa_attention_forward(model, query, query, query, given, **extra)[0]
    assert torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_what_it_does_not_know_is_left_to_the_library_while_training_too() -> None:
    model, query = torch.nn.Identity(), torch.randn(8, 4, TOKENS, 6, dtype=torch.bfloat16, requires_grad=True)
    PlainAttention(model)
    run = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert run(model, query, query, query, LEFT_PADDED)[0].isfinite().all()
    assert run(model, query[:, :, :3], query, query, None)[0].shape == (8, 3, 4, 6)
    assert run(model, query[:1], query, query, None)[0].shape == (8, TOKENS, 4, 6)
    assert (run(model, query, query, query, None, dropout=1.0)[0] == 0).all()
    with pytest.raises(ValueError, match="softcap"):
        run(model, query, query, query, None, softcap=30.0)


def test_a_runner_leaves_the_library_its_attention_where_it_is_told_to(make_base: Callable[..., Any]) -> None:
    base = make_base("llama", torch.bfloat16)
    readings = [Reading((5, 6, 7), (2,), 0), Reading((5, 6, 8), (2,), 0)]
    patched = mock.patch.object(attention, "_slow_kernel", return_value=True)
    with mock.patch.object(attention, "attend", wraps=attend) as taken, patched, torch.no_grad():
        for library, calls in ((True, 0), (False, 2)):
            runner = Runner(base, library=library)
            runner.logits(readings)
            assert taken.call_count == calls
            runner.close()
        base.model(input_ids=torch.tensor([[5, 6, 7]]))
        assert taken.call_count == 2


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_training_short_bfloat16_sequences_takes_it(family: str, make_base: Callable[..., Any]) -> None:
    base = make_base(family, torch.bfloat16)
    bank, runner = SlotBank(find_targets(base.model, None), slots=1, rank=4, alpha=8.0, trainable=True), Runner(base)
    bank.fresh(1, seed=0)
    long, found = tuple(range(2, 202)), []
    fast_kernel = mock.patch.object(attention, "_slow_kernel", return_value=False)
    with mock.patch.object(attention, "attend", wraps=attend) as taken, bank.use([1]), fast_kernel:
        for length, grad, calls in ((20, True, 2), (20, False, 0), (200, True, 0)):
            taken.reset_mock()
            with torch.set_grad_enabled(grad):
                found.append(runner.logits([Reading(long[:length], (3, 19), 1)]))
            assert taken.call_count == calls
    assert (found[0] - found[1]).abs().max() <= 0.05 * found[1].abs().max()
