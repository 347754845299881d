"""Who judges, and what runs where all arms are asked for."""

from dataclasses import replace
from math import nan
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from evaluation.bases import Study, adapted, curve, unadapted
from evaluation.experiment import run
from evaluation.history import Past
from evaluation.presets import PRESETS
from evaluation.splits import Fold, Person
from evaluation.training import Bench, Recipe
from evaluation.variants import FURTHER, UNADAPTED, judges, rated
from oppu.lm.full_training import RECIPE
from oppu.lm.model import TorchModel
from oppu.settings import Settings
from tests.evaluation.test_experiment import RECIPE as SHORT
from tests.evaluation.test_experiment import TASKS, everybody, planned, settings
from tests.evaluation.world import EMBEDDER, item

__all__ = ["settings"]  # a fixture


RATES = ("0.0003", "0.001", "0.003", "0.01")


def study(people: list[Person], folder: Path, own: Settings, recipe: Recipe = SHORT) -> Study:
    fold = Fold("all", tuple(item("a", n) for n in range(8)), tuple(people), ())
    return Study(fold, {}, own, TASKS, folder, recipe, 0, lambda _: None)


def calibrating(days: list[int]) -> Person:
    items = tuple(item("c", at, day=day) for at, day in enumerate(days))
    return Person("c", items, tuple(range(len(days))), len(days))


@pytest.mark.parametrize(
    ("days", "cut"),
    [(list(range(10)), 5), ([0, 1, 2, 3, 3, 3, 3, 4, 5, 6], 3), ([0] * 9 + [1], None), ([], None), ([1], None)],
)
def test_a_judges_later_half_begins_with_a_day(days: list[int], cut: int | None, tmp_path: Path) -> None:
    found = judges(study([calibrating(days)], tmp_path, Settings.load()))
    assert [p.cut for p in found] == ([] if cut is None else [cut])


def test_a_judges_items_are_bounded(tmp_path: Path) -> None:
    [found] = judges(study([calibrating(list(range(30)))], tmp_path, Settings.load(), Recipe(judge_items=8)))
    assert (len(found.items), len(found.groups), found.cut) == (8, 8, 4)


@pytest.mark.parametrize(
    ("losses", "best"), [((2.0, 1.0, 3.0, 3.5), 1e-3), ((2.0, 1.5, 1.0, 1.0), 3e-3), ((9.0, nan, nan, nan), 3e-4)]
)
def test_the_judges_choose_the_rate_that_loses_least(losses: tuple[float, ...], best: float, tmp_path: Path) -> None:
    asked = study([calibrating(list(range(10)))], tmp_path, Settings.load(), Recipe())
    for rate, loss in zip(RATES, losses, strict=True):
        with (tmp_path / f"rate-{rate}.npz").open("wb") as file:
            np.savez(file, **{"": np.array(loss)})  # type: ignore[arg-type]  # as a killed run has left them
    found, by_rate = rated(asked, Bench(asked.fold, cast(TorchModel, None), tmp_path, Recipe(), 0, print))
    assert found.recipe.learning_rate == pytest.approx(best) and found.recipe.rates == (1.0,)
    assert tuple(by_rate) == RATES


def test_one_rate_or_nobody_to_judge_leaves_the_recipes(tmp_path: Path) -> None:
    bench = Bench(study([], tmp_path, Settings.load()).fold, cast(TorchModel, None), tmp_path, Recipe(), 0, print)
    for people, recipe in (([], Recipe()), ([calibrating(list(range(10)))], PRESETS["oppu"].recipe)):
        asked = study(people, tmp_path, Settings.load(), recipe)
        assert rated(asked, bench) == (asked, {})


@pytest.mark.slow
def test_the_further_arms_run_where_all_are_asked_for(settings: Settings, tmp_path: Path) -> None:
    [outcome] = run(replace(planned(tmp_path), all_arms=True), everybody(), settings, TASKS, EMBEDDER)
    assert {*FURTHER, UNADAPTED} <= set(outcome.arms.held)
    assert set(FURTHER) <= set(outcome.chosen[0].merits)
    a, b = (outcome.arms.held[name][0] for name in ("none", UNADAPTED))
    assert a.shape == b.shape and (a != b).any()


@pytest.mark.slow
def test_a_foreign_base_is_taken_as_it_is_before_adaption_and_the_offline_one_reads_the_inputs(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Past(0, None, None, (), "")
    made = replace(study([], tmp_path, settings), pasts={"a": [nothing] * 8})
    assert unadapted(made) == settings.model.base
    best = adapted(made, "plain")
    assert curve(made, "plain") == [] and best.name == "2"  # nobody judges: the most epochs
    assert [path.name for path in best.parent.iterdir() if path.is_dir()] == ["2"]
    monkeypatch.setattr("evaluation.bases.OFFLINE", settings.model.base)
    folder = Path(unadapted(made))
    assert '"answers": false' in (folder / RECIPE).read_text()
