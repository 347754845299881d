"""A first look: small, on the sides where the whole fold has everything, from a file of events to its page."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from evaluation.corpus import Item
from evaluation.quick import ADAPT_CHARACTERS, LEAST_ITEMS, LONGEST, MOST_ITEMS, shortened
from evaluation.splits import Fold, Person
from oppu.cli import cli, compose
from oppu.settings import Settings
from tests.evaluation.test_experiment import settings
from tests.evaluation.world import EMBEDDER, item, people

__all__ = ["settings"]  # a fixture


def person(user: str, count: int, cut: int, text: str = "word") -> Person:
    items = tuple(item(user, at, text=f"{text} {at}") for at in range(count))
    return Person(user, items, tuple(range(count)), cut)


def cut(*target: Person, calibrate: tuple[Person, ...] = (), adapt: str = "x") -> Fold:
    learnt = tuple(item("a", at, text=adapt) for at in range(3000))
    return shortened(Fold("all", learnt, calibrate, target), 2)


def test_short_histories_stay_whole_and_the_first_users_are_kept() -> None:
    some = [person(f"t{n}", 50, 40) for n in range(4)]
    made = cut(*some, calibrate=tuple(some[::-1]))
    assert made.target == tuple(some[:2]) and made.calibrate == tuple(some[:1:-1])


def test_items_around_the_cut_are_kept_on_their_sides() -> None:
    whole = person("t", 1000, 800)
    [made] = cut(whole).target
    assert made.train == whole.train[-72:] and made.test == whole.test[:18]
    assert [whole.items[group] for group in made.groups] == list(made.items)
    [few] = cut(person("t", 300, 30)).target
    assert (few.cut, len(few.items)) == (30, MOST_ITEMS)
    [long] = cut(person("t", 1000, 990, text="long " * 1000)).target
    assert (len(long.items), len(long.test)) == (LEAST_ITEMS, 10)


def test_what_adapts_the_base_is_bounded_by_items_and_by_characters() -> None:
    assert len(cut(adapt="x").adapt) == 1500
    assert len(cut(adapt="x" * 499).adapt) == ADAPT_CHARACTERS // 500  # an answer of one character
    assert len(cut(adapt="x" * 10_000).adapt) == ADAPT_CHARACTERS // LONGEST  # prompts are cut, too


def test_a_texts_answer_counts_as_its_prompt_does() -> None:
    items = tuple(item("t", at, text="x" * 200, output="y" * 200) for at in range(1000))
    [made] = cut(Person("t", items, tuple(range(1000)), 800)).target
    assert len(made.items) == 60


@pytest.mark.slow
def test_the_command_goes_from_events_to_a_page(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "embedder", lambda _: EMBEDDER)
    rows = [event(i, "product_rating") for i in people({"u": 26, "v": 26, "w": 26})]
    rows += [event(i, "news_headline") for i in people({"u": 3}, task="other")]
    file = tmp_path / "events.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    env = {
        "OPPU_MODEL__BASE": settings.model.base,
        "OPPU_MODEL__MAX_TOKENS": "128",
        "OPPU_MODEL__LORA_RANK": "2",
        "OPPU_MODEL__THREADS": "1",
    }
    args = ["evaluate", "product_rating", "--events", str(file), "--out", str(tmp_path / "out"), "--quick"]
    done = CliRunner(env=env).invoke(cli, [*args, "--min-target", "10", "--min-calibrate", "5", "--analyses"])
    assert done.exception is None, done.output
    assert "time budget, measured: at most" in done.output and " left" in done.output
    result = json.loads((tmp_path / "out" / "product_rating.json").read_text())
    assert result["evidence"] is False and result["users"] == 3
    assert "not evidence" in (tmp_path / "out" / "product_rating.md").read_text()
    assert {row["users"] for row in result["analyses"]["one adapter for all tasks"]} == {1}
    assert (tmp_path / "out" / result["figures"]["Arms over queries, 95 %"]).exists()


def event(one: Item, task: str) -> dict[str, object]:
    rating = str(1 + ord(one.output) % 5) if task == "product_rating" else f"head {one.output}"
    return {
        "schema_version": 1,
        "event_id": one.item_id,
        "user_id": one.user_id,
        "task": task,
        "occurred_at": f"{one.day.isoformat()}T00:00:00Z",
        "input": one.input,
        "output": rating,
    }
