"""Feed-forward layers of fewer neurons: what stays computes what it did."""

from typing import Any

import pytest
import torch
import transformers
from torch.nn import Linear, Module, ModuleList

from oppu.lm.pruning import narrow

WIDTH, NEURONS = 8, 20


class Gated(Module):
    """A feed-forward layer with a gate, beside an attention's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = Linear(WIDTH, WIDTH)
        self.gate, self.up = Linear(WIDTH, NEURONS, bias=False), Linear(WIDTH, NEURONS)
        self.down = Linear(NEURONS, WIDTH)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(torch.nn.functional.silu(self.gate(states)) * self.up(states))
        return found


def config(**more: Any) -> Any:
    return transformers.PretrainedConfig(hidden_size=WIDTH, intermediate_size=NEURONS, **more)


def silenced(block: Gated, neurons: list[int], part: str) -> Gated:
    """Give neurons next to no weight, in what leads to them or from them."""
    with torch.no_grad():
        weight = getattr(block, part).weight
        (weight.T if part == "down" else weight)[neurons] *= 1e-9
    return block


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_neurons_that_say_nothing_go(part: str) -> None:
    torch.manual_seed(0)
    blocks = ModuleList([silenced(Gated(), [1, 5, 6, 11, 19], part), silenced(Gated(), [0, 2, 3, 4, 18], part)])
    with torch.no_grad():
        for block in blocks:
            block.up.bias.zero_()  # type: ignore[union-attr, operator]
    states, own = torch.randn(5, WIDTH), config()
    before = [block(states) for block in blocks]
    assert narrow(blocks, own, 0.75) == own.intermediate_size == 15
    for block, expected in zip(blocks, before, strict=True):
        torch.testing.assert_close(block(states), expected)
        assert block.down.weight.shape == (WIDTH, 15)  # type: ignore[union-attr]
        assert block.up.weight.shape == block.gate.weight.shape == (15, WIDTH)  # type: ignore[union-attr]


def test_one_neuron_stays_at_least_and_all_of_them_change_nothing() -> None:
    torch.manual_seed(0)
    block, own, states = Gated(), config(), torch.randn(5, WIDTH)
    before = block(states)
    assert narrow([block], own, 1.0) == NEURONS
    torch.testing.assert_close(block(states), before)
    assert narrow([block], own, 1e-9) == own.intermediate_size == 1


@pytest.mark.parametrize("broken", ["config", "width", "widths", "two", "none", "fused", "norm", "experts"])
def test_layers_that_cannot_be_told_stay_whole(broken: str) -> None:
    block, own = Gated(), config()
    if broken == "config":
        own = transformers.PretrainedConfig(hidden_size=WIDTH)
    elif broken == "width":
        own.intermediate_size = WIDTH
    elif broken == "widths":
        own = transformers.PretrainedConfig(intermediate_size=[NEURONS, NEURONS])
    elif broken == "fused":  # an attention's matrix has as many rows as there are neurons, whose own are two in one
        block.up, block.gate = Linear(WIDTH, NEURONS), Linear(WIDTH, 2 * NEURONS)
    elif broken == "norm":
        block.between = torch.nn.LayerNorm(NEURONS)
    elif broken == "experts":
        block.others = torch.nn.Parameter(torch.randn(3, NEURONS, WIDTH))
    elif broken == "two":
        block.mixed = Linear(NEURONS, WIDTH)
    else:
        block.gate, block.up = (Linear(WIDTH, 2 * NEURONS) for _ in range(2))
    before = {name: weight.clone() for name, weight in block.state_dict().items()}
    said = own.to_dict()
    assert narrow([Gated(), block], own, 0.5) is None
    assert own.to_dict() == said
    for name, weight in block.state_dict().items():
        assert torch.equal(weight, before[name])
