"""A base's matrices in the layout that a CPU's kernels read.

In bfloat16 a linear layer otherwise lays its weight out anew at every call, which with the few rows of a decode step
costs about as much as the product itself: of MiniLM's layers 64 rows take .55 to 1 of the time, 2,048 rows .35 to .8;
the kernels are the same. In float32 torch asks another library, which on AMD's processors takes twice as long and more
(``python -m benchmarks.products``), on Intel's as long from a few dozen rows on. It costs a second copy of the
matrices, so large bases are left alone. Where gradients flow nothing is packed: training sixteen short rows a step
became no faster.
"""

import copy
from functools import cache
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from oppu.lm.hardware import fast_bfloat16

_MOST_BYTES = 2 << 30
"""Of a model's matrices: a base of a billion parameters in bfloat16 still has its second copy."""
_VECTORS = ("AVX2", "AVX512")
"""Instructions, by torch's names."""


class Packed:
    """A model's linear layers, each with its product replaced; layers that are not such are left alone."""

    def __init__(self, model: nn.Module) -> None:
        """Attach to a model; what is packed already stays so.

        Args:
            model: Any; of its layers those of float32 on a CPU are concerned, and of bfloat16 where it multiplies that,
                unless they hold over 2 GiB.
        """
        layers = [module for module in model.modules() if type(module) is nn.Linear and _suits(module.weight)]
        small = sum(layer.weight.nbytes for layer in layers) <= _MOST_BYTES
        self._layers = [layer for layer in layers if small and "forward" not in vars(layer)]
        for layer in self._layers:
            vars(layer)["forward"] = _Product(layer)

    def close(self) -> None:
        """Leave the layers as they were."""
        for layer in self._layers:
            vars(layer).pop("forward", None)


class _Product:
    """A layer's forward. It packs at the first call and again whenever the weight is another; a copy of the layer gets
    one of its own."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._packed: torch.Tensor | None = None
        self._state: tuple[int, int] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        learning = torch.is_grad_enabled() and (x.requires_grad or layer.weight.requires_grad)
        fits = x.dtype == layer.weight.dtype and x.numel() > 0 and _suits(layer.weight)
        if learning or not fits or torch.is_autocast_enabled("cpu"):
            return functional.linear(x, layer.weight, layer.bias)
        multiply = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - what torch compiles linear layers to
        product: torch.Tensor = multiply(x, self._current(), layer.bias, "none", [], "")
        return product

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self._layer, memo))

    def _current(self) -> torch.Tensor:
        weight = self._layer.weight.detach()
        state = weight.data_ptr(), weight._version  # noqa: SLF001 - the only witness of a change in place
        if self._packed is None or self._state != state:
            self._state = state
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # noqa: SLF001
        return self._packed


def _suits(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dim() == 2 and _fast(weight.dtype)


@cache
def _fast(dtype: torch.dtype) -> bool:
    """Say whether the kernels for this type were measured on processors like this one."""
    if dtype == torch.bfloat16:
        return fast_bfloat16("cpu")
    vectors = torch._C._has_mkldnn and torch.backends.cpu.get_cpu_capability() in _VECTORS  # noqa: SLF001 - as above
    return dtype == torch.float32 and bool(vectors)
