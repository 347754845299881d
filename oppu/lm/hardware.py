"""What the machine multiplies fast, and how its memory is kept. Torch is imported when it is asked."""

import ctypes
import os
from typing import Any

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
"""Parameters of glibc's ``mallopt``."""
_LARGEST_KEPT = 32 << 20
"""Bytes; glibc takes no higher threshold."""
_MOST_KEPT, _STEP = 1 << 30, 64 << 20


def fast_bfloat16(device: Any) -> bool:
    """Say whether the hardware multiplies bfloat16 itself.

    Args:
        device: A torch device, or its name.

    Returns:
        Whether bfloat16 is worth computing in.
    """
    import torch

    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not torch._C._has_mkldnn:  # noqa: SLF001 - the next question is not there without it
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - torch has no public question for it


def vector_bfloat16() -> bool:
    """Say whether the processor has instructions for vectors of bfloat16 (AVX512_BF16).

    Returns:
        Whether torch finds them.
    """
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001 - likewise


def matrix_units() -> bool:
    """Say whether the processor has units that multiply small matrices of bfloat16 (AMX).

    Returns:
        Whether torch's kernels find them.
    """
    import torch

    return bool(torch.cpu._is_amx_tile_supported())  # noqa: SLF001 - likewise


def keep_freed_memory() -> bool:
    """Let the C library keep what a forward frees for the next one, process-wide.

    glibc soon gives large blocks back to the kernel, and the next forward's pages are cleared anew: 50,000 of them in a
    batch of 64 rows of 96 tokens in bfloat16, 120,000 in float32. Up to 1 GiB of free memory stays with the process;
    blocks above 32 MiB still go. Where ``MALLOC_`` variables are set they have it, and other C
    libraries have no such setting.

    Returns:
        Whether it was set.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    wanted = (_MMAP_THRESHOLD, _LARGEST_KEPT), (_TRIM_THRESHOLD, _MOST_KEPT), (_TOP_PAD, _STEP)
    return set_option is not None and all([set_option(option, size) for option, size in wanted])
