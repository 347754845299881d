"""The layouts that can be read, and what is said of those that cannot."""

import gzip
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from evaluation.corpus import by_user, in_time, load, read
from oppu.errors import ConfigError
from oppu.tasks import load_tasks

TASKS = load_tasks()


def event(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": f"e{number}",
        "user_id": "anna",
        "task": "news_categorize",
        "occurred_at": f"2024-01-0{number}T23:30:00-02:00",
        "input": f"text {number}",
        "output": "politics",
    } | changes


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["e.jsonl", "e.jsonl.gz"])
def test_events_come_in_order_of_their_utc_day_with_the_tasks_choices(tmp_path: Path, name: str) -> None:
    rows = [event(3), event(1), event(2, task="news_headline", output="a headline")]
    items = load(lines(tmp_path / name, rows), "news_categorize", TASKS)
    assert [(i.item_id, str(i.day)) for i in items] == [("e1", "2024-01-02"), ("e3", "2024-01-04")]
    assert items[0].choices == TASKS["news_categorize"].labels
    assert list(by_user(items)) == ["anna"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (event(1, output="gardening"), "item e1: output: expected one of"),
        ({"user_id": "anna"}, "line 1"),
        (event(1, task="tweet_paraphrase"), "some item of task"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(lines(tmp_path / "e.jsonl", [row]), "news_categorize", TASKS)


def test_gzip_is_told_by_its_content_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path, plain = tmp_path / "events.data", lines(tmp_path / "e.jsonl", [event(n) for n in range(1, 5)])
    path.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(path, "news_headline") == read(plain, "news_headline")
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:20] + bytes(12) + whole[32:], whole[:12]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="events: cannot read"):
            read(path, "news_headline")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.jsonl", "news_categorize", TASKS)


def test_lamp_questions_with_their_outputs(tmp_path: Path) -> None:
    profile = [{"id": "p1", "text": "good book", "score": "5"}, {"id": "p2", "text": "bad book", "score": "1"}]
    (tmp_path / "q.json").write_text(json.dumps([{"id": "110", "input": "What score? fine book", "profile": profile}]))
    (tmp_path / "o.json").write_text(json.dumps({"task": "LaMP_3", "golds": [{"id": "110", "output": "4"}]}))
    items = load(tmp_path / "q.json", "product_rating", TASKS, outputs=tmp_path / "o.json")
    assert [(i.user_id, i.input, i.output) for i in items] == [
        ("110", "good book", "5"),
        ("110", "bad book", "1"),
        ("110", "What score? fine book", "4"),
    ]
    assert len({i.day for i in items}) == 3  # no dates: one a day, in order


def test_a_list_of_events_is_read_as_events(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps([event(1), event(2)]))
    assert [i.item_id for i in load(tmp_path / "e.json", "news_categorize", TASKS)] == ["e1", "e2"]


def test_equal_events_are_one_and_an_id_that_is_used_again_loses_nothing(tmp_path: Path) -> None:
    rows = [event(1), event(1), event(2, event_id="e1"), event(1, user_id="bert")]
    items = load(lines(tmp_path / "e.jsonl", rows), "news_categorize", TASKS)
    assert sorted((i.user_id, i.input) for i in items) == [("anna", "text 1"), ("anna", "text 2"), ("bert", "text 1")]
    assert len({i.item_id for i in items}) == 3


@pytest.mark.parametrize(
    ("minutes", "ordered"), [(24 * 60, "days"), (1, "instants"), (0, "order in the file")], ids=str
)
def test_what_orders_items_is_as_fine_as_it_must_be(tmp_path: Path, minutes: int, ordered: str) -> None:
    begin = datetime(2024, 1, 1, tzinfo=UTC)
    rows = [
        event(
            1, event_id=f"{u}{at}", user_id=f"u{u}", occurred_at=(begin + timedelta(minutes=minutes * at)).isoformat()
        )
        for at in range(8)
        for u in range(3)
    ]
    own = read(lines(tmp_path / "e.jsonl", rows), "news_categorize").items
    name, [found, none] = in_time(own, [])
    assert (name, none) == (ordered, [])
    assert [i.item_id for i in found] == [i.item_id for i in own]
    days = [i.day for i in found if i.user_id == "u1"]
    assert days == sorted(set(days)) and len(days) == 8
    # who acts at one instant is of one day, whoever it is
    assert (found[0].day == found[1].day) == (ordered != "order in the file")


