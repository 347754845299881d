"""What a run is made of: sister tasks from one file or two, notes, and a work folder that keeps to its inputs."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation import inputs
from evaluation.duplicates import normal
from evaluation.material import Files, Material, gather
from evaluation.roles import Bounds
from evaluation.splits import make_folds
from oppu.errors import ConfigError
from oppu.settings import Settings
from oppu.tasks import load_tasks
from tests.evaluation.layouts import history
from tests.evaluation.makers import Row, lines, rows
from tests.evaluation.world import stacked

TASKS = load_tasks()
BOUNDS = Bounds(target=20, calibrate=6, folds_below=2, enough_items=1, enough_judges=1)
COUNTS = {f"t{n}": 24 for n in range(3)} | {f"c{n}": 8 for n in range(5)}


def both(**lacking: set[int]) -> dict[str, list[Row]]:
    """The same articles with headline and category; ``lacking`` names a task's events of t0 that are not there."""
    headlines = rows("news_headline", COUNTS)
    sisters = [
        r | {"task": "news_categorize", "output": "crime" if n % 2 else "travel"} for n, r in enumerate(headlines)
    ]
    made = {"news_headline": headlines, "news_categorize": sisters}
    gone = {task: {f"t0-{at}" for at in numbers} for task, numbers in lacking.items()}
    return {task: [r for r in own if r["event_id"] not in gone.get(task, ())] for task, own in made.items()}


def material(files: Files, task: str, **bounds: Any) -> Material:
    return gather(files, TASKS[task], replace(BOUNDS, **bounds), final=True)


@pytest.mark.parametrize("one_file", [True, False])
def test_an_article_lies_on_one_side_in_both_tasks_from_one_file_or_two(tmp_path: Path, one_file: bool) -> None:
    made = both(news_categorize={20, 21, 22})
    if one_file:
        path = lines(tmp_path / "both.jsonl", [row for own in made.values() for row in own])
        files = {task: Files(path) for task in made}
    else:
        paths = {task: lines(tmp_path / f"{task}.jsonl", own) for task, own in made.items()}
        files = {task: Files(paths[task], sisters=tuple(p for t, p in paths.items() if t != task)) for task in made}
    tested, used = {}, {}
    for task in made:
        found = material(files[task], task)
        assert len(found.notes["sister_tasks"]) == 1  # type: ignore[arg-type]
        [fold] = make_folds(found.items, stacked(found.items), found.bounds, final=True, sisters=found.sisters)
        tested[task] = {normal(i.input) for p in fold.target for i in p.test}
        learnt = [*fold.adapt, *(i for p in (*fold.calibrate, *fold.target) for i in p.items[: p.cut])]
        used[task] = {normal(i.input) for i in learnt}
    assert tested["news_headline"] >= tested["news_categorize"]
    assert not (tested["news_headline"] & used["news_categorize"]) | (tested["news_categorize"] & used["news_headline"])


def test_other_tasks_without_a_common_input_are_no_sisters(tmp_path: Path) -> None:
    other = rows("news_categorize", COUNTS, seed=1)
    found = material(Files(lines(tmp_path / "e.jsonl", [*both()["news_headline"], *other])), "news_headline")
    assert found.sisters == () and found.notes["sister_tasks"] == []


def test_a_population_file_may_share_ids_and_users(tmp_path: Path) -> None:
    events = lines(tmp_path / "e.jsonl", rows("news_headline", {"t0": 24}))
    again = [row | {"user_id": "p0"} for row in rows("news_headline", {"t0": 9}, seed=2)]
    others = lines(tmp_path / "p.jsonl", [*again, *rows("news_headline", {"t0": 24})])
    found = material(Files(events, population=others), "news_headline")
    assert found.bounds.population == {"p0"} and len(found.items) == 33
    assert len({i.item_id for i in found.items}) == 33


def test_no_events_of_the_task_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected some item of task citation"):
        material(Files(lines(tmp_path / "e.jsonl", both()["news_headline"])), "citation")


def test_the_tasks_that_are_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task citation; the file has some of news_headline"):
        material(Files(lines(tmp_path / "e.jsonl", rows("news_headline", {"t0": 3}))), "citation")


def test_an_instruction_that_all_inputs_begin_with_is_left_out(tmp_path: Path) -> None:
    asked = "Which tag does this movie relate to? Just answer with the tag. description:"
    plain = rows("movie_tagging", COUNTS)
    given = [row | {"input": f"{asked} {row['input']}"} for row in plain]
    one, other = (
        material(Files(lines(tmp_path / name, own)), "movie_tagging") for name, own in (("a", plain), ("b", given))
    )
    assert one.items == other.items
    assert (other.notes.pop("instruction_left_out"), other.notes) == (asked, one.notes)
    short = [row | {"input": f"This film is about {row['input']}"} for row in plain]
    kept = material(Files(lines(tmp_path / "c", short)), "movie_tagging")
    assert [i.input for i in kept.items] == [f"This film is about {i.input}" for i in one.items]


