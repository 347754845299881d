"""Stacks and trust: normalised, safe, and fitted to what is true."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evaluation.stacking import Seen, fit
from inference.combine import log_softmax
from inference.fusion import Stack, Trust, mix

Array = NDArray[np.float64]


def spoken(seed: int, choices: int = 4) -> Array:
    return log_softmax(np.random.default_rng(seed).normal(size=choices) * 3)


class TestStack:
    def test_one_source_with_coefficient_one_is_itself(self) -> None:
        said = spoken(1)
        found = Stack({"base": (1.0, 0.0), "knn": (0.5, 0.0)}).scores({"base": said, "knn": None}, events=7)
        np.testing.assert_allclose(found, said)

    def test_a_slope_counts_with_the_length_of_the_history(self) -> None:
        stack = Stack({"base": (1.0, 0.0), "prior": (0.0, 1.0)})
        sources = {"base": spoken(1), "prior": spoken(2)}
        np.testing.assert_allclose(stack.scores(sources, events=0), sources["base"])
        later = stack.scores(sources, events=round(np.exp(5)) - 1)
        np.testing.assert_allclose(later, log_softmax(sources["base"] + sources["prior"]), atol=0.02)

    def test_no_source_forbids_a_choice_by_itself(self) -> None:
        never = np.array([0.0, -np.inf])
        found = Stack({"base": (1.0, 0.0)}).scores({"base": never}, events=1)
        assert np.isfinite(found).all()

    @given(st.permutations(range(4)), st.integers(0, 500))
    def test_permuting_the_choices_permutes_the_answer(self, order: list[int], events: int) -> None:
        stack = Stack({"base": (0.7, 0.1), "knn": (0.4, -0.1)})
        sources = {"base": spoken(1), "knn": spoken(2)}
        moved: dict[str, Array | None] = {name: said[order] for name, said in sources.items()}
        plain: dict[str, Array | None] = dict(sources)
        np.testing.assert_allclose(stack.scores(moved, events), stack.scores(plain, events)[order])


class TestTrust:
    def test_an_even_loss_moves_nothing(self) -> None:
        start = np.array([0.5, 0.5])
        np.testing.assert_allclose(Trust(start).after(start, np.array([2.0, 2.0])), start)

    def test_it_follows_who_was_right_and_comes_back(self) -> None:
        trust, weights = Trust(np.array([0.5, 0.5])), np.array([0.5, 0.5])
        for _ in range(30):
            weights = trust.after(weights, np.array([2.0, 0.5]))
        assert weights[1] > 0.95
        for _ in range(30):
            weights = trust.after(weights, np.array([0.5, 2.0]))
        assert weights[1] < 0.05

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 200), st.floats(0.001, 0.2))
    def test_the_mixture_never_costs_more_than_its_bound(self, seed: int, events: int, share: float) -> None:
        chance = np.random.default_rng(seed)
        start = np.array([0.5, 0.5])
        trust, weights = Trust(start, share), start
        mixed, alone = 0.0, np.zeros(2)
        for _ in range(events):
            experts = [log_softmax(chance.normal(size=3) * 4) for _ in range(2)]
            truth = int(chance.integers(3))
            mixed -= mix(weights, experts)[truth]
            losses = np.array([-expert[truth] for expert in experts])
            alone += losses
            weights = trust.after(weights, losses)
        assert mixed <= alone[0] + np.log(2) - events * np.log(1 - share) + 1e-9


def test_a_mixture_is_normalised() -> None:
    found = mix(np.array([0.3, 0.7]), [spoken(1), spoken(2)])
    assert np.exp(found).sum() == pytest.approx(1)
    np.testing.assert_allclose(found, np.log(0.3 * np.exp(spoken(1)) + 0.7 * np.exp(spoken(2))))


def test_a_fit_finds_the_source_that_tells_the_truth() -> None:
    chance = np.random.default_rng(5)
    seen = []
    for _ in range(800):
        told, noise = log_softmax(chance.normal(size=5) * 2), log_softmax(chance.normal(size=5) * 2)
        right = int(chance.choice(5, p=np.exp(told)))
        seen.append(Seen({"base": noise, "adapter": told, "knn": None}, right, 50))
    stack = fit(seen, ("base", "adapter", "knn"))
    level = {name: at + slope * np.log(51) / 5 for name, (at, slope) in stack.coefficients.items()}
    assert level["adapter"] == pytest.approx(1.0, abs=0.15)
    assert level["base"] == pytest.approx(0.0, abs=0.15)
