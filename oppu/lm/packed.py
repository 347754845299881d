"""A base's matrices in the layout that a CPU's kernels read.

In bfloat16 a linear layer otherwise lays its weight out anew at every call, which with the few rows of a decode step
costs about as much as the product itself: of MiniLM's layers 64 rows take .55 to 1 of the time, 2,048 rows .35 to .8;
the kernels are the same. In float32 torch asks another library, which on AMD's processors takes twice as long and more
(``python -m benchmarks.products``), on Intel's as long from a few dozen rows on. It costs a second copy of the
matrices, so large bases are left alone.

Where a layer's output goes through GELU and nothing else, as in BERT and its kin, that is done within the product,
before it is rounded and written.

Adapters are trained through the same products: a frozen layer has the gradient of its input only, one more product,
with the weight's transpose. In bfloat16 that is packed too, from the first training on: a third copy.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from oppu.lm.hardware import fast_bfloat16

_MOST_BYTES = 2 << 30
"""Of a model's matrices: a base of a billion parameters in bfloat16 still has its second copy, and training a third."""
_VECTORS = ("AVX2", "AVX512")
"""Instructions, by torch's names."""


class Packed:
    """A model's linear layers, each with its product replaced; layers that are not such are left alone.

    A weight that is changed through ``.data``, as PEFT's merge does, is not seen to be another: close this first.
    """

    def __init__(self, model: nn.Module) -> None:
        """Attach to a model; what is packed already stays so.

        Args:
            model: Any; of its layers those of float32 on a CPU are concerned, and of bfloat16 where it multiplies that,
                unless they hold over 2 GiB.
        """
        layers = [module for module in model.modules() if type(module) is nn.Linear and _suits(module.weight)]
        small = sum(layer.weight.nbytes for layer in layers) <= _MOST_BYTES
        suited = [layer for layer in layers if small and "forward" not in vars(layer)]
        activated = [module for module in model.modules() if _activates(module) and module.dense in suited]
        self._replaced = [*suited, *activated]
        for module in self._replaced:
            vars(module)["forward"] = _Product(module) if type(module) is nn.Linear else _Activated(module)

    def close(self) -> None:
        """Leave the layers as they were."""
        for module in self._replaced:
            vars(module).pop("forward", None)


class _Kept:
    """A matrix made of a layer's weight, made again whenever that is another."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._make = make
        self._made: torch.Tensor | None = None
        self._state: tuple[int, int] | None = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        state = _state(weight)
        if self._made is None or self._state != state:
            self._made, self._state = self._make(weight), state
        return self._made


def _state(weight: torch.Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version  # noqa: SLF001 - the only witness of a change in place


class _Product:
    """A layer's forward. It packs at the first call; a copy of the layer gets one of its own."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._packed, self._turned = _Kept(_laid_out), _Kept(_turned)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        if not self.fits(x):
            return functional.linear(x, layer.weight, layer.bias)
        if x.requires_grad and torch.is_grad_enabled():
            rows: torch.Tensor = _Learnt.apply(x.reshape(-1, x.shape[-1]), self)  # type: ignore[no-untyped-call]
            return rows.view(*x.shape[:-1], -1)  # outside: what is done in place to a view from inside has no gradient
        return self.of(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self._layer, memo))

    def fits(self, x: torch.Tensor) -> bool:
        """Say whether the product is one for a packed matrix."""
        layer = self._layer
        own = layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
        alike = x.dtype == layer.weight.dtype and x.numel() > 0 and _suits(layer.weight)
        return alike and not (own and torch.is_grad_enabled()) and not torch.is_autocast_enabled("cpu")

    @property
    def state(self) -> tuple[int, int]:
        """What changes with the layer's weight."""
        return _state(self._layer.weight)

    def of(self, x: torch.Tensor, then: str = "none") -> torch.Tensor:
        """Return the layer's output, after an activation by its name in oneDNN."""
        return _multiplied(x, self._packed.of(self._layer.weight.detach()), self._layer.bias, then)

    def back(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the layer's input from that of its output."""
        return _multiplied(grad, self._turned.of(self._layer.weight.detach()), None)


class _Activated:
    """The forward of a module that is a layer and GELU; one by one where a gradient is wanted or somebody listens."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        dense = self._module.dense
        product = vars(dense).get("forward")
        heard = dense._forward_hooks or dense._forward_pre_hooks  # noqa: SLF001 - where adapters are added
        learnt = x.requires_grad and torch.is_grad_enabled()
        if heard or learnt or not isinstance(product, _Product) or not product.fits(x):
            plain: torch.Tensor = self._module.intermediate_act_fn(dense(x))
            return plain
        return product.of(x, "gelu")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self._module, memo))


class _Learnt(torch.autograd.Function):
    """A product whose weight is not learnt, and its input is; of first derivatives only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: _Product) -> torch.Tensor:
        ctx.product, ctx.state = product, product.state
        return product.of(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.product.state != ctx.state:
            raise RuntimeError("a frozen weight was changed between a forward and its gradient")
        return ctx.product.back(grad), None


def _multiplied(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, then: str = "none") -> torch.Tensor:
    multiply = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - what torch compiles linear layers to
    product: torch.Tensor = multiply(x, weight, bias, then, [], "none")
    return product


def _laid_out(weight: torch.Tensor) -> torch.Tensor:
    laid_out: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # noqa: SLF001 - likewise
    return laid_out


def _turned(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight for products with its transpose; in float32 the kernels read it fast as it lies."""
    return weight.t() if weight.dtype == torch.float32 else _laid_out(weight.t())


def _activates(module: Any) -> bool:
    """Say whether a module is a layer, then GELU by the error function, and nothing else."""
    dense, act = getattr(module, "dense", None), getattr(module, "intermediate_act_fn", None)
    alone = type(module).__name__.endswith("Intermediate") and {*module.children()} <= {dense, act}
    return alone and type(dense) is nn.Linear and getattr(act, "act", act) is functional.gelu


def _suits(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dim() == 2 and _fast(weight.dtype)


@cache
def _fast(dtype: torch.dtype) -> bool:
    """Say whether the kernels for this type were measured on processors like this one."""
    if dtype == torch.bfloat16:
        return fast_bfloat16("cpu")
    vectors = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() in _VECTORS  # noqa: SLF001 - as above
    return dtype == torch.float32 and bool(vectors)
