"""The simulator's model keeps the port's promises and shows personalization."""

import subprocess
import sys

import numpy as np
import pytest

from oppu.errors import AdapterUnreadable
from oppu.lm.fake import BUCKETS, TENSOR, FakeModel
from oppu.lm.port import AdapterRef, Example, LanguageModel, Row, TrainConfig, TrainJob
from oppu.values import UserId

CHOICES = ("a", "b", "c")
CONFIG = TrainConfig(learning_rate=1.0, weight_decay=0.0, passes=2, batch=2)


def ref(version: int, name: str = "u") -> AdapterRef:
    return AdapterRef(UserId(name), 0, version)


def job(output: str, parent: dict[str, np.ndarray] | None = None) -> TrainJob:
    return TrainJob(UserId("u"), parent, tuple(Example("t", f"x{n}", output, CHOICES) for n in range(3)))


def test_training_makes_the_trained_output_likelier() -> None:
    model: LanguageModel = FakeModel()
    beats: list[None] = []
    trained = model.train([job("b"), job("c")], CONFIG, heartbeat=lambda: beats.append(None))
    assert [result.steps for result in trained] == [4, 4] and len(beats) == 8
    for version, (result, index) in enumerate(zip(trained, (1, 2), strict=True)):
        assert result.tensors is not None
        model.install(ref(version), result.tensors)
        scored = model.answer([Row("t", "new", choices=CHOICES, adapter=ref(version))])[0]
        assert scored.scores.argmax() == index
        assert np.exp(scored.scores).sum() == pytest.approx(1)
        assert scored.scores[index] > scored.base_scores[index]
        example = Example("t", "new", CHOICES[index], CHOICES)
        assert np.array_equal(model.scores([example], result.tensors)[0], scored.scores)


def test_training_goes_on_from_the_parent_without_changing_it() -> None:
    model = FakeModel()
    parent = model.train([job("b")], CONFIG, heartbeat=lambda: None)[0].tensors
    assert parent is not None
    before = parent[TENSOR].copy()
    child = model.train([job("b", dict(parent))], CONFIG, heartbeat=lambda: None)[0].tensors
    assert child is not None and child[TENSOR].sum() == 2 * before.sum() == 12
    assert np.array_equal(parent[TENSOR], before)


def test_evidence_and_text() -> None:
    model = FakeModel()
    plain = model.answer([Row("t", "x", choices=CHOICES)])[0]
    helped = model.answer([Row("t", "x", evidence=(("y", "c"),), choices=CHOICES)])[0]
    assert helped.scores[2] > plain.scores[2]
    text = model.answer([Row("t", "one two three", max_new_tokens=2), Row("t", "x", evidence=(("y", "cc"),))])
    assert [scored.text for scored in text] == ["one two", "cc"]


def test_bank() -> None:
    events: list[str] = []
    model = FakeModel(slots=2, on_event=events.append)
    tensors = {TENSOR: np.zeros((1, BUCKETS), np.float32)}
    for version in (1, 2, 1, 3):
        model.install(ref(version), tensors)
    assert [model.resident(ref(version)) for version in (1, 2, 3)] == [True, False, True]
    assert events == ["load", "load", "evict", "load", "hit", "miss", "hit"]
    assert (model.bank_resident, model.bank_bytes) == (2, 2 * 4 * BUCKETS)
    with pytest.raises(KeyError):
        model.answer([Row("t", "x", choices=CHOICES, adapter=ref(2))])
    model.touch([ref(1), ref(9)])
    model.install(ref(4), tensors)
    assert [model.resident(ref(version)) for version in (1, 3, 4)] == [True, False, True]
    for bad in ({}, {TENSOR: np.zeros((2, 2), np.float32)}, {TENSOR: np.full((1, BUCKETS), np.nan, np.float32)}):
        with pytest.raises(AdapterUnreadable):
            model.install(ref(9), bad)


def test_an_unfit_parent_gives_no_tensors() -> None:
    for parent in ({TENSOR: np.full((1, BUCKETS), np.inf, np.float32)}, {}):
        assert FakeModel().train([job("b", parent)], CONFIG, heartbeat=lambda: None)[0].tensors is None


def test_light_modules_import_no_model_library() -> None:
    code = (
        "import sys, oppu.lm.fake, oppu.lm.port, oppu.lm.prompts, oppu.embedder, oppu.tasks; "
        "heavy = {'torch', 'transformers', 'peft', 'sentence_transformers'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
