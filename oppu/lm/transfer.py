"""Bring small numbers to the base's device without waiting for it."""

from collections.abc import Sequence
from typing import Any

import torch


def sent(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return numbers as a tensor on a device.

    ``torch.tensor(numbers, device=...)`` waits until a GPU has done all that was asked of it before; from ordinary
    memory, a copy that need not be waited for is staged at once and only queued.

    Args:
        numbers: Nested as the tensor is to be.
        device: Where.
        dtype: Of the tensor; ``None``: as ``torch.tensor`` has it.

    Returns:
        The tensor.
    """
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
