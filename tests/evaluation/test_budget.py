"""How long a run will take: measured rates, phases that grow with what is asked for, and what is left."""

from dataclasses import replace

import pytest

from evaluation.budget import Options, Progress, Rates, measured, phases, size
from evaluation.experiment import run
from evaluation.prompting import Asked
from evaluation.splits import Fold, Person
from evaluation.training import Recipe
from oppu.settings import Settings
from tests.evaluation.test_experiment import TASKS, everybody, planned, settings
from tests.evaluation.world import EMBEDDER, item

__all__ = ["settings"]  # a fixture

RATES = Rates(adapt=3.0, train=2.0, score=1.0)
OPTIONS = Options(Recipe(base_epochs=2), 64, offline=True, all_arms=False, methods=False, analyses=False)


def fold(train: int = 8, adapt: int = 6) -> Fold:
    own = Person("u", tuple(item("u", n) for n in range(train + 2)), tuple(range(train + 2)), train)
    return Fold("all", tuple(item("a", n) for n in range(adapt)), (), (own,))


def test_a_prompt_is_never_taken_for_longer_than_it_may_be() -> None:
    one = item("u", 0, text="x" * 40, output="a")
    assert size(one, 256) == 10 + 6
    assert size(one, 256, Asked(2)) == 3 * 16 and size(one, 40, Asked(2)) == 40
    assert size(one, 256, Asked(0, profile=True)) == 16 + 24


def test_adapting_counts_every_number_of_epochs_as_a_run() -> None:
    one, two = (phases(fold(), RATES, replace(OPTIONS, recipe=Recipe(base_epochs=n)))["base-plain"] for n in (1, 2))
    assert two == 3 * one  # 1, and 1 + 2


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"all_arms": True}, {"oppu-2", "oppu-4", "oppu-unadapted", "base-unadapted"}),
        ({"methods": True}, {"methods"}),
        ({"analyses": True}, {"analyses", "oppu-unadapted", "base-unadapted"}),
    ],
)
def test_what_is_asked_for_costs(more: dict[str, bool], wanted: set[str]) -> None:
    least, most = phases(fold(), RATES, OPTIONS), phases(fold(), RATES, replace(OPTIONS, **more))  # type: ignore[arg-type]
    assert wanted <= set(most) - set(least) and all(most[name] > 0 for name in wanted)
    assert phases(fold(train=16), RATES, OPTIONS)["oppu"] > 1.5 * least["oppu"]


def test_what_is_left_follows_the_pace() -> None:
    now, told = [0.0], list[str]()
    progress = Progress(told.append, lambda: now[0])
    progress.begin({"a": 100.0, "b": 50.0, "c": 450.0})
    assert told == ["time budget, measured: at most 10 minutes"]
    now[0] = 200.0
    progress.done("a")
    assert progress.remaining() == 1000.0 and told[-1] == "a: done; about 17 minutes left"
    progress.done("b")  # in no time: it was read from its file, and says nothing
    assert progress.remaining() == 900.0
    progress.done("nothing of the kind")
    progress.done("b")
    assert progress.remaining() == 900.0
    progress.done("c")
    assert len(told) == 3 and progress.remaining() == 0


@pytest.mark.slow
def test_rates_are_measured_on_the_base(settings: Settings) -> None:
    found = measured(everybody()[:40], settings, TASKS)
    assert min(found.adapt, found.train, found.score) > 0
    assert found.train > found.score


@pytest.mark.slow
def test_every_phase_of_a_run_was_foreseen_and_is_done(settings: Settings, tmp_path: object) -> None:
    told: list[str] = []
    progress = Progress(told.append)
    plan = replace(planned(tmp_path), analyses=True, methods=True, progress=progress)  # type: ignore[arg-type]
    run(plan, everybody(), settings, TASKS, EMBEDDER)
    assert told[0].startswith("time budget, measured: at most")
    assert progress.remaining() == 0
