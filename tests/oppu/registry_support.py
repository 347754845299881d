"""What the registry's tests share: a version, its weights, and how to open, write and compare."""

from typing import Any

import numpy as np

from oppu.clock import ManualClock
from oppu.lm.port import AdapterRef, Tensors
from oppu.privacy import UserHash
from oppu.registry import AdapterRegistry, Written
from oppu.values import BaseId, UserId

BASE = BaseId("base-1")
USER = UserId("user\u00e9/../1")
REF = AdapterRef(USER, 1, 3)
HASH = UserHash("key")
SETUP: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}


def opened(
    url: str, *, base: BaseId = BASE, setup: dict[str, object] = SETUP, clock: ManualClock | None = None
) -> AdapterRegistry:
    """Open a registry for writing where nobody has an adapter yet."""
    registry = AdapterRegistry(url, base=base, user_hash=HASH, adapter_config=setup, clock=clock)
    registry.open(in_use=())
    return registry


def tensors(seed: int = 0) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    chance = np.random.default_rng(seed)
    prefix = "base_model.model.layer.q"
    return {
        f"{prefix}.lora_A.weight": chance.standard_normal((2, 5)).astype(np.float32),
        f"{prefix}.lora_B.weight": np.asfortranarray(chance.standard_normal((4, 2)).astype(np.float32)),
    }


def write(registry: AdapterRegistry, ref: AdapterRef = REF, weights: Tensors | None = None) -> Written:
    metrics = {"loss": 1 / 3, "steps": 4}
    return registry.write(ref, weights or tensors(), parent=2, trained_through=40, metrics=metrics, token=9)


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value)
