"""What the machine multiplies fast. Torch is imported when it is asked."""

from typing import Any


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
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - torch has no public question for it