@pytest.mark.parametrize("count", [24, 15])
def test_tasks_that_share_their_texts_keep_what_these_begin_with(tmp_path: Path, count: int) -> None:
    made = both(news_headline=set(range(count, 24)))
    story = "The following text is a news story of ours: "
    every = [row | {"input": story + row["input"]} for own in made.values() for row in own]
    found = material(Files(lines(tmp_path / "e.jsonl", every)), "news_categorize")
    assert found.notes["sister_tasks"] == ["news_headline"] and "instruction_left_out" not in found.notes
    cues = {
        "news_categorize": "Name the category of this text: ",
        "news_headline": "Write a headline for this one text: ",
    }
    asked = [row | {"input": cues[task] + row["input"]} for task, own in made.items() for row in own]
    found = material(Files(lines(tmp_path / "a.jsonl", asked)), "news_categorize")
    assert found.notes["sister_tasks"] == ["news_headline"]
    assert found.notes["instruction_left_out"] == "Name the category of this text:"


@pytest.mark.parametrize("output", ["A", "the cited title"])
def test_where_no_output_is_a_place_it_says_what_is_expected(tmp_path: Path, output: str) -> None:
    events = [row | {"input": "a paper on rivers", "output": output} for row in rows("citation", COUNTS)]
    with pytest.raises(ConfigError, match=r"output: expected \[1\] or \[2\], the place .* none of \d+ items has one"):
        material(Files(lines(tmp_path / "e.jsonl", events)), "citation")


def test_the_bound_on_targets_counts_what_fits_the_task(tmp_path: Path) -> None:
    events = rows("product_rating", {f"t{n}": 50 for n in range(12)})
    events = [row | {"output": "N/A"} if row["event_id"].endswith("-3") else row for row in events]
    found = gather(
        Files(lines(tmp_path / "e.jsonl", events)), TASKS["product_rating"], Bounds(strict=False), final=True
    )
    assert found.notes["items_left_out"] == 12 and found.notes["min_target"] == 49
    assert make_folds(found.items, stacked(found.items), found.bounds, final=True)


class TestQueriesWithoutOutputs:
    def users(self, path: Path, known: int) -> Files:
        chance = random.Random(0)
        made = [
            {
                "user_id": f"u{n}",
                "profile": history("product_rating", chance, 24),
                "query": [{"id": f"q{n}", "input": f"review: {n}"} | ({"gold": "4"} if n < known else {})],
            }
            for n in range(4)
        ]
        path.write_text(json.dumps(made))
        return Files(path)

    def test_none_has_one_and_the_final_run_says_so(self, tmp_path: Path) -> None:
        files = self.users(tmp_path / "u.json", 0)
        with pytest.raises(ConfigError, match=r"none of its 4 queries has an output \(--outputs\)"):
            material(files, "product_rating")
        assert gather(files, TASKS["product_rating"], BOUNDS, final=False).items

    def test_who_has_none_is_not_asked_but_may_adapt_the_base(self, tmp_path: Path) -> None:
        found = material(self.users(tmp_path / "u.json", 3), "product_rating", folds_below=12)
        made = make_folds(found.items, stacked(found.items), found.bounds, final=True)
        assert {p.user_id for fold in made for p in fold.target} == {"u0", "u1", "u2"}
        assert all(i.query for fold in made for p in fold.target for i in p.test)
        assert all("u3" in {i.user_id for i in fold.adapt} for fold in made)


def test_a_work_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out: cannot write in the folder"), inputs.alone(tmp_path / "file" / "run"):
        raise AssertionError("it cannot be there")


def test_a_folder_keeps_to_what_it_began_with(tmp_path: Path) -> None:
    found = material(Files(lines(tmp_path / "e.jsonl", both()["news_headline"])), "news_headline")
    settings = Settings.load()

    def keep(items: Any = found.items, bounds: Bounds = BOUNDS, model: dict[str, Any] | None = None) -> None:
        own = settings.model_copy(update={"model": settings.model.model_copy(update=model or {})})
        inputs.keep(tmp_path, items, bounds, own)

    for _ in range(2):
        keep()
    keep(model={"threads": 7, "device": "cuda"})
    for change, words in (
        ({"items": [replace(found.items[0], output="x"), *found.items[1:]]}, "other events"),
        ({"bounds": replace(BOUNDS, target=21)}, "other bounds"),
        ({"bounds": replace(BOUNDS, population=frozenset("a"))}, "other bounds"),
        ({"model": {"lora_rank": 3}}, "other model and retriever settings"),
    ):
        with pytest.raises(ConfigError, match=words):
            keep(**change)


def test_a_work_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with inputs.alone(folder), pytest.raises(ConfigError, match="--out: another run is at work"), inputs.alone(folder):
        raise AssertionError("both are at work")
    with inputs.alone(folder):  # the first is over
        pass
