"""Stacks and shares: normalised, safe, and fitted to what is true."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evaluation.stacking import Seen, fit, mixture_share
from oppu.errors import ConfigError
from oppu.fusion import (
    DEFAULT,
    KEPT,
    MOST_GAIN,
    MOST_SHARE,
    NAMES,
    PACE,
    Fusion,
    Stack,
    earn,
    load_fusion,
    log_softmax,
    mix,
    pick,
    recency_prior,
    recency_priors,
)

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


class TestEarned:
    def test_an_even_loss_moves_nothing(self) -> None:
        assert earn(0.0, 0.0) == 0.0

    def test_an_adapter_that_hurts_its_user_has_next_to_no_weight_and_can_come_back(self) -> None:
        earned = 0.0
        for _ in range(30):
            earned = earn(earned, -1.5)
        assert float(DEFAULT.weights(10**6, earned)[1]) < 0.03
        for _ in range(30):
            earned = earn(earned, 1.5)
        assert float(DEFAULT.weights(10**6, earned)[1]) == MOST_SHARE

    def test_what_is_not_a_number_is_a_loss_and_does_not_stay(self) -> None:
        assert earn(0.0, float("nan")) == -PACE * MOST_GAIN

    def test_a_long_history_does_not_shield_an_adapter(self) -> None:
        assert float(DEFAULT.weights(10**9, -1.0)[1]) == pytest.approx(1 / (1 + np.e))

    @given(st.lists(st.floats(allow_nan=False), max_size=60))
    def test_no_outcome_counts_without_end(self, gains: list[float]) -> None:
        earned = 0.0
        for gain in gains:
            earned = earn(earned, gain)
        assert abs(earned) <= PACE * MOST_GAIN / (1 - KEPT) + 1e-9

    def test_gain_is_what_the_adapter_foresaw_better_than_the_evidence(self) -> None:
        sources = {"base": spoken(1), "knn": spoken(2), "prior": spoken(3), "adapter": spoken(4)}
        expected = spoken(4)[2] - DEFAULT.alone.scores(sources, 50)[2]
        assert DEFAULT.gain(sources, 50, 2) == pytest.approx(expected)


class TestFusion:
    said = {"base": spoken(1), "knn": spoken(2), "prior": spoken(3), "adapter": spoken(4)}

    @pytest.mark.parametrize("events", [0, 5, 900])
    def test_an_adapter_has_no_more_than_its_share_where_evidence_is_silent(self, events: int) -> None:
        wrong = {"base": self.said["base"], "adapter": np.log([1e-9, 1 - 3e-9, 1e-9, 1e-9]), "knn": None}
        alone = DEFAULT.scores({**wrong, "adapter": None}, events)
        lost = alone - DEFAULT.scores(wrong, events)
        assert 0 < lost.max() <= np.log(2) + 1e-9
        hurt = alone - DEFAULT.scores(wrong, events, earned=-10.0)
        assert hurt.max() < 1e-3

    def test_without_an_adapter_the_stack_that_knows_none_answers(self) -> None:
        without = {**self.said, "adapter": None}
        np.testing.assert_allclose(DEFAULT.scores(without, events=50), DEFAULT.alone.scores(without, events=50))

    def test_who_is_present_and_has_a_coefficient_is_heard(self) -> None:
        assert DEFAULT.heard(self.said) == {"base", "knn", "prior", "adapter"}
        assert DEFAULT.heard({**self.said, "adapter": None, "prior": None}) == {"base", "knn"}
        fusion = Fusion(Stack({"base": (1.0, 0.0)}), Stack({"adapter": (1.0, 0.0), "knn": (0.5, 0.0)}), DEFAULT.share)
        assert fusion.heard(self.said) == {"base", "adapter", "knn"}
        assert fusion.heard({**self.said, "adapter": None}) == {"base"}

    @given(st.integers(0, 10**6), st.floats(-8, 8))
    def test_an_adapter_costs_no_event_more_than_its_share_allows(self, events: int, earned: float) -> None:
        wrong = {**self.said, "adapter": np.log([1e-9, 1 - 3e-9, 1e-9, 1e-9])}
        lost = DEFAULT.alone.scores(wrong, events) - DEFAULT.scores(wrong, events, earned)
        assert lost.max() <= -np.log(DEFAULT.weights(events, earned)[0]) + 1e-9
        assert lost.max() <= np.log(2) + 1e-9

    def test_an_adapter_has_the_more_to_say_the_longer_the_history(self) -> None:
        shares = [float(DEFAULT.weights(events)[1]) for events in (0, 16, 64, 256, 10**9)]
        assert shares == sorted(shares)
        assert shares[0] < 0.02
        assert shares[-1] == 0.5

    @settings(deadline=None)
    @given(st.integers(0, 10**6), st.integers(0, 5000), st.booleans(), st.booleans(), st.booleans())
    def test_any_answer_is_normalised(self, seed: int, events: int, knn: bool, prior: bool, adapter: bool) -> None:
        present = {"base": True, "knn": knn, "prior": prior, "adapter": adapter}
        sources = {name: spoken(seed + k) if on else None for k, (name, on) in enumerate(present.items())}
        assert np.exp(DEFAULT.scores(sources, events)).sum() == pytest.approx(1)

    def test_a_file_says_the_same(self, tmp_path: Path) -> None:
        fusion = Fusion(Stack({"base": (0.3, 0.1)}), Stack({"base": (0.1, 0.0), "adapter": (0.9, -0.1)}), (-2.0, 1.5))
        fusion.save(tmp_path / "fusion.json")
        assert load_fusion(tmp_path / "fusion.json") == fusion

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{", "cannot read"),
            ("[]", "expected an object"),
            ('{"share": 0.5, "alone": {}, "beside": {}}', "share: expected two finite numbers"),
            ('{"share": [1, true], "alone": {}, "beside": {}}', "share: expected two finite numbers"),
            ('{"share": [0, 1], "alone": {}, "beside": {"adapter": [1, 0]}}', "alone: expected coefficients"),
            ('{"share": [0, 1], "alone": {"base": [1, 0]}, "beside": {"base": [1, 0]}}', "beside: expected"),
            ('{"share": [0, 1], "alone": {"base": [1, 0], "adapter": [1, 0]}, "beside": {}}', "alone: expected"),
            ('{"share": [0, 1], "alone": {"base": [1]}, "beside": {}}', "alone.base: expected two finite numbers"),
            ('{"share": [0, 1], "alone": {"base": [1, NaN]}, "beside": {}}', "alone.base: expected two finite"),
        ],
    )
    def test_a_file_that_does_not_fit_is_named_with_the_field(self, tmp_path: Path, text: str, words: str) -> None:
        (tmp_path / "fusion.json").write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_fusion(tmp_path / "fusion.json")

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot read"):
            load_fusion(tmp_path / "fusion.json")


@settings(deadline=None)
@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 5000), st.floats(-8, 8)), min_size=1, max_size=9))
def test_items_are_answered_alike_at_once_and_one_by_one(seed: int, users: list[tuple[int, float]]) -> None:
    said = {name: np.stack([spoken(seed + 10 * k + i) for k in range(len(users))]) for i, name in enumerate(NAMES)}
    events, earned = (np.array(column) for column in zip(*users, strict=True))
    for silent in (None, "knn", "adapter"):
        every = {**said, silent: None} if silent else said
        each = [
            DEFAULT.scores({n: None if s is None else s[at] for n, s in every.items()}, *user)
            for at, user in enumerate(users)
        ]
        np.testing.assert_array_equal(DEFAULT.scores(every, events, earned), each)


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


def test_recency_prior_is_smoothed_and_normalised() -> None:
    prior = recency_prior({"a": 3.0, "elsewhere": 9.0}, ("a", "b"))
    assert prior is not None
    np.testing.assert_allclose(prior, [3.5 / 4, 0.5 / 4])


@pytest.mark.parametrize("counts", [{}, {"elsewhere": 2.0}, {"a": float("nan")}, {"a": -1.0}])
def test_recency_prior_is_absent_where_it_knows_none_of_the_choices(counts: dict[str, float]) -> None:
    assert recency_prior(counts, ("a", "b")) is None


def test_priors_of_many_users_are_each_ones_own() -> None:
    counts: list[dict[str, float]] = [{"a": 3.0}, {}, {"b": 1.0, "c": 2.0}, {"elsewhere": 1.0}]
    found = recency_priors(counts, ("a", "b", "c"))
    for own, row in zip(counts, found, strict=True):
        alone = recency_prior(own, ("a", "b", "c"))
        assert np.isnan(row).all() if alone is None else (row == alone).all()
    assert [recency_prior(own, ("a", "b", "c")) is None for own in counts] == [False, True, False, True]


def test_choice_takes_the_likeliest() -> None:
    assert pick("choice", ("a", "b", "c"), np.array([0.2, 0.5, 0.3])) == "b"


def test_rating_takes_the_median_in_numeric_order() -> None:
    probabilities = np.array([0.4, 0.0, 0.25, 0.35])
    assert pick("rating", ("10", "9", "2", "3"), probabilities) == "3"
    assert pick("choice", ("10", "9", "2", "3"), probabilities) == "10"


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=5, max_size=5))
def test_the_median_minimises_the_expected_absolute_error(raw: list[float]) -> None:
    probabilities = np.array(raw) / sum(raw)
    ratings = np.arange(1, 6)
    costs = np.abs(ratings[:, None] - ratings[None, :]) @ probabilities
    picked = int(pick("rating", ("1", "2", "3", "4", "5"), probabilities))
    assert costs[picked - 1] == pytest.approx(costs.min())


def test_the_share_of_a_mixture_is_found_by_length() -> None:
    chance = np.random.default_rng(6)
    truths, events = [], []
    for k in range(6000):
        both = np.stack([spoken(2 * k), spoken(2 * k + 1)])
        events.append(int(chance.integers(1000)))
        share = 0.2 if events[-1] < 500 else 0.6
        truths.append(both[:, chance.choice(4, p=np.exp(both[int(chance.random() < share)]))])
    found = Fusion(DEFAULT.alone, DEFAULT.beside, mixture_share(np.array(truths), events))
    assert float(found.weights(100)[1]) < 0.25
    assert float(found.weights(900)[1]) > 0.4
    assert mixture_share(np.array(truths[:1]), events[:1]) == pytest.approx(DEFAULT.share, abs=0.5)
