"""A base that would answer otherwise beside other rows than alone is refused when it is loaded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from oppu.errors import ConfigError, ModelLost
from oppu.lm import attention
from oppu.lm.bank import SlotBank
from oppu.lm.base import LoadedBase
from oppu.lm.forward import Runner
from oppu.lm.model import TorchModel
from oppu.lm.port import AdapterRef, Row
from oppu.lm.targets import find_targets
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from oppu.values import UserId
from tests.oppu.lm.conftest import FAMILIES, random_adapter, random_base

COMMON: dict[str, Any] = {"vocab_size": 258, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
WIDE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "max_position_embeddings": 256}
CHOICES = tuple(f"one thing after another, number {at} of them" for at in range(40))


def seeing() -> Any:
    return transformers.Gemma3Config(
        text_config={**WIDE, **GROUPED, "vocab_size": 258, "head_dim": 16, "sliding_window": 16},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 14,
        },
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "opt", "qwen3", "gemma2", "gemma3"])
def test_usual_families_pass_and_share_prompts(
    family: str, dtype: torch.dtype, make_base: Callable[..., LoadedBase], tasks: Tasks, settings: ModelSettings
) -> None:
    model = TorchModel(make_base(family, dtype), tasks, settings=settings, slots=1)
    assert model._branches


def test_positions_that_the_model_numbers_otherwise(tasks: Tasks, settings: ModelSettings) -> None:
    config = transformers.RobertaConfig(is_decoder=True, max_position_embeddings=256, **WIDE, **COMMON)
    with pytest.raises(ConfigError, match="when sequences are read, when texts are written"):
        TorchModel(random_base(config), tasks, settings=settings, slots=1)


def test_a_planted_fault_in_the_positions(
    make_base: Callable[..., LoadedBase], tasks: Tasks, settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Runner.given_positions
    monkeypatch.setattr(Runner, "given_positions", lambda self, positions: right(self, positions + 3))
    with pytest.raises(ConfigError, match=r"model\.base: 'gpt2' answers otherwise beside another row"):
        TorchModel(make_base("gpt2"), tasks, settings=settings, slots=1)


def test_a_state_that_padding_enters(tasks: Tasks, settings: ModelSettings) -> None:
    config = transformers.RecurrentGemmaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, lru_width=32,
        attention_window_size=64, **COMMON,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"model\.base"):
        TorchModel(random_base(config), tasks, settings=settings, slots=1)


def test_a_base_whose_state_cannot_be_shared_reads_the_prompt_for_every_line(
    tasks: Tasks, settings: ModelSettings
) -> None:
    config = transformers.Qwen3NextConfig(
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, linear_num_key_heads=2,
        shared_expert_intermediate_size=24, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention", "full_attention"], **WIDE, **GROUPED, **COMMON,
    )  # fmt: skip
    model = TorchModel(random_base(config), tasks, settings=settings, slots=1)
    assert not model._branches
    model._runner.tokens = 64  # so little that lines would share their prompt
    [found] = model.answer([Row("news_categorize", "an article " * 4, choices=CHOICES)])
    assert np.exp(found.scores).sum() == pytest.approx(1.0)


def test_layers_that_reading_text_never_runs_are_refused(tasks: Tasks, settings: ModelSettings) -> None:
    named = settings.model_copy(update={"lora_targets": ("out_proj",)})  # the vision tower's alone
    with pytest.raises(ConfigError, match=r"model\.lora_targets: reading text runs none of model\.vision"):
        TorchModel(random_base(seeing()), tasks, settings=named, slots=1)


def test_what_is_named_outright_beside_the_decoder_is_not_dropped(make_base: Callable[..., LoadedBase]) -> None:
    found = find_targets(make_base().model, ("q_proj", "lm_head"))
    assert "lm_head" in found and len(found) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_layer_that_the_bank_cannot_serve_is_refused_at_once(
    family: str, make_base: Callable[..., LoadedBase], tasks: Tasks, settings: ModelSettings
) -> None:
    named = settings.model_copy(update={"lora_targets": ("c_attn" if family == "gpt2" else "q_proj", "lm_head")})
    with pytest.raises(ConfigError, match=r"model\.lora_targets: expected layers that keep .* apart: lm_head reads"):
        TorchModel(make_base(family), tasks, settings=named, slots=1)


@pytest.mark.parametrize(
    ("error", "raised"),
    [(torch.OutOfMemoryError("no"), torch.OutOfMemoryError), (RuntimeError("odd shapes"), ConfigError)],
)
def test_a_layer_that_adapters_cannot_be_added_to(
    error: Exception, raised: type[Exception], make_base: Callable[..., LoadedBase], tasks: Tasks,
    settings: ModelSettings, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(SlotBank, "_added", fail)
    with pytest.raises(raised, match=r"no|model\.lora_targets: expected layers .* added to: odd shapes"):
        TorchModel(make_base(), tasks, settings=settings, slots=1)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("CUDA error: illegal memory access"), ModelLost),
        (torch.OutOfMemoryError("no"), torch.OutOfMemoryError),
        (RuntimeError("odd shapes"), ConfigError),
    ],
)  # fmt: skip
def test_a_lost_device_is_not_the_bases_fault(
    error: Exception, raised: type[Exception], make_base: Callable[..., LoadedBase], tasks: Tasks,
    settings: ModelSettings, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Runner, "logits", fail)
    with pytest.raises(raised):
        TorchModel(make_base(), tasks, settings=settings, slots=1)


def test_of_a_base_that_sees_too_the_text_layers_alone_are_adapted(
    tasks: Tasks, settings: ModelSettings, as_peft: Callable[..., Any]
) -> None:
    base = random_base(seeing())
    assert base.max_positions == 256
    model = TorchModel(base, tasks, settings=settings, slots=1)
    assert len(model._targets) == 6 and not any("vision" in name for name in model._targets)
    assert not any(isinstance(layer, Conv1D) for layer in model._targets.values())
    tensors = {n: t for n, t in random_adapter(base.model, 1).items() if "vision" not in n}
    ref = AdapterRef(UserId("ada"), 0, 1)
    model.install(ref, tensors)
    own, plain = model.answer([Row("news_headline", "words", adapter=r, max_new_tokens=3) for r in (ref, None)])
    assert own.text is not None and plain.text is not None
    peft = as_peft(base, tensors, model.adapter_config())
    assert len(tensors) == sum("lora_" in name for name, _ in peft.named_parameters())


@pytest.mark.parametrize(("planted", "kept"), [(None, True), ("rounds", False), ("fails", False)])
def test_attention_that_changes_a_base_is_left_to_the_library(
    planted: str | None,
    kept: bool,
    make_base: Callable[..., LoadedBase],
    tasks: Tasks,
    settings: ModelSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = attention.attend

    def wrong(module: Any, query: torch.Tensor, *args: Any, **how: Any) -> Any:
        if planted == "fails":
            raise RuntimeError("no such shape")
        return right(module, query if planted is None else query.round(), *args, **how)

    monkeypatch.setattr(attention, "_slow_kernel", lambda: True)
    monkeypatch.setattr(attention, "attend", wrong)
    base = make_base("llama", torch.bfloat16)
    model = TorchModel(base, tasks, settings=settings, slots=1)
    assert all((attention._MARK in vars(module)) == kept for module in base.model.modules())
    assert model.answer([Row("news_categorize", "rain", choices=("yes", "no"))])[0].base_scores is not None
