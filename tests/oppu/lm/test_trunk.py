"""What no adapter reaches is computed once: the same logits, gradients and trained weights as without."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from oppu.errors import ConfigError
from oppu.lm.bank import SlotBank
from oppu.lm.base import LoadedBase
from oppu.lm.encoding import Reading
from oppu.lm.forward import Runner
from oppu.lm.model import TorchModel
from oppu.lm.port import AdapterRef, Example, Row, TrainConfig, TrainJob
from oppu.lm.targets import adapter_config, find_targets
from oppu.lm.trunk import Memory, block_of
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from oppu.values import UserId

Make = Callable[..., Any]
FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gemma3", "gpt2", "bert", "opt")
READINGS = [  # one sequence under three adapters, another under two, and one by itself
    Reading((5, 6, 7, 8), (1, 3), 0),
    Reading((9, 10), (1,), 0),
    Reading((5, 6, 7, 8), (1, 3), 1),
    Reading((9, 10), (0, 1), 2),
    Reading(tuple(range(20, 75)), (0, 44, 54), 2),
    Reading((5, 6, 7, 8), (3,), 2),
]


class Watched:
    """Counts the rows that a block reads."""

    def __init__(self, block: torch.nn.Module) -> None:
        self.rows: list[int] = []
        self._hook = block.register_forward_pre_hook(lambda _, args: self.rows.append(len(args[0])))


def upper_bank(base: LoadedBase, *, trainable: bool = False) -> SlotBank:
    bank = SlotBank(find_targets(base.model, None, 0.5), slots=2, rank=4, alpha=8.0, trainable=trainable)
    chance = np.random.default_rng(0)
    for slot in (1, 2):
        bank.load(slot, {n: chance.normal(0, 0.3, x.shape).astype(np.float32) for n, x in bank.read(0).items()})
    return bank


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_sequence_share_what_lies_below(family: str, trainable: bool, make_base: Make) -> None:
    base = make_base(family, torch.float64)
    bank = upper_bank(base, trainable=trainable)
    slots = [reading.slot for reading in READINGS]
    found: list[list[torch.Tensor]] = []
    memory = Memory()
    for kept in ("without", "first", "again"):
        runner = Runner(base, None if kept == "without" else find_targets(base.model, None, 0.5))
        lowest = Watched(_block(base, 0))
        with torch.set_grad_enabled(trainable), bank.use(slots):
            logits = runner.logits(READINGS, memory if kept != "without" else None)
        grads = torch.autograd.grad(logits.square().sum(), bank.weights) if trainable else ()
        found.append([logits.detach(), *grads])
        # the hook sees a block that passes on what it is given, too
        assert lowest.rows == [{"without": 6, "first": 3, "again": 6}[kept]]
        lowest._hook.remove()
        runner.close()
    for other in found[1:]:
        for expected, given in zip(found[0], other, strict=True):
            assert (expected - given).abs().max() <= 1e-9 * expected.abs().max()


def _block(base: LoadedBase, number: int) -> torch.nn.Module:
    place = block_of(next(iter(find_targets(base.model, None))))
    assert place is not None
    blocks: Any = base.model.get_submodule(place[0])
    block: torch.nn.Module = blocks[number]
    return block


def test_the_second_reading_computes_nothing_below(make_base: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("llama", torch.float64)
    runner, memory, bank = Runner(base, find_targets(base.model, None, 0.5)), Memory(), upper_bank(base)
    with torch.no_grad(), bank.use([r.slot for r in READINGS]):
        before = runner.logits(READINGS, memory)
        monkeypatch.setattr(base.model.model.layers[0].self_attn, "forward", None)
        assert torch.allclose(runner.logits(READINGS, memory), before, rtol=1e-12)
        with pytest.raises(TypeError):
            runner.logits([*READINGS[:5], Reading((1, 2), (0,), 2)], memory)


def test_a_full_memory_keeps_no_more(make_base: Make) -> None:
    base = make_base("llama")
    runner, bank = Runner(base, find_targets(base.model, None, 0.5)), upper_bank(base)
    memory = Memory(4 * 32 * 4)  # four tokens of 32 float32
    with torch.no_grad(), bank.use([r.slot for r in READINGS]):
        runner.logits(READINGS, memory)
    assert memory.holds([(5, 6, 7, 8)]) and not memory.holds([(9, 10)])


def test_a_closed_runner_leaves_the_blocks_as_they_were(make_base: Make) -> None:
    base = make_base("bert")
    Runner(base, find_targets(base.model, None, 0.5)).close()
    block = _block(base, 0)
    assert "forward" not in vars(block)
    assert not [m for m in base.model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_trained_weights_are_those_without_memory_and_fit_peft(
    family: str, make_base: Make, as_peft: Make, tasks: Tasks
) -> None:
    choices = ("red", "green", "rot")
    examples = tuple(Example("movie_tagging", f"film {n}", choices[n % 3], choices) for n in range(7))
    settings = ModelSettings(max_tokens=96, lora_rank=4, lora_alpha=8.0, threads=1, lora_upper=0.5)
    config, found = TrainConfig(1e-2, 0.01, passes=3, batch=3), []
    for limit in (0, 2**20):
        base = make_base(family, torch.float64)
        model = TorchModel(base, tasks, settings=settings, slots=2)
        job = TrainJob(UserId("u"), None, examples)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("oppu.lm.trunk.Memory.__init__.__defaults__", (limit,))
            [trained] = model.train([job], config, heartbeat=lambda: None)
        assert trained.tensors is not None
        found.append(trained.tensors)
        assert all(".1." in name for name in trained.tensors)
    for name, value in found[0].items():
        assert np.abs(value - found[1][name]).max() <= 1e-7 * np.abs(value).max()
    ids = torch.tensor([[5, 6, 7, 8]])
    untouched = make_base(family, torch.float64)
    peft = as_peft(untouched, dict(found[1]), model.adapter_config())
    expected = peft(input_ids=ids).logits[0, -1]
    with torch.no_grad():
        bank = SlotBank(find_targets(untouched.model, None, 0.5), slots=1, rank=4, alpha=8.0)
        bank.load(1, found[1])
        with bank.use([1]):
            given = untouched.model(input_ids=ids).logits[0, -1]
    assert torch.allclose(given, expected.detach(), rtol=1e-9, atol=1e-9)


def test_an_answer_reads_each_prompt_once_below(make_base: Make, tasks: Tasks) -> None:
    base = make_base("llama")
    settings = ModelSettings(max_tokens=96, lora_rank=4, lora_alpha=8.0, threads=1, lora_upper=0.5)
    model = TorchModel(base, tasks, settings=settings, slots=2)
    bank, ref = upper_bank(make_base("llama")), AdapterRef(UserId("u"), 0, 1)
    model.install(ref, bank.read(1))
    rows = [Row("movie_tagging", f"film {n}", choices=("red", "green"), adapter=ref) for n in range(3)]
    lower, upper = Watched(_block(base, 0)), Watched(_block(base, 1))
    answers = model.answer(rows)
    assert (sum(lower.rows), sum(upper.rows)) == (3, 6)
    assert all(not np.allclose(a.scores, a.base_scores) for a in answers)
    whole = TorchModel(make_base("llama"), tasks, settings=settings.model_copy(update={"lora_upper": 1.0}), slots=2)
    for answer, plain in zip(
        answers, whole.answer([Row(r.task, r.input, choices=r.choices) for r in rows]), strict=True
    ):
        assert np.allclose(answer.base_scores, plain.base_scores, atol=1e-5)


@pytest.mark.parametrize(("upper", "blocks"), [(1.0, None), (0.5, [1]), (0.01, [1]), (0.51, None)])
def test_peft_is_told_the_blocks(upper: float, blocks: list[int] | None, make_base: Make) -> None:
    base = make_base()
    targets = find_targets(base.model, None, upper)
    assert adapter_config(base.model, targets, None, base="x", rank=4, alpha=8.0)["layers_to_transform"] == blocks
    assert {block_of(name) for name in targets} == {("model.layers", n) for n in blocks or (0, 1)}


def test_what_a_parent_lacks_is_learnt_too(make_base: Make, tasks: Tasks) -> None:
    """As after ``lora_upper`` or ``lora_rank`` was raised."""
    settings = ModelSettings(max_tokens=96, lora_rank=4, lora_alpha=8.0, threads=1)
    bank = SlotBank(find_targets(make_base().model, None, 0.5), slots=1, rank=2, alpha=4.0)
    bank.fresh(1, 3)
    model = TorchModel(make_base(), tasks, settings=settings, slots=1)
    examples = tuple(Example("movie_tagging", f"film {n}", "red", ("red", "green")) for n in range(4))
    job = TrainJob(UserId("u"), bank.read(1), examples)
    [trained] = model.train([job], TrainConfig(1e-2, 0.0, passes=2, batch=4), heartbeat=lambda: None)
    assert trained.tensors is not None
    assert {block_of(n)[1] for n in find_targets(make_base().model, None)} == {0, 1}  # type: ignore[index]
    assert all(np.abs(x).sum(axis=0).all() for n, x in trained.tensors.items() if "lora_B" in n)


def test_a_trunk_may_be_closed_twice(make_base: Make) -> None:
    base = make_base("llama")
    runner = Runner(base, find_targets(base.model, None, 0.5))
    runner.close()
    runner._trunk.close()
    assert not runner._trunk.known


def test_what_lies_in_no_block_shares_nothing(make_base: Make) -> None:
    base = make_base("llama")
    assert block_of("lm_head") is None
    runner = Runner(base, find_targets(base.model, ("lm_head",), 0.5))
    assert not runner._trunk.known
    with pytest.raises(ConfigError):
        find_targets(base.model, ("missing",), 0.5)
