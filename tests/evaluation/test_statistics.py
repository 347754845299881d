"""Intervals and tests against what is known in closed form or by brute force."""

import numpy as np
import pytest

from evaluation.statistics import BY_CLUSTERS, BY_USERS, contrast, holm, max_t, mean_interval, sign_flip, units


def test_sign_flip_is_exact_for_few_users() -> None:
    assert sign_flip(np.ones(5)) == pytest.approx(2 / 32)
    assert sign_flip(np.array([1.0, -1.0])) == 1.0


def test_drawn_and_exact_p_agree() -> None:
    chance = np.random.default_rng(1)
    values = chance.normal(0.4, 1, size=20)
    more = np.append(values, 1e-9)  # one beyond what is counted exactly
    assert sign_flip(more) == pytest.approx(sign_flip(values), abs=0.01)


def test_p_values_of_no_effect_are_uniform() -> None:
    chance = np.random.default_rng(2)
    found = np.array([sign_flip(chance.normal(size=10)) for _ in range(400)])
    assert (found < 0.05).mean() == pytest.approx(0.05, abs=0.03)


def test_a_contrast_counts_users_and_weighs_queries() -> None:
    made = contrast([np.array([1.0, 1.0, 1.0]), np.array([-1.0]), np.array([0.0, 0.0])], [0, 1, 2])
    assert (made.wins, made.ties, made.losses) == (1, 1, 1)
    assert made.difference == pytest.approx(2 / 6)
    assert made.user_difference == pytest.approx(0)
    assert made.ci is not None and made.ci[0] <= made.difference <= made.ci[1]
    assert made.clusters == 3 and made.without_top is None


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    chance, hits = np.random.default_rng(3), 0
    for trial in range(100):
        users = [chance.normal(0.2 + chance.normal(0, 0.3), 1, size=10) for _ in range(40)]
        found = mean_interval(users, range(40), seed=trial)
        assert found is not None
        low, high = found
        hits += low <= 0.2 <= high
    assert hits >= 88


def test_users_of_one_cluster_widen_the_interval() -> None:
    users = [np.full(5, float(k % 2)) for k in range(20)]
    apart = contrast(users, range(20))
    together = contrast(users, [k % 4 for k in range(20)])
    assert apart.ci is not None and together.ci is not None
    assert together.ci[1] - together.ci[0] > apart.ci[1] - apart.ci[0]
    assert together.detectable > apart.detectable


def test_few_clusters_have_no_interval_and_nothing_detectable() -> None:
    users = [np.array([0.1, 0.2, 0.3]), np.array([0.2, 0.1])]
    for clusters in ([0, 0], [0, 1]):
        made = contrast(users, clusters)
        assert made.ci is None and made.user_ci is None and np.isnan(made.detectable)
        assert mean_interval(users, clusters) is None


def test_a_difference_without_the_users_who_carry_it() -> None:
    made = contrast([np.array([v]) for v in (5.0, 4.0, 3.0, 0.5, -0.5, 0.3)], range(6))
    assert made.difference > 2 and made.without_top == pytest.approx(0.1)
    less = contrast([np.array([-v]) for v in (5.0, 4.0, 3.0, 0.5, -0.5, 0.3)], range(6))
    assert less.without_top == pytest.approx(-0.1)


def test_the_detectable_effect_is_the_one_found_four_times_in_five() -> None:
    chance = np.random.default_rng(4)
    samples = chance.normal(0.0, 0.1, size=(2000, 51))
    effect = np.mean([contrast([v[None] for v in row], range(51)).detectable for row in samples[:5]])
    found = np.abs(samples.mean(axis=1) + effect) > 1.96 * samples.std(axis=1, ddof=1) / np.sqrt(51)
    assert found.mean() == pytest.approx(0.8, abs=0.08)


def test_holm_orders_and_never_decreases() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.9]) == [1.0, 1.0]


def test_users_are_resampled_where_hardly_any_stand_apart() -> None:
    for clusters, wanted in (
        ([0] * 24, BY_USERS),
        ([0] * 5, BY_USERS),
        ([0] * 20 + [1, 2, 3], BY_USERS),  # four clusters
        ([0] * 20 + [1, 2, 3, 4], BY_USERS),  # five of 24 users
        ([0] * 4, BY_CLUSTERS),  # too few users to make much of either
        ([0] * 3 + [1, 2, 3, 4], BY_CLUSTERS),
        (list(range(9)), BY_USERS),  # nobody shares anything
    ):
        own, name = units(clusters)
        assert name == wanted
        assert own == (list(range(len(clusters))) if wanted == BY_USERS else clusters)


def test_where_all_share_items_there_is_an_interval_all_the_same_and_p_flips_users() -> None:
    users = [np.full(3, 0.5 + 0.1 * k) for k in range(12)]
    apart, together = contrast(users, range(12)), contrast(users, [k // 2 for k in range(12)])
    assert apart.p == together.p == pytest.approx(2 / 2**12)
    assert contrast(users, [0] * 12).ci is None
    shared = contrast(users, units([0] * 12)[0])
    assert shared.ci is not None and shared.detectable > 0 and shared.p == apart.p


class TestMaxT:
    def drawn(self, seed: int, contrasts: int, shift: float = 0.0) -> dict[str, list[np.ndarray]]:
        """Forty users of ten queries; the first contrast loses ``shift`` of a standard deviation."""
        chance = np.random.default_rng(seed)
        return {
            f"c{k}": [chance.normal(-shift if k == 0 else 0.0, size=10) for _ in range(40)] for k in range(contrasts)
        }

    def test_a_clear_loss_is_one_among_many_and_the_others_are_none(self) -> None:
        found = max_t(self.drawn(0, 25, shift=0.4), range(40))
        assert found.pop("c0") < 0.001 and min(found.values()) > 0.05

    def test_the_worst_of_many_is_not_a_loss_for_being_the_worst(self) -> None:
        least = [min(max_t(self.drawn(seed, 25), range(40)).values()) for seed in range(1, 41)]
        alone = [min(max_t({n: d}, range(40))[n] for n, d in self.drawn(seed, 25).items()) for seed in range(1, 21)]
        assert np.mean(np.array(least) < 0.05) <= 0.15 and np.mean(np.array(alone) < 0.05) >= 0.5

    def test_gains_and_ties_are_no_losses(self) -> None:
        found = max_t({"gain": [np.ones(3)] * 5, "tie": [np.zeros(3)] * 5}, range(5))
        assert found["gain"] == 1.0 and found["tie"] > 0.05
        assert max_t({"two users": [-np.ones(3)] * 2}, range(2)) == {}


def test_seeds_that_cancel_out_are_a_tie() -> None:
    rounded = np.array([0.1, 0.2, -0.3])
    assert rounded.sum() != 0
    found = contrast([rounded, np.ones(3), -np.ones(3)], range(3))
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)


def test_the_observed_pattern_is_one_of_those_at_least_as_large_whatever_the_unit() -> None:
    values = np.random.default_rng(5).normal(size=9)
    assert len({sign_flip(values * unit) for unit in (1.0, 1e4, 1e8)}) == 1
    assert sign_flip(np.array([0.1, 0.2, 0.3]) * 1e9) == 2 / 8


def test_what_is_no_number_is_no_evidence() -> None:
    for users in (3, 30):
        assert np.isnan(sign_flip(np.array([np.nan, *np.ones(users)])))
    found = holm([0.01, float("nan"), 0.02])
    assert found[0] == pytest.approx(0.03) and np.isnan(found[1]) and found[2] == pytest.approx(0.04)
