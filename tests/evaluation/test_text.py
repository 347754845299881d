"""Texts' experts, with probabilities made up so that the best mixture is known; and the arms that need no model."""

from dataclasses import replace

import numpy as np
import pytest

from evaluation import text_report
from evaluation.arms import Table, right
from evaluation.history import Past
from evaluation.splits import Person
from evaluation.statistics import Contrast, block_interval, contrast
from evaluation.text import Foreseen, fit_each, fit_text_fusion, text_arms, text_fusion
from evaluation.writing import lengths, plain
from inference.blending import DEFAULT
from oppu.errors import ConfigError
from oppu.lm.blend import EXPERTS, mixed
from tests.evaluation.world import item

TOKENS = 4
Array = np.ndarray


def told(user: str = "u", count: int = 40, cut: int = 30, adapted: int = 16, **probabilities: float) -> Foreseen:
    """Experts who give every token the same probability; the last of an output's four tokens is not there."""
    items = tuple(
        item(user, at, text=f"the {at} input here", output=f"word{at} title {at}", task="write") for at in range(count)
    )
    texts = (("near title", 1.0), ("far title", 0.1))
    past = [
        Past(at, None, None, (), "", caches={"knn": texts, "prior": texts[::-1]} if at else {}) for at in range(count)
    ]
    said = np.full((count, TOKENS, len(EXPERTS)), np.nan)
    for name, p in probabilities.items():
        said[:, : TOKENS - 1, EXPERTS.index(name)] = p
    person = Person(user, items, tuple(range(count)), cut)
    scores = [np.log(said[..., EXPERTS.index(name)]) for name in ("base", "adapter")]
    table = Table(person, past, scores[0], scores[1], {"oppu": scores[1][cut:]}, adapted)
    return Foreseen(table, said, np.ones(said.shape, dtype=np.int64))


def test_a_better_adapter_earns_its_weight_and_a_worse_one_loses_it() -> None:
    for adapter, more in ((0.5, True), (0.001, False)):
        tables = [told(f"u{n}", base=0.1, adapter=adapter) for n in range(8)]
        fusion = fit_text_fusion(tables)
        arms = text_arms(tables, [fusion] * len(tables))
        loss = {
            name: -np.concatenate(
                [right(t.table.person.test, s, "text") for t, s in zip(tables, arms.held[name], strict=True)]
            ).mean()
            for name in arms.held
        }
        assert (loss["fused"] < loss["evidence"] - 0.5) == more
        assert loss["fused"] < loss["evidence"] + 0.05
        assert loss["evidence"] == pytest.approx(-np.log(0.1))


def test_every_expert_that_foresees_is_used() -> None:
    tables = [told(f"u{n}", base=0.1, adapter=0.1, prior_next=0.6) for n in range(8)]
    fusion = fit_text_fusion(tables)
    assert text_arms(tables, [fusion] * len(tables)).held["evidence"][0][0, 0] > np.log(0.5)


def test_an_adapter_is_silent_before_its_first_training() -> None:
    own = told(base=0.1, adapter=0.9)
    arms = text_arms([own], [DEFAULT])
    np.testing.assert_allclose(arms.stream["fused"][0][:16], arms.stream["evidence"][0][:16])
    assert (arms.stream["fused"][0][16:, :3] > arms.stream["evidence"][0][16:, :3]).all()


def test_the_arms_are_what_would_be_served() -> None:
    own = told(base=0.1, adapter=0.3, knn=0.2)
    arms = text_arms([own], [DEFAULT])
    weights = DEFAULT.weights(35, adapter=True)
    expected = np.log(mixed(own.said[35, :3], own.matched[35, :3], weights))
    np.testing.assert_allclose(arms.held["fused"][0][5][:3], expected)
    assert np.isnan(arms.held["fused"][0][5][3])
    assert {"none", "follow", "oppu", "evidence", "fused", "unweighed"} == set(arms.held)


def test_an_adapter_that_hurts_one_user_is_trusted_less_by_that_user_alone() -> None:
    good, bad = told("good", base=0.1, adapter=0.2), told("bad", base=0.1, adapter=0.02)
    arms = text_arms([good, bad], [DEFAULT] * 2)
    np.testing.assert_array_equal(arms.held["fused"][0], arms.held["unweighed"][0])
    fused, unweighed = (arms.stream[name][1][:, :3] for name in ("fused", "unweighed"))
    np.testing.assert_array_equal(fused[:18], unweighed[:18])  # a day has to end first, and one text may be noise
    assert (fused[18:] > unweighed[18:]).all()
    # with next to no weight left, as the mixture is with the base in the adapter's place
    assert fused[-1] == pytest.approx(np.log(0.1), abs=0.01)
    assert arms.trust[1] < 0.05 < 0.3 < arms.trust[0]


