"""The published layouts: what becomes of each field, and a whole run on each of them."""

import json
import random
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from evaluation.corpus import Item, by_user, in_time, read
from evaluation.published import published, read_profiles
from oppu.errors import ConfigError
from tests.evaluation.layouts import HISTORIES, history, lamp, oppu, profiles

Run = Callable[..., dict[str, Any]]


def entries(task: str, entry: dict[str, str], **query: str) -> list[Item]:
    row = {"user_id": 7, "profile": [{"id": "1", **entry}], "query": [{"id": "9", "input": "q", "gold": "g", **query}]}
    return list(published([row], task).items)


@pytest.mark.parametrize(
    ("task", "entry", "pair"),
    [
        ("citation", {"title": "a title", "abstract": "its abstract"}, ("a title its abstract", "")),
        ("citation", {"title": "a title", "citation": "another paper"}, ("a title", "another paper")),
        ("movie_tagging", {"description": "plot", "tag": "comedy"}, ("plot", "comedy")),
        ("news_categorize", {"text": "body", "title": "head", "category": "crime"}, ("body", "crime")),
        ("news_headline", {"text": "body", "title": "head"}, ("body", "head")),
        ("product_rating", {"text": "review", "score": "4"}, ("review", "4")),
        ("scholarly_title", {"title": "t", "abstract": "a"}, ("a", "t")),
        ("tweet_paraphrase", {"text": "so tired"}, ("so tired", "")),
    ],
)
def test_history_entries_of_each_task(task: str, entry: dict[str, str], pair: tuple[str, str]) -> None:
    history, query = entries(task, entry)
    assert (history.input, history.output, history.query) == (*pair, False)
    assert (query.item_id, query.output, query.query) == ("7/9", "g", True)


@pytest.mark.parametrize(
    ("task", "asked", "kept"),
    [
        ("movie_tagging", "Which? tags: [a, b] description: the plot: twice", "the plot: twice"),
        ("product_rating", "Score? review: fine book", "fine book"),
        ("scholarly_title", "Title for the abstract of a paper: We show", "We show"),
        ("news_headline", "no cue at all", "no cue at all"),
        ("citation", "paper? [1]: a [2]: b", "paper? [1]: a [2]: b"),
    ],
)
def test_a_query_loses_its_instruction(task: str, asked: str, kept: str) -> None:
    assert entries(task, {"text": "x"}, input=asked)[1].input == kept


def test_entries_that_share_an_id_are_all_kept() -> None:
    profile = [{"id": "1", "text": f"review {n}", "score": "4"} for n in range(3)]
    made = published([{"user_id": "u", "profile": profile, "query": []}], "product_rating").items
    assert [i.input for i in made] == ["review 0", "review 1", "review 2"]
    assert len({i.item_id for i in made}) == 3


def test_a_single_query_need_not_be_a_list() -> None:
    row = {"user_id": 7, "profile": [{"text": "x", "score": "4"}], "query": {"id": "9", "input": "q", "gold": "5"}}
    assert [i.output for i in published([row], "product_rating").items if i.query] == ["5"]


@pytest.mark.parametrize(
    ("task", "entry", "name"),
    [
        ("movie_tagging", {"description": "plot", "tags": "comedy"}, "tag"),
        ("product_rating", {"text": "review", "rating": "4"}, "score"),
        ("news_headline", {"text": "body", "headline": "head"}, "title"),
    ],
)
def test_histories_that_name_their_outputs_otherwise_are_refused(task: str, entry: dict[str, str], name: str) -> None:
    rows = [{"user_id": 7, "profile": [entry], "query": [{"id": "9", "input": "q", "gold": "g"}]}]
    with pytest.raises(ConfigError, match=f"profile: expected entries with {name}, none of 1 has it"):
        published(rows, task, bare=("citation",))


