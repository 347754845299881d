"""The paper's analyses: what each learns or reads, on whom, and what may never be in it."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation import analyses
from evaluation.analyses import ADAPTER, ALL_TASKS, COST, FORMATS, PROMPT, SHIFT, UNADAPTED_BASE, WITHIN, Extra
from evaluation.analysis_tables import BETWEEN, FOLLOW, INCREMENTS_LESS_FULL, LENGTH, POLICY, RETRAINED
from evaluation.corpus import Item
from evaluation.experiment import Outcome, Plan, run
from evaluation.figures import draw
from evaluation.report import summarise, write
from evaluation.splits import Person
from oppu.embedder import HashEmbedder
from oppu.settings import Settings
from tests.evaluation.test_experiment import TASKS, everybody, planned, settings
from tests.evaluation.world import EMBEDDER, item, stacked, vectors

__all__ = ["settings"]  # a fixture


@pytest.fixture(scope="module")
def analysed(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, list[Outcome]]:
    sisters = [replace(i, choices=(), task="write", day=i.day - timedelta(days=1)) for i in everybody("write")]
    others = tuple(
        replace(i, item_id=f"{i.item_id}/w", input=f"other {i.item_id}") for i in sisters if i.user_id == "t0"
    )
    plan = replace(planned(tmp_path_factory.mktemp("run")), analyses=True, sisters=others)
    return plan, run(plan, everybody(), settings, TASKS, EMBEDDER)


def rows(analysed: tuple[Plan, list[Outcome]]) -> dict[str, Any]:
    plan, outcomes = analysed
    found: dict[str, Any] = summarise(plan, outcomes, "choice", "tiny", "oppu evaluate pick")["analyses"]
    return found


@pytest.mark.slow
def test_each_analysis_has_its_rows(analysed: tuple[Plan, list[Outcome]]) -> None:
    found = rows(analysed)
    names = {name: [row["row"] for row in own] for name, own in found.items()}
    assert names[WITHIN] == ["0", "10", "all"]
    assert set(names[FORMATS]) == {"pairs", "outputs only", "inputs only", "another user's", "nothing"}
    assert set(names[SHIFT]) == {"all", "least similar half", "random half"}
    assert names[UNADAPTED_BASE] == ["adapted", "not adapted"]
    assert set(names[ALL_TASKS]) == {"this task", "none", "other tasks only", "all tasks"}
    assert names[COST] == ["10"] and found[COST][0]["bytes"] > 0 and found[COST][0]["seconds"] > 0
    assert names[POLICY] == ["16 and more", "16 to 49"]
    assert names[BETWEEN] == ["16 to 49"] and names[LENGTH] == ["0 to 15", "16 to 49"]


@pytest.mark.slow
def test_rows_compare_the_same_users_and_queries(analysed: tuple[Plan, list[Outcome]]) -> None:
    found = rows(analysed)
    for name in (WITHIN, FORMATS, SHIFT, UNADAPTED_BASE):
        assert {(row["users"], row["queries"]) for row in found[name]} == {(3, 12)}, name
    assert {row["users"] for row in found[ALL_TASKS]} == {1}
    for row in found[SHIFT]:
        gap = row[ADAPTER]["mean"] - row[PROMPT]["mean"]
        assert row["adapter - prompt"]["mean"] == pytest.approx(gap)
    everything = {row["row"]: row for row in found[WITHIN]}["all"]["oppu"]["mean"]
    [outcome] = analysed[1]
    answers = np.concatenate(outcome.arms.held["oppu"]).argmax(axis=1)
    truth = [i.choices.index(i.output) for p in outcome.people for i in p.test]
    assert everything == pytest.approx(np.mean(answers == truth))


@pytest.mark.slow
def test_increments_stand_beside_full_training_on_the_same_events(analysed: tuple[Plan, list[Outcome]]) -> None:
    [outcome] = analysed[1]
    row = rows(analysed)[POLICY][0]
    later = [(t, at) for t in outcome.tables for at in range(16, len(t.person.items))]
    assert (row["users"], row["queries"]) == (len(outcome.tables), len(later))
    [part] = outcome.analysed
    for name, scores in (
        (FOLLOW, [t.follow[at] for t, at in later]),
        (RETRAINED, [part.retrained[t.person.user_id][at] for t, at in later]),
    ):
        truth = [t.person.items[at].choices.index(t.person.items[at].output) for t, at in later]
        assert row[name]["mean"] == pytest.approx(np.mean(np.stack(scores).argmax(axis=1) == truth)), name
    assert row[INCREMENTS_LESS_FULL]["mean"] == pytest.approx(row[FOLLOW]["mean"] - row[RETRAINED]["mean"])


@pytest.mark.slow
def test_page_and_figures(analysed: tuple[Plan, list[Outcome]], tmp_path: Path) -> None:
    plan, outcomes = analysed
    result = summarise(plan, outcomes, "choice", "tiny", "oppu evaluate pick")
    _, page = write(result, outcomes, "choice", tmp_path)
    text = page.read_text()
    for name in (WITHIN, FORMATS, SHIFT, UNADAPTED_BASE, ALL_TASKS, COST, BETWEEN, LENGTH, POLICY):
        assert f"## {name.capitalize()}" in text
    pictures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert pictures == ["pick-adaption.png", "pick-arms.png", "pick-length.png", "pick-within.png"]
    assert all(f"](figures/{name})" in text for name in pictures)
    assert all((tmp_path / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_without_a_plotting_library_there_are_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert draw({}, tmp_path, "pick") == {} and not list(tmp_path.iterdir())


def person(user: str = "u", count: int = 12, cut: int = 8) -> Person:
    return Person(user, tuple(item(user, at) for at in range(count)), tuple(range(count)), cut)


class TestSisters:
    def extra(self, *sisters: Item) -> Extra:
        return Extra(vectors(person().items), _Embedded(), sisters=sisters)

    def test_earlier_items_of_the_users_other_tasks_may_be_learnt(self) -> None:
        mine = item("u", 3, text="something else", task="write")
        found = analyses.sister_items([person()], self.extra(mine, item("w", 3, task="write")))
        assert found == {"u": [mine]}

    @pytest.mark.parametrize(
        "planted",
        [
            item("u", 8, text="something else", task="write"),  # of the day of the first query
            item("u", 3, text=person().test[2].input.upper(), task="write"),  # the article of a later query
            replace(item("u", 3, text=person().test[2].input, task="write"), input="rewritten"),  # nearly the same
        ],
    )
    def test_a_planted_leak_is_left_out(self, planted: Item) -> None:
        extra = Extra(vectors(person().items), _Embedded({"rewritten": person().test[2]}), sisters=(planted,))
        assert analyses.sister_items([person()], extra) == {}


class _Embedded(HashEmbedder):
    """An embedder by which some texts mean what an item says."""

    def __init__(self, same: dict[str, Item] | None = None) -> None:
        super().__init__()
        self.same = same or {}

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return stacked([self.same.get(text, item("x", 0, text=text)) for text in texts])


def test_another_users_items_in_the_prompt_are_earlier_than_the_query_and_never_held_back() -> None:
    other = person("v", 12, 8)
    assert [a for a, _ in analyses._irrelevant(item("u", 5), other).evidence] == [i.input for i in other.items[4:0:-1]]
    late = analyses._irrelevant(item("u", 30), other).evidence
    assert [a for a, _ in late] == [i.input for i in reversed(other.train[-4:])]
    assert analyses._irrelevant(item("u", 5), None).evidence == ()


def test_the_least_similar_half_is_far_from_the_queries(tmp_path: Path) -> None:
    near = [item("u", at, text=f"sun moon {at}") for at in (0, 2, 4, 6, 8, 9)]
    far = [item("u", at, text=f"tax law {at}") for at in (1, 3, 5, 7)]
    own = Person("u", tuple(sorted([*near, *far], key=lambda i: i.day)), tuple(range(10)), 8)
    rows = {i.item_id: np.array([1.0, 0.0] if i in near else [0.0, 1.0], dtype=np.float32) for i in own.items}

    class Run:
        people = (own,)
        extra = Extra(rows, _Embedded())
        study = type("Study", (), {"seed": 0})

    halves = analyses._halves(Run())  # type: ignore[arg-type]
    assert halves["least similar half"]["u"] == far
    assert len(halves["random half"]["u"]) == 4 and set(halves["random half"]["u"]) <= set(own.train)
    assert halves["all"]["u"] == list(own.train)
