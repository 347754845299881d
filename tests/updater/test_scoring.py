"""Scores of single examples, and the gate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oppu.lm.fake import FakeModel
from oppu.lm.port import Example, TrainConfig, TrainJob
from oppu.values import UserId
from updater.scoring import CHUNK, Assessment, assess, verdict

LABELS = ("glad", "sad")


def examples(n: int) -> list[Example]:
    return [
        Example("mood", f"text {i}", LABELS[i % 2], LABELS) if i % 3 else Example("title", f"text {i}", f"title {i}")
        for i in range(n)
    ]


def test_agrees_with_the_models_own_scores_in_order() -> None:
    model, rows = FakeModel(), examples(3 * CHUNK)
    config = TrainConfig(1e-3, 0.0, 1, 16)
    trained = model.train([TrainJob(UserId("u"), None, tuple(rows[:50]))], config, heartbeat=lambda: None)[0]
    beats: list[None] = []
    for tensors in (None, trained.tensors):
        found = assess(model, rows, tensors, lambda: beats.append(None))
        scores = model.scores(rows, tensors)
        losses = [-s[e.choices.index(e.output)] if e.choices else -s.mean() for e, s in zip(rows, scores, strict=True)]
        np.testing.assert_allclose(found.losses, losses)
        best = [bool(e.choices) and e.choices[int(np.argmax(s))] == e.output for e, s in zip(rows, scores, strict=True)]
        assert found.correct.tolist() == best
    assert len(beats) == 2 * (2 + 1)


def test_nothing_scores_nothing() -> None:
    empty = assess(FakeModel(), [], None, lambda: None)
    assert len(empty.losses) == len(empty.correct) == 0
    assert np.isnan(empty.mean)


def made(*losses: float) -> Assessment:
    return Assessment(np.array(losses, dtype=np.float64), np.zeros(len(losses), dtype=np.bool_))


@pytest.mark.parametrize(
    ("candidate", "parent", "none", "publish"),
    [
        (made(1.0), None, made(2.0), True),
        (made(1.0), made(1.5), made(2.0), True),
        (made(1.0), made(0.5), made(2.0), False),
        (made(1.0), made(1.5), made(0.5), False),
        (made(1.0), made(1.0), made(2.0), False),
        (made(1.0), None, made(1.0), False),
        (made(0.0, 3.0), made(2.0, 2.0), made(2.0, 2.0), True),
        (made(float("nan")), None, made(2.0), False),
        (made(float("inf")), made(float("inf")), made(float("inf")), False),
        (made(1.0), made(float("nan")), made(2.0), True),
        (made(), None, made(), False),
    ],
)
def test_the_gate(candidate: Assessment, parent: Assessment | None, none: Assessment, *, publish: bool) -> None:
    judged = verdict(candidate, parent, none)
    assert judged.publish is publish
    assert bool(judged.reason) is not publish


@given(st.lists(st.floats(0, 50), min_size=1, max_size=20))
def test_an_equal_candidate_is_never_published(losses: list[float]) -> None:
    assert not verdict(made(*losses), made(*losses), made(*(loss + 1 for loss in losses))).publish


def test_the_end_of_an_assessment() -> None:
    assert made(1.0, 2.0, 3.0).last(2).losses.tolist() == [2.0, 3.0]
    assert made(1.0).last(0).losses.tolist() == []