@pytest.mark.parametrize("fault", ["{", '{"event_id": "\\ud800"}', "[1]", "7"])
def test_a_line_that_is_no_event_is_named_and_no_field_without_a_name(tmp_path: Path, fault: str) -> None:
    (tmp_path / "e.jsonl").write_text(json.dumps(event(1)) + "\n\n" + fault + "\n")
    with pytest.raises(ConfigError, match=r"^events: e\.jsonl line 3: \S") as found:
        read(tmp_path / "e.jsonl", "news_categorize")
    assert ": :" not in str(found.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"occurred_at": None}, "entry 1: occurred_at: "),
        ({"schema_version": 2}, "entry 1: schema_version: at most 1 is understood, got a higher one"),
        ({"output": ""}, "entry 1: output: expected text"),
    ],
)
def test_the_entry_of_a_list_of_events_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    rows = [event(1), {name: value for name, value in event(2, **change).items() if value is not None}]
    (tmp_path / "e.json").write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / "e.json", "news_categorize")
    with pytest.raises(ConfigError, match=words.replace("entry 1", "line 2")):
        read(lines(tmp_path / "e.jsonl", rows), "news_categorize")


@pytest.mark.parametrize("output", [{}, {"output": ""}, {"output": " "}])
def test_only_bare_histories_may_lack_an_output(tmp_path: Path, output: dict[str, str]) -> None:
    rows = [{name: value for name, value in event(at).items() if name != "output"} | output for at in (1, 2)]
    tweets = lines(tmp_path / "t.jsonl", [row | {"task": "tweet_paraphrase"} for row in rows])
    assert [i.bare for i in load(tweets, "tweet_paraphrase", TASKS)] == [True, True]
    with pytest.raises(ConfigError, match=r"t\.jsonl line 1: output: expected text"):
        read(tweets, "tweet_paraphrase")
    for task in ("news_categorize", "news_headline"):
        with pytest.raises(ConfigError, match=r"e\.jsonl line 1: output: .* only citation, tweet_paraphrase may lack"):
            load(lines(tmp_path / "e.jsonl", [row | {"task": task} for row in rows]), task, TASKS)


def test_outputs_beside_events_are_refused(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"^--outputs: .*e\.jsonl is of events"):
        read(lines(tmp_path / "e.jsonl", [event(1)]), "news_categorize", outputs=tmp_path / "o.json")


def test_the_first_faults_are_said_together(tmp_path: Path) -> None:
    rows = [event(1 + at % 9, event_id=f"e{at}") | ({"output": ""} if at % 2 else {}) for at in range(40)]
    with pytest.raises(ConfigError) as found:
        read(lines(tmp_path / "e.jsonl", rows), "news_categorize")
    assert [problem.split(":")[1] for problem in found.value.problems] == [
        f" e.jsonl line {at}" for at in range(2, 22, 2)
    ]


def test_a_number_is_a_rating_and_no_choices_are_none(tmp_path: Path) -> None:
    rows = [event(1, output=4), event(2, output=4.5), event(3, choices=[])]
    found = read(lines(tmp_path / "e.jsonl", rows), "news_categorize").items
    assert [i.output for i in found[:2]] == ["4", "4.5"] and found[2].choices == ()
    for odd in (True, [1], {"a": 1}, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="line 1: output"):
            read(lines(tmp_path / "e.jsonl", [event(1, output=odd)]), "news_categorize")
    for none in (0, False, ""):
        with pytest.raises(ConfigError, match="line 1: choices"):
            read(lines(tmp_path / "e.jsonl", [event(1, choices=none)]), "news_categorize")


def test_half_a_character_becomes_a_question_mark(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(
        '[{"user_id": "u", "profile": [{"id": "1", "text": "cut \\ud83d", "title": "so \\ud83d"}], "query": []}]'
    )
    [one] = read(tmp_path / "e.json", "news_headline").items
    assert (one.input, one.output) == ("cut ?", "so ?")


def test_days_that_only_say_an_order_are_no_dates(tmp_path: Path) -> None:
    entries = [{"id": str(at), "text": f"text {at}", "title": "t"} for at in range(12)]
    (tmp_path / "e.json").write_text(json.dumps([{"user_id": "u", "profile": entries, "query": []}]))
    own = read(tmp_path / "e.json", "news_headline").items
    assert not any(i.dated for i in own) and in_time(own)[0] == "order in the file"
    dated = [{**entry, "date": f"2020-01-{at + 1:02}"} for at, entry in enumerate(entries)]
    (tmp_path / "e.json").write_text(json.dumps([{"user_id": "u", "profile": dated, "query": []}]))
    own = read(tmp_path / "e.json", "news_headline").items
    assert all(i.dated for i in own) and in_time(own)[0] == "days"
