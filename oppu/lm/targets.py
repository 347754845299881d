"""Which layers adapters attach to, and how PEFT is told so."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from oppu.errors import ConfigError
from oppu.lm.trunk import block_of

_AUTOMATIC = (("q_proj", "v_proj"), ("query", "value"), ("c_attn",), ("query_key_value",), ("qkv_proj",))
"""Query and value, by the names that model families give them; the first that is found is taken."""


def find_targets(model: nn.Module, endings: Sequence[str] | None, upper: float = 1.0) -> dict[str, nn.Module]:
    """Return the layers that adapters attach to, by module name, in the model's order.

    Args:
        model: The base.
        endings: Module name endings as in PEFT's ``target_modules``; ``None`` = query and value.
        upper: The share of the blocks that have such layers, from the last one down, rounded up to whole blocks.

    Returns:
        At least one linear layer.

    Raises:
        ConfigError: Naming ``model.lora_targets`` where nothing matches or a match is not linear.
    """
    read = _that_read_text(model)
    for group in [tuple(endings)] if endings else _AUTOMATIC:
        every = {name: module for name, module in model.named_modules() if _ends(name, group)}
        if endings:  # what is named outright may lie beside it, as the head does
            beside = [ending for ending in group if not any(_ends(name, [ending]) for name in read & every.keys())]
            found = {name: m for name, m in every.items() if name in read or _ends(name, beside)}
        else:
            found = {name: module for name, module in every.items() if name in read}
        wrong = [name for name, module in found.items() if not isinstance(module, (nn.Linear, Conv1D))]
        if wrong:
            raise ConfigError(f"model.lora_targets: not linear layers: {', '.join(wrong[:3])}")
        if found:
            return _uppermost(found, upper)
    raise ConfigError(f"model.lora_targets: no layer of this base ends in {endings or 'query and value names'}")


def adapter_config(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    endings: Sequence[str] | None,
    *,
    base: str,
    rank: int,
    alpha: float,
) -> dict[str, object]:
    """Return the content of PEFT's ``adapter_config.json`` for adapters on some target layers of a model."""
    from peft import LoraConfig

    places = {place[1] for name in targets if (place := block_of(name)) is not None}
    blocks = sorted(places) if places and min(places) > 0 else None  # else in all of them
    names, read = sorted(endings or {name.rpartition(".")[2] for name in targets}), _that_read_text(model)
    if any(name not in read and _ends(name, names) for name, _ in model.named_modules()):
        names, blocks = sorted(targets), None  # endings would find layers that read no text

    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=0.0,
        target_modules=names,
        layers_to_transform=blocks,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in targets.values()),
    )
    return {name: _plain(value) for name, value in sorted(config.to_dict().items())}


def _that_read_text(model: nn.Module) -> set[str]:
    """Return the names of the modules that read text: all but the head, and what a model sees or hears with."""
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else model
    own = {id(module) for module in decoder.modules()}
    return {name for name, module in model.named_modules() if id(module) in own}


def _uppermost(found: dict[str, nn.Module], upper: float) -> dict[str, nn.Module]:
    """Leave out the layers of lower blocks; those that lie in no block stay."""
    places = {name: block_of(name) for name in found}
    blocks = sorted({place[1] for place in places.values() if place is not None})
    kept = set(blocks[len(blocks) - max(1, math.ceil(upper * len(blocks))) :])
    return {name: found[name] for name, place in places.items() if place is None or place[1] in kept}


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(name == ending or name.endswith("." + ending) for ending in endings)


def _plain(value: Any) -> object:
    """Turn what ``LoraConfig.to_dict`` holds into JSON values."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)