def test_queries_are_of_one_day_after_the_history() -> None:
    profile = [{"id": "2", "text": "b", "score": "2", "date": "2019-03-02"}, {"id": "1", "text": "a", "score": "1",
               "date": "2019-03-01"}]  # fmt: skip
    asked = [{"id": "1", "input": "q", "gold": "3"}, {"id": "8", "input": "r", "gold": "3"}, {"id": "9", "input": "s"}]
    made = published([{"user_id": "u", "profile": profile, "query": asked}], "product_rating").items
    assert [i.item_id for i in made] == ["u/1", "u/2", "u/1?", "u/8"]  # in order of time; without gold no query
    assert {i.day for i in made if i.query} == {date(2019, 3, 3)}
    asked[1]["date"] = "2020-01-01"
    later = published([{"user_id": "u", "profile": profile, "query": asked}], "product_rating").items
    assert {i.day for i in later if i.query} == {date(2020, 1, 1)}


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2013-05", date(2013, 5, 1)),
        ("2013-5-3", date(2013, 5, 3)),
        ("2013.0", date(2013, 1, 1)),
        ("2013-05-03 10:00:00 UTC", date(2013, 5, 3)),
        ("2013-05-03T10:00:00+02:00", date(2013, 5, 3)),
        ("1367575200", date(2013, 5, 3)),
        ("20130503", date(2013, 5, 3)),
        ("Mon Apr 06 22:19:45 PDT 2009", date(2009, 4, 6)),
    ],
)
def test_dates_however_they_are_written(text: str, day: date) -> None:
    row = {"user_id": 1, "profile": [{"id": "a", "abstract": "a", "title": "t", "date": text}]}
    assert [i.day for i in published([row], "scholarly_title").items] == [day]


def test_years_and_missing_dates() -> None:
    row: dict[str, Any] = {
        "user_id": 1,
        "profile": [{"id": k, "abstract": f"a{k}", "title": "t", "date": "2019"} for k in range(2)],
    }
    assert {i.day for i in published([row], "scholarly_title").items} == {date(2019, 1, 1)}
    del row["profile"][0]["date"]
    days = [i.day for i in published([row], "scholarly_title").items]
    assert days[1] - days[0] == timedelta(days=1)


def test_rows_of_one_user_are_one_history() -> None:
    rows = [{"user_id": 1, "profile": [{"id": "a", "text": "x"}, {"id": n, "text": n}]} for n in ("b", "c")]
    assert [i.item_id for i in published(rows, "tweet_paraphrase").items] == ["1/a", "1/b", "1/c"]


