"""``oppu evaluate`` on other people's data of every task, at the first attempt, on a tiny random base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluation.presets import PRESETS
from oppu.errors import ConfigError
from oppu.settings import Settings
from tests.evaluation.makers import MAKERS, citation_with_choices, lines, rows
from tests.oppu.lm.conftest import byte_tokenizer, tiny_model

pytestmark = [pytest.mark.slow]

COUNTS = {"t0": 24, "t1": 24} | {f"c{n}": 8 for n in range(4)}

Run = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("final", [(), ("--final",)])
@pytest.mark.parametrize("task", MAKERS)
def test_each_task_runs_untuned(evaluate: Run, tmp_path: Path, task: str, final: tuple[str, ...]) -> None:
    result = evaluate(task, lines(tmp_path / "e.jsonl", rows(task, COUNTS)), *final)
    assert result["users"] == 2 and result["queries"] == (10 if final else 8)
    assert {"none", "oppu", "retrieval-1", "profile", "follow"} <= result["arms"].keys()
    assert result["final"] is bool(final) and result["evidence"] is False
    assert result["data"]["queries_of_unknown_label"] == result["data"]["items_left_out"] == 0


def test_citations_with_choices_of_unequal_number(evaluate: Run, tmp_path: Path) -> None:
    result = evaluate("citation", lines(tmp_path / "e.jsonl", rows("citation", COUNTS, make=citation_with_choices)))
    assert result["data"]["labels_from"] == "record" and result["data"]["choices"] == [2, 4]
    assert {"fused", "evidence", "permuted", "majority", "recent"} <= result["arms"].keys()
    assert all(0 <= arm["query_mean"] <= 1 and arm["log_loss"] < 25 for arm in result["arms"].values())


def test_histories_without_outputs(evaluate: Run, tmp_path: Path) -> None:
    for task in ("citation", "tweet_paraphrase"):
        made = rows(task, COUNTS)
        last = {row["event_id"] for row in made if int(row["event_id"].split("-")[1]) >= COUNTS[row["user_id"]] - 6}
        bare = [row if row["event_id"] in last else row | {"output": ""} for row in made]
        result = evaluate(task, lines(tmp_path / f"{task}.jsonl", bare), "--final")
        assert result["queries"] == 10
        assert result["data"]["items_without_output"] == sum(row["output"] == "" for row in bare)


@pytest.mark.parametrize("users", [1, 2, 3])
@pytest.mark.parametrize("others", [0, 4])
def test_few_users(evaluate: Run, tmp_path: Path, users: int, others: int) -> None:
    counts = {f"user {n}/ü": 24 for n in range(users)} | {f"o{n}": 8 for n in range(others)}
    result = evaluate("news_categorize", lines(tmp_path / "e.jsonl", rows("news_categorize", counts)))
    assert result["users"] == users
    assert {"none", "oppu", "evidence", "fused"} <= result["arms"].keys()


def test_only_targets_and_many_are_cross_fitted(evaluate: Run, tmp_path: Path) -> None:
    counts = {f"t{n:02}": 20 for n in range(12)}
    result = evaluate("product_rating", lines(tmp_path / "e.jsonl", rows("product_rating", counts)))
    assert result["users"] == 8  # of three of the five folds


def test_too_few_events_say_which_bound_would_do(evaluate: Run, tmp_path: Path) -> None:
    events = lines(tmp_path / "e.jsonl", rows("movie_tagging", {"a": 12, "b": 9, "c": 7, "d": 3}))
    with pytest.raises(
        ConfigError, match=r"at least 50 items .*--min-target.* has 12: --min-target 9 would make 2 of 4"
    ):
        evaluate("movie_tagging", events, "--min-target", "50", bounds=())
    result = evaluate("movie_tagging", events, bounds=())
    assert result["users"] == 2 and result["data"]["min_target"] == 9
    with pytest.raises(ConfigError, match="at least 5 items"):
        evaluate("movie_tagging", lines(tmp_path / "few.jsonl", rows("movie_tagging", {"a": 4, "b": 3})), bounds=())


def test_a_lesser_result_does_not_replace_a_better_one(evaluate: Run, tmp_path: Path) -> None:
    events = lines(tmp_path / "e.jsonl", rows("movie_tagging", COUNTS))
    data = tmp_path / "out" / "movie_tagging.json"
    whole = evaluate("movie_tagging", events, "--final") | {"evidence": True}
    data.write_text(json.dumps(whole))
    evaluate("movie_tagging", events)
    assert json.loads(data.read_text()) == whole
    assert json.loads((tmp_path / "out" / "movie_tagging-quick.json").read_text())["final"] is False


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        ({"event_id": None}, "line 2: event_id: "),
        ({"occurred_at": "0001-01-01T00:00:00+05:00"}, "line 2: occurred_at: out of range"),
        ({"output": [7]}, "line 2: output: "),
    ],
)
def test_a_fault_of_a_line_is_named_without_what_stands_in_it(
    spoil: dict[str, object], words: str, evaluate: Run, tmp_path: Path
) -> None:
    made = rows("movie_tagging", COUNTS)
    made[1] = {name: value for name, value in (made[1] | spoil).items() if value is not None}
    with pytest.raises(ConfigError, match=words) as raised:
        evaluate("movie_tagging", lines(tmp_path / "e.jsonl", made))
    assert str(made[1]["input"]) not in str(raised.value) and "pydantic" not in str(raised.value)


def test_a_work_folder_takes_no_other_events(evaluate: Run, tmp_path: Path) -> None:
    evaluate("news_headline", lines(tmp_path / "e.jsonl", rows("news_headline", COUNTS)))
    other = lines(tmp_path / "f.jsonl", rows("news_headline", COUNTS, seed=1))
    with pytest.raises(ConfigError, match="--out: .* holds results of other events: name another folder"):
        evaluate("news_headline", other)
    with pytest.raises(ConfigError, match="results of other bounds"):
        evaluate("news_headline", tmp_path / "e.jsonl", bounds=("--min-target", "21", "--min-calibrate", "6"))


def test_labels_that_no_file_names(evaluate: Run, tmp_path: Path) -> None:
    """Labels come from what may be learnt; one that first occurs in a test part is no choice, and counts as wrong."""
    made = rows("movie_tagging", COUNTS)
    for row in made:
        row["output"] = {"comedy": "Noir", "action": "noir ", "classic": "Wuxia", "fantasy": "Heist"}[row["output"]]
    [late] = [row for row in made if row["event_id"] == "t0-23"]
    late["output"] = "giallo"
    result = evaluate("movie_tagging", lines(tmp_path / "e.jsonl", made), "--final")
    assert result["data"]["labels_from"] == "training events" and result["data"]["choices"] == [3, 3]
    assert result["data"]["queries_of_unknown_label"] == 1
    assert all(arm["query_mean"] <= 0.9 for arm in result["arms"].values())
    labels = tmp_path / "labels.txt"
    labels.write_text("noir\nheist\n\nwuxia\ngiallo\n")
    other = evaluate("movie_tagging", tmp_path / "e.jsonl", "--labels", str(labels))
    assert other["data"]["labels_from"] == "file" and other["data"]["choices"] == [4, 4]


def test_untidy_events(evaluate: Run, tmp_path: Path) -> None:
    """Repeats, clashing ids, spaces, capitals, odd scripts, one word, ten thousand words, one day, one label."""
    made = rows("news_categorize", COUNTS | {"ü|/file": 22, "one-day": 22, "one label": 22})
    made += [made[0], made[1] | {"event_id": "again"}, made[2] | {"user_id": "c0"}]
    for at, row in enumerate(made):
        row["output"] = f" {row['output'].upper()}\n" if at % 3 else row["output"]
        row["input"] += ["", " \u2028 日本語 😀", " العربية", "\x85"][at % 4]
    made[5]["input"], made[6]["input"], made[7]["input"] = "word", "long " * 10_000, " "
    for row in made:
        if row["user_id"] == "one-day":
            row["occurred_at"] = "2024-01-05T00:00:00+05:00"
        if row["user_id"] == "one label":
            row["output"] = "crime"
    result = evaluate("news_categorize", lines(tmp_path / "e.jsonl", made))
    assert result["users"] == 3 and result["data"]["labels_from"] == "task"  # three folds of the four


@pytest.mark.parametrize(
    ("scores", "choices", "source"),
    [
        (["1.0", "2", "3.0", "4", "5 "], [5, 5], "task"),
        (["0.5", "1.5", "3.0", "4", "5"], [5, 5], "training events"),
        (["1", "2", "3", "none", "5"], [5, 5], "task"),
    ],
)
def test_ratings_of_other_scales(
    evaluate: Run, tmp_path: Path, scores: list[str], choices: list[int], source: str
) -> None:
    made = rows("product_rating", COUNTS)
    for row in made:
        row["output"] = scores[int(row["output"]) - 1]
    result = evaluate("product_rating", lines(tmp_path / "e.jsonl", made))
    assert (result["data"]["choices"], result["data"]["labels_from"]) == (choices, source)
    assert result["data"]["items_left_out"] == sum(row["output"] == "none" for row in made)


def test_the_papers_preset(evaluate: Run, tmp_path: Path) -> None:
    result = evaluate("movie_tagging", lines(tmp_path / "e.jsonl", rows("movie_tagging", COUNTS)), "--preset", "oppu")
    recipe = result["recipe"]
    assert (recipe["learning_rate"], recipe["batch"], recipe["schedule"]) == (1e-4, 16, "linear")
    assert (recipe["base_method"], recipe["base_epochs"], recipe["base_search"]) == ("lora", 1, False)
    assert result["data"]["preset"] == "oppu" and result["evidence"] is False
    settings = PRESETS["oppu"].settings(Settings.load(model={"base": "mine", "lora_rank": 3}))
    assert (settings.model.base, settings.model.lora_rank, settings.model.lora_alpha) == ("mine", 8, 8.0)
    assert (settings.retriever.mode, settings.model.max_tokens) == ("bm25", 2048)


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "bert"])
def test_on_bases_of_other_families(
    evaluate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    tiny_model(family).save_pretrained(str(tmp_path / family))
    byte_tokenizer().save_pretrained(str(tmp_path / family))
    monkeypatch.setenv("OPPU_MODEL__BASE", str(tmp_path / family))
    result = evaluate("product_rating", lines(tmp_path / "e.jsonl", rows("product_rating", COUNTS)))
    assert result["users"] == 2 and result["base"] == str(tmp_path / family)


@pytest.mark.parametrize("task", ["citation", "tweet_paraphrase"])
def test_everything_that_can_be_asked_for_on_histories_without_outputs(
    evaluate: Run, tmp_path: Path, task: str
) -> None:
    made = rows(task, COUNTS, make=citation_with_choices) if task == "citation" else rows(task, COUNTS)
    bare = [row | {"output": ""} if int(row["event_id"].split("-")[1]) < 14 else row for row in made]
    result = evaluate(
        task, lines(tmp_path / "e.jsonl", bare), "--final", "--all-arms", "--methods", "--analyses", "--preset", "oppu"
    )
    assert result["users"] == 2 and {"oppu-2", "peft-lora", "chosen-oppu"} <= result["arms"].keys()
    assert {"history formats", "behaviour shift", "by history length"} <= result["analyses"].keys()
    assert result["adaption"] == {}  # one number of epochs: nothing was searched for
