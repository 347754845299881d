"""Fusion of scores: normalised, blind to order, and deaf to what is absent."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from inference.combine import Evidence, Weights, combine, log_softmax, pick, recency_prior

Array = NDArray[np.float64]
WEIGHTS = Weights(adapter=0.5, knn=1.0, prior=1.0)


def _log_p(draw: st.DrawFn, size: int) -> Array:
    raw = draw(st.lists(st.floats(-20, 20), min_size=size, max_size=size))
    return log_softmax(np.array(raw, dtype=np.float64))


@st.composite
def evidence(draw: st.DrawFn) -> Evidence:
    size = draw(st.integers(2, 12))
    optional = [_log_p(draw, size) if draw(st.booleans()) else None for _ in range(3)]
    adapter, knn, prior = optional
    return Evidence(
        _log_p(draw, size),
        adapter,
        np.exp(knn) if knn is not None else None,
        np.exp(prior) if prior is not None else None,
    )


weights = st.builds(Weights, st.floats(0, 1), st.floats(0, 3), st.floats(0, 3))


def _permuted(parts: Evidence, order: Array) -> Evidence:
    def permute(values: Array | None) -> Array | None:
        return values[order] if values is not None else None

    return Evidence(parts.base[order], permute(parts.adapter), permute(parts.knn), permute(parts.prior))


@settings(deadline=None)
@given(evidence(), weights)
def test_is_normalised(parts: Evidence, given_weights: Weights) -> None:
    assert np.exp(combine(parts, given_weights)).sum() == pytest.approx(1.0)


@settings(deadline=None)
@given(evidence(), weights, st.randoms(use_true_random=False))
def test_permuting_the_choices_permutes_the_result(parts: Evidence, w: Weights, random: object) -> None:
    order = np.array(list(range(len(parts.base))))
    random.shuffle(order)  # type: ignore[attr-defined]
    np.testing.assert_allclose(combine(_permuted(parts, order), w), combine(parts, w)[order], atol=1e-9)


@settings(deadline=None)
@given(evidence())
def test_weight_zero_is_the_same_as_absent(parts: Evidence) -> None:
    without = Evidence(parts.base, parts.adapter)
    silent = combine(parts, Weights(adapter=0.3, knn=0.0, prior=0.0))
    np.testing.assert_allclose(silent, combine(without, WEIGHTS), atol=1e-12)


@settings(deadline=None)
@given(evidence())
def test_the_base_alone_changes_nothing(parts: Evidence) -> None:
    np.testing.assert_allclose(combine(Evidence(parts.base), WEIGHTS), parts.base, atol=1e-9)


def test_adapter_has_all_of_the_model_when_alone_and_its_share_beside_evidence() -> None:
    base, adapter = np.log([0.8, 0.2]), np.log([0.2, 0.8])
    alone = combine(Evidence(base, adapter), WEIGHTS)
    beside = combine(Evidence(base, adapter, knn=np.array([0.5, 0.5])), WEIGHTS)
    np.testing.assert_allclose(np.exp(alone), [0.2, 0.8])
    np.testing.assert_allclose(np.exp(beside), [0.5, 0.5])


def test_evidence_multiplies() -> None:
    parts = Evidence(np.log([0.5, 0.5]), knn=np.array([0.9, 0.1]), prior=np.array([0.25, 0.75]))
    np.testing.assert_allclose(np.exp(combine(parts, WEIGHTS)), [0.75, 0.25])


def test_impossible_choices_stay_impossible_without_nan() -> None:
    base, adapter = np.array([0.0, -np.inf]), np.array([-np.inf, 0.0])
    with np.errstate(all="raise"):
        result = combine(Evidence(base, adapter), WEIGHTS)
    np.testing.assert_array_equal(np.exp(result), [0.0, 1.0])


def test_a_source_without_mass_for_a_choice_does_not_make_infinities() -> None:
    result = combine(Evidence(np.log([0.5, 0.5]), knn=np.array([1.0, 0.0])), WEIGHTS)
    assert np.isfinite(result).all()


def test_recency_prior_is_smoothed_and_normalised() -> None:
    prior = recency_prior({"a": 3.0, "elsewhere": 9.0}, ("a", "b"), smoothing=1.0)
    assert prior is not None
    np.testing.assert_allclose(prior, [3.5 / 4, 0.5 / 4])


@pytest.mark.parametrize("counts", [{}, {"elsewhere": 2.0}, {"a": float("nan")}, {"a": -1.0}])
def test_recency_prior_is_absent_where_it_knows_none_of_the_choices(counts: dict[str, float]) -> None:
    assert recency_prior(counts, ("a", "b")) is None


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
