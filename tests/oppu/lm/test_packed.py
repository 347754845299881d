"""Packed matrices: the same products, of the weights as they are now, and nothing left behind."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from oppu.lm import packed
from oppu.lm.encoding import Reading
from oppu.lm.forward import Runner
from oppu.lm.hardware import fast_bfloat16
from oppu.lm.packed import Packed

Make = Callable[..., Any]
ROUNDING = {torch.bfloat16: (2**-7, 1e-3), torch.float32: (1e-5, 1e-6)}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    if found == torch.bfloat16 and not fast_bfloat16("cpu"):
        pytest.skip("this CPU does not multiply bfloat16 itself")
    if found == torch.float32 and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("float32 is not packed on this CPU")
    return found


def layer_of(dtype: torch.dtype, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 40, bias=bias).to(dtype).requires_grad_(False)


def inputs(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def near(found: torch.Tensor, layer: nn.Linear, x: torch.Tensor) -> bool:
    """Say whether it is the layer's product, computed in float64, but for the result's rounding."""
    bias = None if layer.bias is None else layer.bias.double()
    exact = functional.linear(x.double(), layer.weight.double(), bias)
    relative, absolute = ROUNDING[x.dtype]
    return found.dtype == x.dtype and torch.allclose(found.double(), exact, rtol=relative, atol=absolute)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (64, 48), (3, 5, 48), (2, 3, 5, 48), (0, 48)])
def test_products_are_the_layers(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype, bias=bias), inputs(dtype, *shape)
    Packed(layer)
    with torch.no_grad():
        assert near(layer(x), layer, x)
        strided = inputs(dtype, 96, 7).t()[:, ::2] if len(shape) == 2 else x
        assert near(layer(strided), layer, strided)


def test_weights_that_change_are_packed_again(dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype), inputs(dtype, 4, 48)
    Packed(layer)
    with torch.no_grad():
        first = layer(x)
        layer.weight.mul_(2)
        assert near(layer(x), layer, x)
        assert not torch.allclose(layer(x), first)
        layer.weight.data = layer.weight.data.clone().neg_()
        assert near(layer(x), layer, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (64, 48), (3, 5, 48)])
def test_gradients_of_inputs_are_the_layers(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype, bias=bias), inputs(dtype, *shape).requires_grad_()
    Packed(layer)
    found = layer(x)
    assert near(found.detach(), layer, x.detach())
    for grad in (inputs(dtype, *shape[:-1], 40), inputs(dtype, *shape[:-1], 1).expand(*shape[:-1], 40)):
        [mine] = torch.autograd.grad(found, x, grad, retain_graph=True)
        exact = grad.double() @ layer.weight.double()
        assert mine.dtype == dtype and torch.allclose(mine.double(), exact, rtol=2**-7, atol=1e-3)


def test_what_a_layer_gives_may_be_changed_in_place(dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype), inputs(dtype, 3, 5, 48).requires_grad_()
    Packed(layer)
    found = layer(x)
    found.view(-1, 40).mul_(2)
    [mine] = torch.autograd.grad(found.sum(), x)
    assert torch.allclose(mine, 2 * layer.weight.sum(0).expand(3, 5, 48), rtol=2**-6, atol=2e-2)


def test_gradients_are_of_the_weight_as_it_is_now(dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype), inputs(dtype, 4, 48).requires_grad_()
    Packed(layer)
    [first] = torch.autograd.grad(layer(x).sum(), x)
    with torch.no_grad():
        layer.weight.mul_(2)
    [second] = torch.autograd.grad(layer(x).sum(), x)
    assert torch.allclose(second, 2 * first, rtol=2**-6)


def test_a_weight_that_changes_before_the_gradient_is_an_error(dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype), inputs(dtype, 4, 48).requires_grad_()
    Packed(layer)
    found = layer(x).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed between"):
        torch.autograd.backward(found)


@pytest.mark.parametrize("learnt", ["weight", "bias"])
def test_layers_that_learn_are_left_to_torch(learnt: str, dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype), inputs(dtype, 4, 48)
    Packed(layer)
    parameter = getattr(layer, learnt).requires_grad_()
    for given in (x, x.clone().requires_grad_()):
        torch.autograd.backward(layer(given).sum())
        assert parameter.grad is not None and bool((parameter.grad != 0).any())
        parameter.grad = None
    with torch.no_grad():
        assert near(layer(x), layer, x)


def test_gradients_flow_and_other_types_are_left_to_torch(dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype), inputs(dtype, 4, 48).requires_grad_()
    Packed(layer)
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(4, 48), rtol=2**-6, atol=1e-2)
    layer.weight.requires_grad_()
    layer(x.detach()).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        layer(x.detach().double())
    layer.double()
    with torch.no_grad():
        assert torch.equal(layer(x.double()), functional.linear(x.double(), layer.weight, layer.bias))


def test_a_layer_that_changes_its_type_is_packed_in_the_new_one(dtype: torch.dtype) -> None:
    layer = layer_of(torch.float32)
    Packed(layer)
    with torch.no_grad():
        layer(inputs(torch.float32, 4, 48))
        layer.to(dtype)
        x = inputs(dtype, 4, 48)
        assert near(layer(x), layer, x)


def test_a_copy_has_its_own_product(dtype: torch.dtype) -> None:
    layer, x = layer_of(dtype), inputs(dtype, 4, 48)
    Packed(layer)
    with torch.no_grad():
        layer(x)
        twin = copy.deepcopy(layer)
        twin.weight.zero_()
        assert torch.equal(twin(x), layer.bias.expand(4, -1))
        assert near(layer(x), layer, x)


class HalfIntermediate(nn.Module):
    """A layer and an activation, as BERT and its kin have them."""

    def __init__(self, dtype: torch.dtype, activation: str = "gelu") -> None:
        super().__init__()
        self.dense = layer_of(dtype)
        self.intermediate_act_fn = ACT2FN[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``[…, 40]`` of ``[…, 48]``."""
        found: torch.Tensor = self.intermediate_act_fn(self.dense(x))
        return found


