"""Tiny random bases of several model families over a byte-level tokenizer, and the tasks."""

import copy
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.pytorch_utils import Conv1D

from oppu.lm.base import LoadedBase, ready
from oppu.lm.casting import cast as cast_to
from oppu.lm.targets import find_targets
from oppu.settings import ModelSettings
from oppu.tasks import Tasks, load_tasks

FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gpt2", "bert")
_SPECIAL = ("<s>", "</s>")

MakeBase = Callable[..., LoadedBase]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def byte_tokenizer() -> Any:
    """One token a byte, as GPT-2 spells them, so that any text has tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: at for at, word in enumerate([*_SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def tiny_model(family: str) -> Any:
    """A random causal LM of two layers."""
    common: dict[str, Any] = {"vocab_size": 258, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    grouped = {"num_key_value_heads": 2, "max_position_embeddings": 256}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **common)
    elif family == "opt":
        config = transformers.OPTConfig(
            hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, **common,
        )  # fmt: skip
    elif family == "bert":
        config = transformers.BertConfig(max_position_embeddings=256, is_decoder=True, **wide, **common)
    else:
        make = {
            "llama": transformers.LlamaConfig,
            "qwen2": transformers.Qwen2Config,
            "mistral": transformers.MistralConfig,
            "gemma": transformers.GemmaConfig,
            "qwen3": transformers.Qwen3Config,
            "gemma2": transformers.Gemma2Config,
            "gemma3": transformers.Gemma3TextConfig,
        }[family]
        extra: dict[str, Any] = {"sliding_window": 40} if family in ("mistral", "gemma2", "gemma3") else {}
        extra |= {"head_dim": 8} if family.startswith(("gemma", "qwen3")) else {}
        extra |= {"query_pre_attn_scalar": 8} if family in ("gemma2", "gemma3") else {}
        config = make(**wide, **grouped, **common, **extra)
    return random_model(config, seed=7)


def random_model(config: Any, seed: int) -> Any:
    """A random causal LM whose answers differ."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the usual initialisation is so flat that every answer looks alike
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)
    return model


def random_base(config: Any) -> LoadedBase:
    """A random base of whatever family the configuration is."""
    model = random_model(config, seed=3)
    return ready("odd", model, byte_tokenizer(), "0" * 32, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def make_base() -> MakeBase:
    """Return a maker of tiny bases by family and dtype."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedBase:
        device = torch.device("cpu")
        return ready(family, tiny_model(family), byte_tokenizer(), "0" * 32, device=device, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def tasks() -> Tasks:
    """Return the packaged tasks."""
    return load_tasks()


@pytest.fixture
def settings() -> ModelSettings:
    """Return settings that fit the tiny bases."""
    return ModelSettings(max_tokens=96, lora_rank=4, lora_alpha=8.0, threads=1)


def random_adapter(model: torch.nn.Module, seed: int, rank: int = 4, size: float = 0.3) -> dict[str, Any]:
    """Weights for a model's automatic targets, in PEFT's naming, both halves non-zero."""
    chance = np.random.default_rng(seed)
    found = {}
    for name, module in find_targets(model, None).items():
        first, second = (int(size) for size in cast(torch.Tensor, module.weight).shape)
        wide, out = (first, second) if isinstance(module, Conv1D) else (second, first)
        for kind, shape in (("A", (rank, wide)), ("B", (out, rank))):
            tensor = chance.normal(0, size, shape).astype(np.float32)
            found[f"base_model.model.{name}.lora_{kind}.weight"] = tensor
    return found


@pytest.fixture
def make_adapter() -> Callable[..., dict[str, Any]]:
    """Return a maker of random adapters: ``(model, seed, rank=4)``."""
    return random_adapter


@pytest.fixture
def as_peft(tmp_path: Path) -> Callable[..., Any]:
    """Return a loader of weights into PEFT through its own files: ``(base, tensors, config, trainable=False)``."""

    def load(
        base: LoadedBase, tensors: dict[str, Any], config: Mapping[str, object], *, trainable: bool = False
    ) -> Any:
        folder = tmp_path / uuid.uuid4().hex
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, str(folder / "adapter_model.safetensors"))
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder), is_trainable=trainable)
        return cast_to(model, base.dtype).eval()

    return load
