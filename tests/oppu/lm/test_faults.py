"""Which errors a process cannot outlive."""

import pytest
import torch

from oppu.errors import FatalError
from oppu.lm.faults import device_fault, out_of_memory

ASSERTED = "CUDA error: device-side assert triggered\nSearch for `cudaErrorAssert' for more information."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(ASSERTED), "the device is lost: CUDA error: device-side assert triggered"),
        (type("AcceleratorError", (RuntimeError,), {})("HIP error"), "the device is lost: HIP error"),
        (type("AcceleratorError", (RuntimeError,), {})(), "the device is lost: AcceleratorError"),
    ],
)
def test_a_lost_device_is_fatal(error: Exception, said: str) -> None:
    lost = device_fault(error)
    assert isinstance(lost, FatalError) and str(lost) == said
    assert not out_of_memory(error)


def test_torchs_own_errors_are_told_apart_by_their_names() -> None:
    assert torch.AcceleratorError.__name__ == "AcceleratorError"
    exhausted = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    assert out_of_memory(exhausted) and device_fault(exhausted) is None


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`", False),
    ],
)
def test_a_device_that_lacks_memory_or_refuses_a_product_goes_on(text: str, memory: bool) -> None:
    for error in (RuntimeError(text), type("AcceleratorError", (RuntimeError,), {})(text)):
        assert device_fault(error) is None and out_of_memory(error) is memory


@pytest.mark.parametrize("error", [ValueError("CUDA error"), RuntimeError("no CUDA error"), KeyError("x")])
def test_any_other_error_is_not(error: Exception) -> None:
    assert device_fault(error) is None and not out_of_memory(error)
