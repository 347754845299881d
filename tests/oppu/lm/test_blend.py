"""Caches against hand-computed distributions, and both forms of the mixture against each other."""

import numpy as np
import pytest

from oppu.lm.blend import CACHE_EXPERTS, EXPERTS, LONGEST_MATCH, Cache, Said, foreseen, mixed, shares

END = 9
TEXTS = [((1, 2, 3, END), 1.0), ((1, 2, 4, END), 3.0)]


def said(cache: Cache, written: tuple[int, ...]) -> dict[str, dict[int, float]]:
    return {s.expert: dict(zip(s.tokens.tolist(), s.probabilities.tolist(), strict=True)) for s in cache.after(written)}


def test_single_tokens_count_by_their_texts_weights() -> None:
    words = said(Cache("knn", TEXTS), ())["knn"]
    assert words == pytest.approx({1: 0.25, 2: 0.25, 3: 1 / 16, 4: 3 / 16, END: 0.25})


def test_what_follows_a_match() -> None:
    cache = Cache("knn", TEXTS)
    assert said(cache, (1, 2))["knn_next"] == pytest.approx({3: 0.25, 4: 0.75})
    assert said(cache, (1, 2, 4))["knn_next"] == {END: 1.0}
    assert said(cache, ())["knn_next"] == {1: 1.0}  # how the texts begin
    assert "knn_next" not in said(cache, (7,))
    assert "knn_next" not in said(cache, (END,))  # nothing follows an end: no text runs into the next one


def test_the_longest_match_decides() -> None:
    cache = Cache("prior", [((1, 2, 3, END), 1.0), ((5, 2, 4, END), 9.0)])
    assert said(cache, (1, 2))["prior_next"] == {3: 1.0}
    assert said(cache, (8, 2))["prior_next"] == pytest.approx({3: 0.1, 4: 0.9})
    matched = {s.expert: s.matched for s in cache.after((1, 2))}
    assert matched == {"prior": 0, "prior_next": 3}  # the beginning, 1 and 2


def test_a_match_is_looked_up_so_far_and_no_further() -> None:
    line = tuple(range(10, 20))
    found = {s.expert: s.matched for s in Cache("input", [(line, 1.0)]).after(line[:9])}
    assert found["input_next"] == LONGEST_MATCH


def test_an_empty_cache_is_silent() -> None:
    assert Cache("knn", []).after((1, 2)) == []


def test_every_distribution_sums_to_one() -> None:
    chance = np.random.default_rng(0)
    texts = [(tuple(chance.integers(0, 6, size=5).tolist()), float(chance.random() + 0.1)) for _ in range(20)]
    cache = Cache("knn", texts)
    for _ in range(50):
        found: list[Said] = cache.after(tuple(chance.integers(0, 6, size=3).tolist()))
        assert all(s.probabilities.sum() == pytest.approx(1) for s in found)


def test_shares_are_of_those_who_speak() -> None:
    weights = {"base": (0.0, 0.0), "knn": (np.log(3), 0.0), "knn_next": (0.0, np.log(2))}
    assert shares(weights, {"base": 0}) == {"base": 1.0}
    assert shares(weights, {"base": 0, "knn": 0, "input": 0}) == pytest.approx({"base": 0.25, "knn": 0.75})
    assert shares(weights, {"base": 0, "knn_next": 1})["knn_next"] == pytest.approx(1 / 2)
    assert shares(weights, {"base": 0, "knn_next": 3})["knn_next"] == pytest.approx(4 / 5)


def test_arrays_and_single_steps_mix_alike() -> None:
    chance = np.random.default_rng(1)
    weights = {name: (float(chance.normal()), float(chance.random())) for name in EXPERTS}
    wanted = (1, 2, 4, END)
    caches = [Cache("knn", TEXTS), Cache("input", [((2, 4, 7, END), 1.0)])]
    found, matched = foreseen(caches, wanted)
    models = chance.random((len(wanted), 2))
    models[1, 1] = np.nan  # no adapter there
    both = mixed(np.hstack([models, found]), np.hstack([np.zeros((4, 2), dtype=np.int64), matched]), weights)
    for at, token in enumerate(wanted):
        steps = [s for cache in caches for s in cache.after(wanted[:at])]
        speaking = {n: 0 for n, p in zip(EXPERTS, models[at], strict=False) if not np.isnan(p)}
        share = shares(weights, speaking | {s.expert: s.matched for s in steps})
        expected = sum(share[n] * models[at, EXPERTS.index(n)] for n in speaking)
        expected += sum(share[s.expert] * s.probabilities[s.tokens == token].sum() for s in steps)
        assert both[at] == pytest.approx(expected)
    silent = np.isnan(found[:, CACHE_EXPERTS.index("prior")])
    assert silent.all()
