"""Short sequences share rows, whoever's they are, and each has the logits that it has alone."""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oppu.errors import ConfigError
from oppu.lm import mix
from oppu.lm.bank import SlotBank
from oppu.lm.base import LoadedBase
from oppu.lm.encoding import Reading
from oppu.lm.forward import Runner
from oppu.lm.model import TorchModel
from oppu.lm.reading import read
from oppu.lm.sequence_packing import Layout
from oppu.lm.targets import find_targets
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from tests.oppu.lm.conftest import random_base

Make = Callable[..., Any]
FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gpt2", "bert", "opt")


class Seen:
    """The bank's base and the layouts that it is run with."""

    def __init__(self, base: LoadedBase, targets: Sequence[str] | None = None, *, slots: int = 3) -> None:
        self.base = base
        self.bank = SlotBank(find_targets(base.model, targets), slots=slots, rank=4, alpha=8.0)
        chance = np.random.default_rng(0)
        for slot in range(1, slots + 1):
            shapes = {name: x.shape for name, x in self.bank.read(0).items()}
            self.bank.load(slot, {n: chance.normal(0, 0.3, shape).astype(np.float32) for n, shape in shapes.items()})
        self.runner = Runner(base, find_targets(base.model, targets))
        self.layouts: list[Layout | None] = []

    def read(self, readings: Sequence[Reading]) -> list[torch.Tensor]:
        """Each reading's logits, as they are computed together."""
        run, found = self.runner.logits, dict[int, torch.Tensor]()

        def seen(own: Any, memory: Any = None, layouts: Sequence[Layout] = ()) -> torch.Tensor:
            self.layouts.append(layouts[0] if layouts else None)
            return run(own, memory, layouts)

        with torch.no_grad(), mock.patch.object(self.runner, "logits", seen):
            for members, logits in read(self.runner, self.bank, readings):
                parts = torch.split(logits, [len(readings[member].positions) for member in members])
                assert not found.keys() & set(members)
                found |= zip(members, parts, strict=True)
        return [found[number] for number in range(len(readings))]

    def alone(self, reading: Reading) -> torch.Tensor:
        """A reading's logits by the whole model on it alone."""
        with torch.no_grad(), self.bank.use([reading.slot]):
            logits: torch.Tensor = self.base.model(input_ids=torch.tensor([reading.ids]), use_cache=False).logits[0]
        return logits[list(reading.positions)]

    def close(self) -> None:
        """Take all off the base."""
        self.runner.close()
        self.bank.close()


def some(seed: int, lengths: Sequence[int], slots: Sequence[int], *, reads: int = 3) -> list[Reading]:
    """Random readings."""
    chance = np.random.default_rng(seed)
    found = []
    for length, slot in zip(lengths, slots, strict=True):
        at = chance.choice(length, size=min(length, int(chance.integers(1, reads + 1))), replace=False)
        ids = tuple(int(token) for token in chance.integers(2, 258, size=length))
        found.append(Reading(ids, tuple(sorted(map(int, at))), slot))
    return found


@pytest.mark.parametrize("targets", [None, "behind"], ids=["attention", "behind it"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_that_share_rows_have_their_own_logits(family: str, targets: str | None, make_base: Make) -> None:
    behind = {"gpt2": ("c_attn", "c_proj"), "bert": ("query", "dense"), "opt": ("q_proj", "fc1", "fc2")}
    named = behind.get(family, ("q_proj", "o_proj", "down_proj")) if targets else None
    base = make_base(family, torch.float64)
    base.model.config.sliding_window = None  # a tiny Mistral's is short
    seen = Seen(base, named)
    lengths, slots = [3, 40, 7, 1, 25, 11, 60, 5, 33, 21, 9, 50], [1, 0, 2, 1, 3, 0, 2, 2, 0, 1, 3, 2]
    readings = some(1, lengths, slots)
    found = seen.read(readings)
    assert [layout is not None and layout.rows for layout in seen.layouts] == [5]
    for reading, logits in zip(readings, found, strict=True):
        assert torch.allclose(logits, seen.alone(reading), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=40),
    kinds=st.integers(0, 3),
    seed=st.integers(0, 99),
    tokens=st.sampled_from([300, 4096]),
)
def test_any_mix_of_lengths_and_slots(lengths: list[int], kinds: int, seed: int, tokens: int, make_base: Make) -> None:
    seen = Seen(make_base("llama", torch.float64))
    seen.runner.tokens = tokens
    slots = [int(slot) for slot in np.random.default_rng(seed).integers(0, kinds + 1, size=len(lengths))]
    readings = some(seed, lengths, slots)
    for reading, logits in zip(readings, seen.read(readings), strict=True):
        assert torch.allclose(logits, seen.alone(reading), rtol=1e-9, atol=1e-9)
    seen.close()


def test_many_sequences_of_few_users_take_a_product_a_user(make_base: Make) -> None:
    seen = Seen(make_base("llama", torch.float64))
    slots = [1] * 14 + [2] * 9 + [0] * 3
    readings = some(2, [9 + (at * 7) % 31 for at in range(26)], slots)
    with mock.patch("oppu.lm.mix._joined", wraps=mix._joined) as joined:
        found = seen.read(readings)
    assert seen.layouts[0] is not None and joined.call_count == 2  # of whole rows, and of what is read
    for reading, logits in zip(readings, found, strict=True):
        assert torch.allclose(logits, seen.alone(reading), rtol=1e-9, atol=1e-9)


def test_one_long_sequence_makes_no_others_long(make_base: Make) -> None:
    seen = Seen(make_base("llama", torch.float64), slots=40)
    readings = some(3, [120, *[8] * 200], [1 + at % 40 for at in range(201)])
    with mock.patch("oppu.lm.mix._in_pieces", wraps=mix._in_pieces) as cut:
        found = seen.read(readings)
    [whole, *_] = seen.layouts
    assert whole is not None
    assert mix._in_pieces(whole, *cut.call_args_list[0].args[1:]).taken.shape == (215, 8)
    for reading, logits in zip(readings, found, strict=True):
        assert torch.allclose(logits, seen.alone(reading), rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 256), min_size=1, max_size=60))
