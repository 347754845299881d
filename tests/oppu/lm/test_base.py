"""Loading: fingerprints by content, the offline warm start, and errors that name the setting."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from oppu.errors import ConfigError
from oppu.lm import base as base_module
from oppu.lm.base import fingerprint_of, load_base, prompts_of
from oppu.lm.casting import cast
from oppu.lm.model import TorchModel
from oppu.lm.port import Row
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from tests.oppu.lm.conftest import byte_tokenizer, random_base

Make = Callable[..., Any]


@pytest.fixture
def saved(make_base: Make, tmp_path: Path) -> Path:
    """Return a folder with a tiny Llama."""
    base = make_base("llama")
    folder = tmp_path / "base"
    base.model.save_pretrained(str(folder))
    base.tokenizer.save_pretrained(str(folder))
    return folder


def test_a_folder_loads_frozen_and_computes_the_same(saved: Path, make_base: Make) -> None:
    base = load_base(ModelSettings(base=str(saved), threads=1, dtype="float32"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, make_base("llama").model(ids).logits)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.max_positions == 256 and base.dtype == torch.float32


def test_the_type_is_bfloat16_where_the_hardware_multiplies_it_and_nothing_is_adapted(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fast in (True, False):
        monkeypatch.setattr(base_module, "fast_bfloat16", lambda _device, fast=fast: fast)
        settings = ModelSettings(base=str(saved), threads=1)
        assert load_base(settings).dtype == (torch.bfloat16 if fast else torch.float32)
        assert load_base(settings, adapting=True).dtype == torch.float32
        assert load_base(settings.model_copy(update={"dtype": "bfloat16"})).dtype == torch.bfloat16


def test_rotary_frequencies_are_not_rounded(saved: Path) -> None:
    library = transformers.AutoModelForCausalLM.from_pretrained(str(saved), dtype=torch.bfloat16).eval()
    base = load_base(ModelSettings(base=str(saved), threads=1, dtype="bfloat16"))
    assert base.model.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = torch.arange(2, 202)[None]
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, library(ids).logits)


def test_what_the_library_keeps_wider_stays_so(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=24, kv_lora_rank=8, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=1, max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(str(tmp_path))
    byte_tokenizer().save_pretrained(str(tmp_path))
    library = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    base = load_base(ModelSettings(base=str(tmp_path), threads=1, dtype="bfloat16"))
    types = {name: tensor.dtype for name, tensor in library.state_dict().items()}
    assert {torch.float32, torch.bfloat16} <= set(types.values())
    assert {name: tensor.dtype for name, tensor in base.model.state_dict().items()} == types


def test_what_lies_in_the_file_is_cast_and_tied_weights_stay_tied() -> None:
    module = torch.nn.Module()
    module.one = module.other = torch.nn.Linear(2, 2)
    module.register_buffer("filed", torch.ones(2))
    module.register_buffer("computed", torch.ones(2), persistent=False)
    module.register_buffer("count", torch.ones(2, dtype=torch.int64))
    assert cast(module, torch.bfloat16) is module
    assert module.one.weight.dtype == module.filed.dtype == torch.bfloat16 and module.one is module.other
    assert module.computed.dtype == torch.float32 and module.count.dtype == torch.int64
    assert set(module.state_dict()) == {"one.weight", "one.bias", "other.weight", "other.bias", "filed", "count"}


LONG: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4, "long_factor": [9.0, 17.0, 33.0, 65.0],
}  # fmt: skip
PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
SHAPE: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (transformers.Phi3Config(rope_parameters=dict(LONG), original_max_position_embeddings=64, **SHAPE), 64),
        (transformers.Phi3Config(rope_parameters=dict(PLAIN), original_max_position_embeddings=64, **SHAPE), 256),
        (transformers.LlamaConfig(rope_parameters=dict(LONG), **SHAPE), 64),
        (transformers.LlamaConfig(rope_parameters={**LONG, "original_max_position_embeddings": 999}, **SHAPE), 256),
        (
            transformers.Gemma3TextConfig(
                rope_parameters={"sliding_attention": dict(PLAIN), "full_attention": dict(LONG)}, head_dim=8, **SHAPE
            ),
            64,
        ),
        (transformers.LlamaConfig(rope_parameters={**PLAIN, "rope_type": "linear", "factor": 4.0}, **SHAPE), 256),
    ],
)
def test_no_sequence_is_so_long_that_the_batch_is_rotated_otherwise(config: Any, longest: int) -> None:
    assert random_base(config).max_positions == longest


def test_under_longrope_long_prompts_are_cut_and_change_nothing_beside_them(
    tasks: Tasks, settings: ModelSettings
) -> None:
    base = random_base(transformers.Phi3Config(rope_parameters=LONG, original_max_position_embeddings=64, **SHAPE))
    own = settings.model_copy(update={"max_tokens": 200})
    model = TorchModel(base, tasks, settings=own, slots=1)
    choices = ("crime", "comedy", "sports")
    short = [Row("news_categorize", "brief", choices=choices), Row("news_headline", "brief", max_new_tokens=12)]
    long = [Row(row.task, "words " * 30, choices=row.choices, max_new_tokens=row.max_new_tokens) for row in short]
    read: list[int] = []
    base.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    found = model.answer([*short, *long])
    assert max(read) == 63
    for row, beside in zip([*short, *long], found, strict=True):
        [alone] = model.answer([row])
        np.testing.assert_allclose(beside.scores, alone.scores, atol=1e-4)
        assert beside.text == alone.text


def test_fingerprint_follows_content_not_path(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(saved, copy)
    (copy / "notes.txt").write_text("no part of it")
    assert fingerprint_of(copy) == fingerprint_of(saved)
    assert len(fingerprint_of(saved)) == 32
    assert fingerprint_of(saved, warm_start=True) != fingerprint_of(saved)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        other = tmp_path / name
        shutil.copytree(saved, other)
        content = bytearray((other / name).read_bytes())
        content[-3] ^= 1
        (other / name).write_bytes(content)
        assert fingerprint_of(other) != fingerprint_of(saved)


def test_offline_base_is_a_decoder_on_the_packaged_weights() -> None:
    base = load_base(ModelSettings(threads=1))
    again = load_base(ModelSettings(threads=1, dtype="bfloat16"))
    assert base.fingerprint == again.fingerprint and again.model.dtype == torch.bfloat16
    head, embeddings = base.model.get_output_embeddings(), base.model.get_input_embeddings()
    assert head.weight.data_ptr() == embeddings.weight.data_ptr()
    assert torch.equal(base.model.cls.predictions.transform.dense.weight, torch.eye(384))
    ids = base.tokenizer("one two three four", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole, part = base.model(ids).logits, base.model(ids[:, :3]).logits
    assert torch.allclose(whole[:, :3], part, atol=1e-4)  # it reads left to right only
    # The weights are the packaged ones, not random: words of a kind lie near each other.
    vectors = torch.nn.functional.normalize(embeddings.weight, dim=1)
    near, other, far = base.tokenizer.convert_tokens_to_ids(["monday", "tuesday", "banana"])
    assert vectors[near] @ vectors[other] > vectors[near] @ vectors[far] + 0.2


def test_special_tokens_in_a_users_text_are_text() -> None:
    base = load_base(ModelSettings(threads=1))
    ids = base.prompts().continuations(["a [SEP] b"])["a [SEP] b"]
    assert base.tokenizer.sep_token_id not in ids and len(ids) > 3


def test_byte_tokenizer_separates_lines_by_a_newline(make_base: Make) -> None:
    prompts = prompts_of(make_base("llama").tokenizer)
    assert len(prompts.stops) == 2 and prompts.end == 1


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c"])
def test_a_missing_folder_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.base: no such folder"):
        load_base(ModelSettings(base=name))


def test_a_hub_id_that_cannot_be_fetched_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"model\.base: 'oppu/none' is neither"):
        load_base(ModelSettings(base="oppu/none"))


@pytest.mark.parametrize("spoil", ["weights", "cut", "config", "empty", "tokenizer"])
def test_unusable_folders_are_config_errors(spoil: str, saved: Path) -> None:
    weights = saved / "model.safetensors"
    if spoil == "weights":
        weights.unlink()
    elif spoil == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif spoil == "config":
        (saved / "config.json").write_text(json.dumps({"model_type": "t5"}))
    elif spoil == "tokenizer":
        (saved / "tokenizer.json").write_text("{}")
    else:
        shutil.rmtree(saved)
        saved.mkdir()
    with pytest.raises(ConfigError, match=r"model\.base"):
        load_base(ModelSettings(base=str(saved), threads=1))


def test_an_unusable_device_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"model\.device"):
        load_base(ModelSettings(device="warp"))
