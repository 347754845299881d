"""The cache with room: what the library's own gives, without copying what is there already."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from oppu.lm.kv_cache import RoomyLayer, roomy_cache

Make = Callable[..., Any]


@pytest.mark.parametrize("room", [0, 2, 50])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3", "gpt2", "bert", "opt"])
def test_steps_give_the_logits_of_the_librarys_own_cache(family: str, room: int, make_base: Make) -> None:
    model = make_base(family, torch.float64).model
    ids = torch.arange(12).view(2, 6) + 5
    found = []
    with torch.no_grad():
        for cache in (DynamicCache(config=model.config), roomy_cache(model.config, room)):
            steps = [model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]]
            for token in range(60):  # past a sliding window of 40
                new = torch.full((2, 1), 20 + token)
                steps.append(model(input_ids=new, past_key_values=cache, use_cache=True).logits[:, -1])
            found.append(torch.stack(steps))
    assert torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_a_step_moves_nothing_while_there_is_room() -> None:
    layer, chance = RoomyLayer(3), torch.Generator().manual_seed(0)
    parts = [torch.randn(2, 4, tokens, 8, generator=chance) for tokens in (5, 1, 1, 1, 1)]
    places = []
    for part in parts:
        keys, values = layer.update(part, -part)
        places.append(keys.data_ptr())
    assert len(set(places[:4])) == 1 != len(set(places))
    assert torch.equal(keys, torch.cat(parts, dim=2)) and torch.equal(values, -keys)
    layer.batch_select_indices(torch.tensor([1, 0]))  # the library's own: what is kept lies elsewhere now
    keys, _ = layer.update(parts[1], parts[1])
    assert torch.equal(keys, torch.cat([torch.cat(parts, dim=2).flip(0), parts[1]], dim=2))
    layer.batch_select_indices(torch.tensor([1, 0]))
    layer.crop(-3)
    keys, _ = layer.update(parts[0][:, :, :1], parts[0][:, :, :1])
    assert torch.equal(keys, torch.cat([*parts[:3], parts[0][:, :, :1]], dim=2))
