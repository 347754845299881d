"""Attention as plain products against transformers' own call of torch's."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oppu.lm import attention
from oppu.lm.attention import attend, plain_attention
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


def test_it_is_in_place_only_within_the_block() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(RuntimeError, match="stop"), plain_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
        raise RuntimeError("stop")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_training_short_bfloat16_sequences_takes_it(family: str, make_base: Callable[..., Any]) -> None:
    base = make_base(family, torch.bfloat16)
    bank, runner = SlotBank(find_targets(base.model, None), slots=1, rank=4, alpha=8.0, trainable=True), Runner(base)
    bank.fresh(1, seed=0)
    long, found = tuple(range(2, 202)), []
    with mock.patch.object(attention, "attend", wraps=attend) as taken, bank.use([1]):
        for length, grad, calls in ((20, True, 2), (20, False, 0), (200, True, 0)):
            taken.reset_mock()
            with torch.set_grad_enabled(grad):
                found.append(runner.logits([Reading(long[:length], (3, 19), 1)]))
            assert taken.call_count == calls
    assert (found[0] - found[1]).abs().max() <= 0.05 * found[1].abs().max()