def test_pieces_cost_no_more_than_other_sizes(lengths: list[int]) -> None:
    def of(size: int) -> int:
        return sum(-(-length // size) for length in lengths) * (size + mix._PIECE_TOKENS)

    assert of(mix._piece(np.array(lengths))) <= min(of(size) for size in (1, 8, 16, 64, max(lengths)))


def test_one_users_sequences_are_as_rows_of_one_adapter(make_base: Make) -> None:
    seen = Seen(make_base("bert", torch.float64))
    readings = some(3, [5, 9, 30, 31, 8, 2], [2] * 6)
    with mock.patch.object(torch.Tensor, "index_add_", side_effect=AssertionError):
        found = seen.read(readings)
    assert seen.layouts[0] is not None
    for reading, logits in zip(readings, found, strict=True):
        assert torch.allclose(logits, seen.alone(reading), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_an_adapter_that_overflows_spoils_nobody_elses_answer(family: str, value: float, make_base: Make) -> None:
    seen = Seen(make_base(family, torch.float32))
    with torch.no_grad():
        for weights in seen.bank.weights:
            weights[2] = value
    readings = some(4, [12, 20, 9, 31, 17, 26, 8], [1, 2, 0, 3, 1, 2, 0])
    found = seen.read(readings)
    assert seen.layouts[0] is not None
    for reading, logits in zip(readings, found, strict=True):
        if reading.slot == 2:
            assert not torch.allclose(logits, seen.alone(reading.__class__(reading.ids, reading.positions, 0)))
        else:
            assert torch.allclose(logits, seen.alone(reading), rtol=1e-4, atol=1e-5)


def test_rows_of_sound_numbers_are_not_read_again(make_base: Make) -> None:
    seen = Seen(make_base("llama", torch.float32))
    with torch.no_grad():
        for weights in seen.bank.weights:
            weights[2] = float("nan")
    seen.read(some(5, [100, 20, 100, 20, 100, 20, 100], [1, 0, 1, 0, 1, 0, 2]))
    first, *again = seen.layouts
    assert first is not None and first.rows == 4
    assert again == [None]


def test_what_is_read_again_takes_few_forwards(make_base: Make) -> None:
    seen = Seen(make_base("llama", torch.float32))
    with torch.no_grad():
        for weights in seen.bank.weights:
            weights[2] = float("nan")
    seen.read(some(5, [10 + at % 40 for at in range(100)], [1, 2] * 50))
    first, *again = seen.layouts
    assert first is not None and 1 <= len(again) <= 3 and set(again) == {None}


def test_like_lengths_keep_a_row_each_and_unlike_ones_share(make_base: Make) -> None:
    seen = Seen(make_base("llama", torch.float64))
    seen.read(some(6, [64] * 30, [1] * 30))
    seen.read(some(6, [250] * 3, [1] * 3))
    assert seen.layouts == [None, None]
    seen.layouts.clear()
    seen.read(some(6, [*range(8, 41)] * 4 + [250, 250], [1] * 134))
    widths = [layout.width if layout is not None else None for layout in seen.layouts]
    assert widths == [64, None]


@pytest.mark.parametrize("reads", [1, 3])
def test_no_forward_reads_more_than_it_may(reads: int, make_base: Make) -> None:
    seen = Seen(make_base("llama", torch.float64))
    seen.runner.reads = 30 * reads
    readings = some(7, [4 + (at * 7) % 61 for at in range(50)], [1] * 50, reads=reads)
    seen.read(readings)
    assert len(seen.layouts) >= sum(len(reading.positions) for reading in readings) // (30 * reads)
    assert len([layout for layout in seen.layouts if layout is not None]) > 1


def test_no_forward_holds_more_tokens_than_it_may_and_a_slots_sequences_stay_together(make_base: Make) -> None:
    seen = Seen(make_base("llama", torch.float64))
    seen.runner.tokens = 1000
    readings = some(7, [2 + (at * 7) % 61 for at in range(60)], [1, 2, 3] * 20)
    with mock.patch.object(seen.bank, "use", wraps=seen.bank.use) as use:
        seen.read(readings)
    shared = [layout for layout in seen.layouts if layout is not None]
    assert len(shared) > 1 and all(sum(layout.lengths) <= 1000 for layout in shared)
    slots = [slot for call in use.call_args_list for slot in call.args[0]]
    assert slots == sorted(slots)


def test_every_position_may_be_read(make_base: Make) -> None:
    seen = Seen(make_base("bert", torch.float64), ("query", "dense"))
    readings = [Reading(r.ids, tuple(range(len(r.ids))), r.slot) for r in some(8, [20, 11, 30, 9, 17], [1, 2, 0, 3, 1])]
    found = seen.read(readings)
    assert seen.layouts[0] is not None
    for reading, logits in zip(readings, found, strict=True):
        assert torch.allclose(logits, seen.alone(reading), rtol=1e-9, atol=1e-9)


def test_where_gradients_flow_the_bank_has_a_row_each(make_base: Make) -> None:
    base = make_base("llama")
    runner, bank = Runner(base), SlotBank(find_targets(base.model, None), slots=2, rank=4, alpha=8.0, trainable=True)
    readings = some(9, [5, 30, 12, 8, 25, 7], [1, 2, 1, 2, 1, 2])
    with mock.patch.object(runner, "logits", wraps=runner.logits) as run:
        for _, logits in read(runner, bank, readings):
            assert logits.requires_grad
    assert all(not call.kwargs["layouts"] for call in run.call_args_list)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "bert", "opt", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_usual_families_share_rows(
    family: str, dtype: torch.dtype, make_base: Make, tasks: Tasks, settings: ModelSettings
) -> None:
    assert TorchModel(make_base(family, dtype), tasks, settings=settings, slots=1)._runner.packs


@pytest.mark.parametrize("window", [16, 512])
def test_layers_that_see_near_tokens_only_keep_a_row_each(window: int, tasks: Tasks, settings: ModelSettings) -> None:
    config = transformers.MistralConfig(
        vocab_size=258, pad_token_id=1, bos_token_id=0, eos_token_id=1, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        sliding_window=window,
    )  # fmt: skip
    assert TorchModel(random_base(config), tasks, settings=settings, slots=1)._runner.packs == (window == 512)


def test_blocks_that_are_shared_by_rows_keep_a_row_each(make_base: Make) -> None:
    base = make_base("llama")
    assert Runner(base, find_targets(base.model, None)).packs
    assert not Runner(base, find_targets(base.model, None, 0.5)).packs


@pytest.mark.parametrize("fault", ["positions", "attention", "longest", "device", "library"])
def test_what_cannot_share_rows_is_known_before_it_is_tried(
    fault: str, make_base: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("llama")
    if fault == "positions":
        monkeypatch.setattr(inspect, "signature", lambda _: SimpleNamespace(parameters={}))
    elif fault == "attention":
        base.model.config._attn_implementation = "flex_attention"  # ends the process
    elif fault == "longest":
        base = replace(base, max_positions=255)
    elif fault == "device":
        base = replace(base, device=torch.device("meta"))
    assert not Runner(base, library=fault == "library").packs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["leaks", "fails", "layers"])
def test_a_base_that_reads_masks_otherwise_keeps_a_row_each(
    fault: str, dtype: torch.dtype, make_base: Make, tasks: Tasks, settings: ModelSettings,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    right = Layout.mask

    def planted(self: Layout, dtype: torch.dtype, *, causal: bool) -> torch.Tensor:
        if fault == "fails":
            raise ValueError("no such mask")
        hidden = right(self, dtype, causal=causal)
        return torch.full_like(hidden, -torch.inf).triu(1)  # causal, but one sequence sees another

    def apart(*_: object) -> None:
        raise ConfigError("layers read rows otherwise")

    if fault == "layers":
        monkeypatch.setattr("oppu.lm.bank.mixed_in_rows", apart)  # asked for where not all have slot 0
    else:
        monkeypatch.setattr(Layout, "mask", planted)
    with caplog.at_level(logging.INFO):
        model = TorchModel(make_base("llama", dtype), tasks, settings=settings, slots=1)
    assert not model._runner.packs
    said = {"leaks": "the answers differ", "fails": "no such mask", "layers": "layers read rows otherwise"}
    assert said[fault] in caplog.text and "do not share rows" in caplog.text