@pytest.mark.parametrize("shape", [(48,), (3, 5, 48), (0, 48)])
def test_gelu_is_done_within_the_product(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, x = HalfIntermediate(dtype), inputs(dtype, *shape)
    kept = Packed(half)
    twin = copy.deepcopy(half)
    exact = functional.gelu(functional.linear(x.double(), half.dense.weight.double(), half.dense.bias.double()))
    monkeypatch.setattr(half, "intermediate_act_fn", None if x.numel() else half.intermediate_act_fn)
    with torch.no_grad():
        for module in (half, twin):
            found = module(x)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), exact, rtol=ROUNDING[dtype][0], atol=2e-3)
    monkeypatch.undo()
    kept.close()
    assert "forward" not in vars(half) and "forward" not in vars(half.dense)


def test_gelu_waits_for_who_listens_and_for_gradients(dtype: torch.dtype) -> None:
    half, x = HalfIntermediate(dtype), inputs(dtype, 4, 48)
    Packed(half)
    with torch.no_grad():
        plain = half(x)
        hook = half.dense.register_forward_hook(lambda _module, _args, output: output * 2)  # an adapter, say
        doubled = half(x)
        hook.remove()
        assert torch.equal(half(x), plain) and not torch.allclose(doubled, plain)
        torch.testing.assert_close(doubled, functional.gelu(2 * half.dense(x)))
    learnt = x.clone().requires_grad_()
    [mine] = torch.autograd.grad(half(learnt).sum(), learnt)
    [theirs] = torch.autograd.grad(
        functional.gelu(functional.linear(learnt, half.dense.weight, half.dense.bias)).sum(), learnt
    )
    torch.testing.assert_close(mine, theirs, rtol=2**-6, atol=2e-2)


def test_other_activations_are_left_as_they_are(dtype: torch.dtype) -> None:
    for name in ("gelu_new", "relu", "silu"):
        half, x = HalfIntermediate(dtype, name), inputs(dtype, 4, 48)
        Packed(half)
        assert "forward" in vars(half.dense) and "forward" not in vars(half)
        with torch.no_grad():
            torch.testing.assert_close(half(x), ACT2FN[name](half.dense(x)))
    more = HalfIntermediate(dtype)
    more.norm = nn.LayerNorm(40)
    Packed(more)
    assert "forward" not in vars(more)


def test_what_is_packed_already_is_left_to_who_packed_it(dtype: torch.dtype) -> None:
    layer = layer_of(dtype)
    first = Packed(layer)
    Packed(layer).close()
    assert "forward" in vars(layer)
    first.close()
    assert "forward" not in vars(layer)


def test_large_models_and_other_layers_are_left_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = layer_of(torch.float64)
    Packed(wide)
    assert "forward" not in vars(wide)
    layer = layer_of(dtype)
    monkeypatch.setattr(packed, "_MOST_BYTES", layer.weight.nbytes - 1)
    Packed(layer)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("library", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "opt"])
def test_a_runner_packs_what_it_serves_and_unpacks_it(
    family: str, library: bool, dtype: torch.dtype, make_base: Make
) -> None:
    base = make_base(family, dtype)
    readings = [Reading((5, 6, 7), (1, 2), 0), Reading((8, 9, 10, 11), (3,), 0)]
    linear = [module for module in base.model.modules() if type(module) is nn.Linear]
    runner = Runner(base, library=library)
    assert all(("forward" in vars(module)) != library for module in linear)
    with torch.no_grad():
        found = runner.logits(readings)
    runner.close()
    assert not any("forward" in vars(module) for module in linear)
    plain = Runner(base, library=True)
    with torch.no_grad():
        expected = plain.logits(readings)
    plain.close()
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()
