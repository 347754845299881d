"""What a version's ``adapter_config.json`` says about its weights, and the same weights for the served base's alpha.

The bank scales every delta by the base's alpha over the adapter's rank; PEFT by the alpha and the rank in the file.
Pure: bytes and arrays in, arrays out. Invariant: what is returned means in the bank what the file means in PEFT.
"""

import json
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from oppu.errors import ConfigError
from oppu.lm.port import Tensors

_PLAIN = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""Fields that give the weights another meaning than alpha / r for all layers alike; absent or empty in ours."""


def fitted(content: bytes, tensors: Tensors, alpha: float | None) -> Tensors:
    """Return weights whose deltas, scaled by the base's alpha, are those of their own file.

    Args:
        content: The version's ``adapter_config.json``.
        tensors: Its weights, in PEFT's naming.
        alpha: The base's; ``None`` = whatever the file says.

    Returns:
        The weights, float32; with another alpha in the file, the B factors times file's alpha / base's alpha.

    Raises:
        ConfigError: A field is missing, unusable, or says otherwise than the weights; names it.
    """
    config = _parsed(content)
    own = _alpha(config)
    _check_rank(config, tensors)
    for name in _PLAIN:
        if config.get(name):
            raise ConfigError(f"{name}: expected none")
    if alpha is None or own == alpha:
        return tensors
    return {name: _times(value, own / alpha) if _is(name, "B") else value for name, value in tensors.items()}


def alpha_of(config: Mapping[str, object] | None) -> float | None:
    """Return the alpha of a base's adapter configuration; ``None`` where there is none."""
    return None if config is None or "lora_alpha" not in config else _alpha(config)


def _parsed(content: bytes) -> Mapping[str, object]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError("the adapter configuration is not JSON") from error
    if not isinstance(config, dict):
        raise ConfigError("the adapter configuration is no JSON object")
    return config


def _alpha(config: Mapping[str, object]) -> float:
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ConfigError("lora_alpha: expected a number above 0")
    return float(alpha)


def _check_rank(config: Mapping[str, object], tensors: Tensors) -> None:
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError("r: expected an integer from 1")
    for name, value in tensors.items():
        for kind, axis in (("A", 0), ("B", -1)):
            if _is(name, kind) and (value.ndim != 2 or value.shape[axis] != rank):
                raise ConfigError(f"r: {rank} in the configuration, but {name} has shape {value.shape}")


def _is(name: str, kind: str) -> bool:
    return name.endswith(f".lora_{kind}.weight")


def _times(value: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = np.multiply(value, factor, dtype=np.float32)
    return scaled
