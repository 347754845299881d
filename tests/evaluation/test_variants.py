"""Who judges, and what runs where all arms are asked for."""

from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.bases import Study, adapted, curve, unadapted
from evaluation.experiment import run
from evaluation.history import Past
from evaluation.splits import Fold, Person
from evaluation.training import Recipe
from evaluation.variants import FURTHER, UNADAPTED, judges
from oppu.lm.adaption import RECIPE
from oppu.settings import Settings
from tests.evaluation.test_experiment import RECIPE as SHORT
from tests.evaluation.test_experiment import TASKS, everybody, planned, settings
from tests.evaluation.world import EMBEDDER, item

__all__ = ["settings"]  # a fixture


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
    assert len(curve(made, "plain")) == SHORT.base_epochs and best.name == "2"  # nobody judges: the most epochs
    monkeypatch.setattr("evaluation.bases.OFFLINE", settings.model.base)
    folder = Path(unadapted(made))
    assert '"answers": false' in (folder / RECIPE).read_text()