@pytest.mark.parametrize(
    ("rows", "gold", "words"),
    [
        ({"a": 1}, None, "events: expected a JSON list"),
        ([{"user_id": 1}], None, "entry 0: expected an object with profile"),
        ([{"user_id": 1, "profile": ["x"]}], None, "user 1, entry 0: expected an object"),
        ([{"user_id": 1, "profile": [{"id": "p"}]}], None, "user 1, entry p: expected one of input"),
        ([{"user_id": 1, "profile": [{"text": "t", "date": "soon"}]}], None, "date: expected YYYY-MM-DD, got 'soon'"),
        ([], {"golds": [{"id": 1}]}, "--outputs: entry 0: expected an object with id and output"),
        ([], {"golds": 3}, "--outputs: expected a JSON list"),
    ],
)
def test_what_does_not_fit_is_named(rows: object, gold: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        published(rows, "news_headline", gold)


def test_written_profiles(tmp_path: Path) -> None:
    assert read_profiles(profiles(tmp_path / "p.json", [4])) == {"4": "The user likes 4."}
    (tmp_path / "p.json").write_text(json.dumps({"5": " a  b "}))
    assert read_profiles(tmp_path / "p.json") == {"5": "a b"}
    for content, words in (("[3]", "entry 0"), ("[{", "cannot read"), ("3", "expected a JSON list")):
        (tmp_path / "p.json").write_text(content)
        with pytest.raises(ConfigError, match=words):
            read_profiles(tmp_path / "p.json")


def test_unreadable_outputs_are_named(tmp_path: Path) -> None:
    questions, _ = lamp(tmp_path, "product_rating", "dev", [3])
    with pytest.raises(ConfigError, match=r"cannot read .*none\.json"):
        read(questions, "product_rating", outputs=tmp_path / "none.json")


@pytest.mark.slow
@pytest.mark.parametrize("task", HISTORIES)
def test_oppus_layout_with_population_and_profiles(evaluate: Run, tmp_path: Path, task: str) -> None:
    targets = oppu(tmp_path / "user_top_100_history.json", task, {1: (20, 3), 2: (22, 2), 3: (21, 2)})
    others = oppu(tmp_path / "user_others.json", task, {n: (7, 2) for n in range(10, 16)} | {2: (5, 1)})
    written = profiles(tmp_path / "profile_user_100.json", [1, 2, 3])
    more = ("--population", str(others), "--profiles", str(written), "--final")
    result = evaluate(task, targets, *more)
    assert (result["users"], result["queries"]) == (3, 7)  # all queries, nothing of the history
    assert result["data"]["population_users"] == 6 and result["data"]["profiles"] == "written"
    bare = task in ("citation", "tweet_paraphrase")
    assert result["data"]["items_without_output"] == (20 + 22 + 21 + 6 * 7 if bare else 0)


@pytest.mark.slow
@pytest.mark.parametrize("dated", [False, True])
@pytest.mark.parametrize("task", ["citation", "product_rating", "news_headline"])
def test_lamps_layout(evaluate: Run, tmp_path: Path, task: str, dated: bool) -> None:
    questions, outputs = lamp(tmp_path, task, "dev", [20, 21, 8, 9], dated=dated)
    train, train_outputs = lamp(tmp_path, task, "train", [8, 9, 8], dated=dated)
    gold = ("--outputs", str(outputs))
    others = ("--population", str(train), "--population-outputs", str(train_outputs), "--final")
    if not dated:
        with pytest.raises(ConfigError, match="--population-before-test: expected days in the histories"):
            evaluate(task, questions, *gold, *others, "--population-before-test")
    result = evaluate(task, questions, *gold, *others, *(["--population-before-test"] if dated else []))
    assert (result["users"], result["queries"]) == (2, 2)
    assert result["data"]["population_before_test"] is dated and result["data"]["population_users"] == 3
    assert result["data"]["ordered_by"] == ("days" if dated else "order in the file")


@pytest.mark.slow
def test_without_the_queries_the_end_of_the_history_is_asked_about(evaluate: Run, tmp_path: Path) -> None:
    file = oppu(tmp_path / "u.json", "news_headline", {1: (20, 3), 2: (20, 2)} | {n: (8, 1) for n in range(10, 14)})
    assert evaluate("news_headline", file)["queries"] == 8
    bare = oppu(tmp_path / "v.json", "tweet_paraphrase", {1: (20, 3), 2: (20, 2)})
    with pytest.raises(ConfigError, match="by their file's queries alone, with --final"):
        evaluate("tweet_paraphrase", bare)


def test_a_population_of_the_targets_alone_is_refused(evaluate: Run, tmp_path: Path) -> None:
    file = oppu(tmp_path / "u.json", "news_headline", {1: (20, 3)})
    with pytest.raises(ConfigError, match="--population: expected items of task news_headline of users"):
        evaluate("news_headline", file, "--population", str(file))
    with pytest.raises(ConfigError, match="--profiles: no entry"):
        evaluate("news_headline", file, "--profiles", str(profiles(tmp_path / "p.json", [2])))


def test_users_keep_their_own_items(tmp_path: Path) -> None:
    file = oppu(tmp_path / "u.json", "product_rating", {1: (4, 1), 2: (3, 1)})
    assert {user: len(own) for user, own in by_user(read(file, "product_rating").items).items()} == {"1": 5, "2": 4}


@pytest.mark.parametrize("score", [0, "0", 0.0])
def test_a_number_is_an_output_even_where_it_is_zero(score: object) -> None:
    row = {"user_id": 7, "profile": [{"id": "1", "text": "t", "score": score}],
           "query": [{"id": "9", "input": "q", "gold": score}, {"id": "8", "input": "r", "gold": None}]}  # fmt: skip
    assert [i.output for i in published([row], "product_rating").items] == [str(score)] * 2


@pytest.mark.parametrize(
    ("task", "entry", "pair"),
    [
        ("scholarly_title", {"title": "t", "abstract": ""}, None),
        ("news_categorize", {"title": "t", "text": " ", "category": "crime"}, None),
        ("movie_tagging", {"description": None, "tag": "comedy", "text": "t"}, None),
        ("citation", {"title": "", "abstract": "a", "citation": "c"}, None),
        ("citation", {"title": "", "abstract": ""}, None),
        ("citation", {"title": "", "abstract": "a"}, ("a", "")),
        ("citation", {"abstract": "a", "citation": "c"}, ("a", "c")),
        ("movie_tagging", {"text": "plot", "tag": "comedy"}, ("plot", "comedy")),
        ("movie_tagging", {"text": "", "tag": "comedy"}, None),
    ],
)
def test_no_other_field_is_guessed_for_a_blank_one(task: str, entry: Any, pair: tuple[str, str] | None) -> None:
    row = {"user_id": 7, "profile": [{"id": "0", **entry}, {"id": "1", **HISTORIES[task](random.Random(0))}]}
    found = published([row], task)
    assert [(i.input, i.output) for i in found.items[:-1]] == ([pair] if pair else [])
    assert found.blank == (pair is None)


def test_outputs_of_other_questions_are_refused_and_missing_ones_counted() -> None:
    row = {"id": "1", "input": "q", "profile": [{"id": "0", "text": "a", "score": "4"}]}
    rows = [row, row | {"id": "2"}, row | {"id": "3", "input": " "}]
    found = published(rows, "product_rating", [{"id": 2, "output": 3}])
    assert (found.unanswered, found.blank) == (1, 1)
    assert [i.item_id for i in found.items if i.query] == ["2/2"]
    for gold in ([{"id": 9, "output": 3}], [{"id": 3, "output": 3}], []):
        with pytest.raises(ConfigError, match="^--population-outputs: none of its"):
            published(rows, "product_rating", gold, "--population-outputs")


def test_what_outputs_do_not_fit_is_said_by_the_command(evaluate: Run, tmp_path: Path) -> None:
    questions, outputs = lamp(tmp_path, "product_rating", "dev", [20, 21])
    train, train_outputs = lamp(tmp_path, "product_rating", "train", [8, 9])
    files = ("--population", str(train), "--population-outputs")
    for more, words in (
        (("--outputs", str(train_outputs)), "^--outputs: none of its 2 ids"),
        (("--outputs", str(outputs), *files, str(outputs)), "^--population-outputs: none of its 2 ids"),
        (("--population-outputs", str(outputs)), "^--population-outputs: .* of a --population"),
    ):
        with pytest.raises(ConfigError, match=words):
            evaluate("product_rating", questions, *more)


def one_day(users: int, entries: int) -> list[dict[str, Any]]:
    chance = random.Random(3)
    profiles_of = [history("movie_tagging", chance, entries) for _ in range(users)]
    query = [{"id": "q", "input": "description: asked", "gold": "comedy"}]
    return [
        {
            "user_id": user,
            "profile": [e | {"id": str(at), "date": "2008-04-11"} for at, e in enumerate(own)],
            "query": query,
        }
        for user, own in enumerate(profiles_of)
    ]


def test_histories_of_one_day_are_taken_in_turn_with_the_queries_last(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(one_day(2, 6)))
    ordered, [made] = in_time(read(tmp_path / "e.json", "movie_tagging").items)
    assert ordered == "order in the file"
    for own in by_user(made).values():
        assert [i.item_id.split("/")[1] for i in sorted(own, key=lambda i: i.day)] == [*"012345", "q"]
        assert len({i.day for i in own}) == 7


@pytest.mark.slow
def test_histories_of_one_day_can_be_developed_on(evaluate: Run, tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(one_day(4, 15)))
    result = evaluate("movie_tagging", tmp_path / "e.json", bounds=())
    assert result["data"]["ordered_by"] == "order in the file" and result["queries"] > 0
