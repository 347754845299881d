"""The run of minutes: who is in it, and the command from a file of events to its page."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from evaluation.corpus import Item, by_user
from evaluation.quick import ADAPT_CHARACTERS, FEW_TARGETS, LEAST_ITEMS, MOST_ITEMS, OTHERS, TARGETS, shortened
from evaluation.splits import Bounds, make_folds
from oppu.cli import cli, compose
from oppu.settings import Settings
from tests.evaluation.test_experiment import settings
from tests.evaluation.world import EMBEDDER, people, stacked

__all__ = ["settings"]  # a fixture

MANY = {f"t{n}": 120 for n in range(14)} | {f"c{n}": 30 for n in range(20)} | {f"s{n}": 5 for n in range(40)}


def longer(items: list[Item], size: int) -> list[Item]:
    return [Item(i.item_id, i.user_id, i.task, i.day, i.input.ljust(size, "."), i.output, i.choices) for i in items]


def test_few_users_with_their_newest_items_in_their_roles() -> None:
    every = people(MANY)
    items, bounds = shortened(every, Bounds())
    own = by_user(items)
    assert sum(user[0] == "t" for user in own) == TARGETS and sum(user[0] == "c" for user in own) == OTHERS
    assert all(len(own[user]) == MOST_ITEMS for user in own if user[0] == "t")
    for user, kept in own.items():
        assert kept == [i for i in every if i.user_id == user][-len(kept) :]
    assert items == sorted(items, key=lambda i: i.day)
    [fold] = make_folds(items, stacked(items), bounds, final=False)  # as in the whole, though few
    assert {p.user_id for p in fold.target} == {user for user in own if user[0] == "t"}
    assert fold.calibrate and all(p.user_id[0] == "c" for p in fold.calibrate)
    assert shortened(every, Bounds()) == (items, bounds)


def test_long_texts_make_short_histories() -> None:
    items, _ = shortened(longer(people(MANY), 1_000), Bounds())
    own = by_user(items)
    assert {len(kept) for user, kept in own.items() if user[0] == "t"} == {LEAST_ITEMS}
    population = sum(len(i.input) for user, kept in own.items() if user[0] == "s" for i in kept)
    assert ADAPT_CHARACTERS <= population < ADAPT_CHARACTERS + 5_000


def test_few_targets_are_crossed_as_in_the_whole() -> None:
    items, bounds = shortened(people({f"t{n}": 60 for n in range(6)}), Bounds())
    folds = make_folds(items, stacked(items), bounds, final=False)
    assert len(folds) == FEW_TARGETS and all(len(fold.target) == 1 for fold in folds)


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