def test_nothing_to_fit_an_adapter_on_is_refused() -> None:
    with pytest.raises(ConfigError, match="calibration: expected some user"):
        fit_text_fusion([told(count=16, cut=12, adapted=16, base=0.1, adapter=0.1)])


def test_no_fit_uses_what_somebody_is_asked_about() -> None:
    tables = [told(f"u{n}", base=0.1, adapter=0.1, prior_next=0.6) for n in range(2)]
    held = tables[0].table.person.groups[30]
    twin = replace(tables[1].table.person, groups=(held, *range(100, 139)))
    tables[1] = replace(tables[1], table=replace(tables[1].table, person=twin))
    leaked = replace(tables[1], said=tables[1].said.copy())
    leaked.said[0, :, EXPERTS.index("prior_next")] = 1e-6
    assert text_fusion([tables[0], leaked]) == text_fusion(tables)
    assert text_fusion([leaked], frozenset()) != text_fusion([tables[1]], frozenset())
    assert fit_each(tables[:1], [leaked]) == fit_each(tables[:1], tables[1:])
    assert fit_each([*tables], [])[0] == fit_each([tables[0], leaked], [])[0]


def test_arms_without_a_model() -> None:
    tables = [told(base=0.1, adapter=0.1).table]
    limits = lengths(tables)
    assert (limits.lead, limits.most) == (3, 3)
    texts = plain(tables, limits.lead, 5)
    assert texts["lead"][0] == [f"the {at} input" for at in range(30, 35)]
    assert texts["nearest"][0] == ["near title"] * 5
    assert texts["frequent"][0][0].split()[0] == "title"


def written(tables: list[Table], fused: str) -> dict[str, list[list[str]]]:
    texts = plain(tables, 3, 5)
    evidence = [["x"] * 5 for _ in tables]
    return {**texts, "fused": [[fused.format(at) for at in range(30, 35)] for _ in tables], "evidence": evidence}


@pytest.mark.parametrize(("fused", "claimed"), [("word{0} title {0}", True), ("nothing", False)])
def test_a_rouge_claim_needs_to_beat_lead(fused: str, claimed: bool) -> None:
    tables = [told(f"u{n}", base=0.1, adapter=0.1).table for n in range(6)]
    tests = text_report.lead_contrasts(tables, [written(tables, fused)], range(6))
    assert ("fused" in text_report.claims(tests)) == claimed
    assert isinstance(tests["rouge_1 fused - evidence"], Contrast)


def test_the_page_says_where_no_claim_is_made() -> None:
    tables = [told(base=0.1, adapter=0.1).table]
    scores = text_report.written(tables, [written(tables, "x")])
    assert "no claim is made of ROUGE" in text_report.table(scores, [])
    page = text_report.table(scores, ["fused"])
    assert "no claim" not in page and "| fused | 0.000 | 0.000 | 0.00 | 0.00 | 0.00 |" in page
    assert text_report.table({"none": {"query_mean": 1.0}}, []) == ""


def test_shares_of_empty_repeated_and_copied() -> None:
    tables = [told(base=0.1, adapter=0.1).table]
    runs = [{"a": [["", "b b b b", "near title", "the 33 input here", "own words"]]}]
    found = text_report.written(tables, runs)["a"]
    assert (found["empty"], found["repeated"], found["copied"]) == (0.2, 0.2, 0.4)


def test_examples_show_the_largest_gains_and_losses() -> None:
    person = told(base=0.1, adapter=0.1).table.person
    merits = {"evidence": [np.zeros(10)], "fused": [np.array([0.5, -0.2, 0.0, 2.0, 0, 0, 0, 0, 0, 0])]}
    texts = {name: [[f"{name} {at}" for at in range(5)]] for name in ("evidence", "fused")}
    better, worse = text_report.examples([person], merits, texts, 2)
    assert "fused 3 | +2.00" in better[0] and "fused 0 | +0.50" in better[1]
    assert len(worse) == 1 and "evidence 1 | fused 1 | -0.20" in worse[0]


def test_blocks_widen_an_interval_of_what_comes_in_runs() -> None:
    runs = np.repeat(np.random.default_rng(0).normal(size=30), 10)
    wide, narrow = block_interval(runs), block_interval(np.random.default_rng(1).permutation(runs))
    assert wide is not None and narrow is not None
    assert wide[0] < runs.mean() < wide[1]
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])
    assert block_interval(runs[:7]) is None and block_interval(runs[:8]) is not None
    assert contrast([runs], [0]).difference == pytest.approx(runs.mean())
