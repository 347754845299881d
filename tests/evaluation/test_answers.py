"""What may be answered, and how outputs are spelt."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evaluation.answers import Settled, read_labels, settle
from evaluation.corpus import Item
from oppu.errors import ConfigError
from oppu.tasks import Task, load_tasks
from tests.evaluation.world import item

TASKS = load_tasks()
FREE = Task("pick", "choice", "{input}", "is:")
BOTH = 'a paper [1]: "One Thing" [2]: "Another"'


def settled(
    outputs: Sequence[str], task: Task = FREE, *, tests: int = 0, given: Sequence[str] | None = None, **more: Any
) -> Settled:
    """The last ``tests`` items lie in a test part."""
    made = [replace(item("u", at), output=output, **({"choices": ()} | more)) for at, output in enumerate(outputs)]
    return settle(made, task, lambda items: list(items)[: len(items) - tests], given)


def answers(done: Settled) -> list[str]:
    return [i.output for i in done.items]


@pytest.mark.parametrize("brackets", [True, False])
def test_places_may_count_from_0(brackets: bool) -> None:
    said = ["[0]", "[1]"] if brackets else ["0", "1"]
    done = settled([said[0], said[1], said[1]], choices=("one thing", "another"))
    assert answers(done) == ["one thing", "another", "another"]
    first = settled(["1", "2"], choices=("one thing", "another"))  # nobody says 0
    assert answers(first) == ["one thing", "another"]
    assert answers(settled(["0", "2", "1"], choices=("one thing", "another"))) == ["another", "one thing"]


def test_candidates_may_be_numbered_from_0() -> None:
    both = 'a paper [0]: "One Thing" [1]: "Another"'
    done = settled(["[0]", "1", "Another"], TASKS["citation"], input=both)
    assert answers(done) == ["[0]", "[1]", "[1]"]
    assert {i.choices for i in done.items} == {("[0]", "[1]")}


def test_places_count_from_0_where_the_input_shows_no_candidates_too() -> None:
    done = settled(["[0]", "[1]", "1"], TASKS["citation"], input="a paper on rivers")
    assert answers(done) == ["[0]", "[1]", "[1]"] and {i.choices for i in done.items} == {("[0]", "[1]")}
    mixed = settled(["[0]", "[1]", "[2]"], TASKS["citation"], input="a paper on rivers")
    assert answers(mixed) == ["[1]", "[2]"] and mixed.notes["items_left_out"] == 1
    numbers = settled(["0", "2"], choices=("2", "0"))  # choices themselves, no places
    assert answers(numbers) == ["0", "2"]


class TestLabels:
    def test_they_come_from_what_may_be_learnt_alone(self) -> None:
        done = settled(["b", "a", "b", "late"], tests=1)
        assert done.items[0].choices == ("a", "b") and done.notes["labels_from"] == "training events"
        assert [i.answered for i in done.items] == [True, True, True, False]
        assert not done.items[3].learnable and done.notes["items_of_unknown_label"] == 1

    def test_a_tasks_own_are_taken_where_they_cover_what_may_be_learnt(self) -> None:
        task = replace(FREE, labels=("a", "b", "c"))
        assert settled(["B", " a", "late"], task, tests=1).items[0].choices == ("a", "b", "c")
        assert settled(["B", "z"], task).items[0].choices == ("b", "z")  # in the task's spelling where it has one

    def test_the_commonest_spelling_stands_for_all(self) -> None:
        done = settled(["Sci-Fi", "sci-fi", "sci-fi", "War  film", "war film"])
        assert done.items[0].choices in (("War  film", "sci-fi"), ("sci-fi", "war film"))
        assert len(set(answers(done))) == 2

    def test_given_ones_win(self) -> None:
        done = settled(["A", "z"], replace(FREE, labels=("a", "z")), given=["b", "a"])
        assert done.items[0].choices == ("b", "a") and answers(done) == ["a", "z"]
        assert done.notes["labels_from"] == "file" and done.notes["items_of_unknown_label"] == 1

    def test_one_label_is_no_choice(self) -> None:
        with pytest.raises(ConfigError, match="at least two labels for task pick, found 1"):
            settled(["a", "a"])

    def test_the_file_has_one_a_line(self, tmp_path: Path) -> None:
        (tmp_path / "l.txt").write_text("b \n\n a\nb\n")
        assert read_labels(tmp_path / "l.txt") == ["b", "a"]
        (tmp_path / "l.txt").write_text("b\n")
        for name, words in (("l.txt", "at least two labels"), ("none.txt", "cannot read")):
            with pytest.raises(ConfigError, match=words):
                read_labels(tmp_path / name)


class TestRecords:
    def test_an_output_is_found_among_the_records_choices(self) -> None:
        outputs = ["Left one", "left  ONE", "[2]", "2", "neither", "3"]
        done = settled(outputs, choices=("Left one", "Right"))
        assert answers(done) == ["Left one", "Left one", "Right", "Right"]
        assert done.notes["items_left_out"] == 2 and done.notes["labels_from"] == "record"

    @pytest.mark.parametrize(
        ("output", "wanted"),
        [("[2]", "[2]"), ("2", "[2]"), ("one thing", "[1]"), ('"Another"', "[2]"), ("", ""),
         ("[1].", "[1]"), ("(2)", "[2]"), ("2.", "[2]"), ('[1]: "One Thing"', "[1]"), ("One Thing.", "[1]")],
    )  # fmt: skip
    def test_citation_candidates_in_the_input(self, output: str, wanted: str) -> None:
        [done] = settled([output], TASKS["citation"], input=BOTH).items
        assert (done.output, done.choices, done.input) == (wanted, ("[1]", "[2]"), BOTH)

    def test_what_only_separates_candidates_is_no_part_of_them(self) -> None:
        made = settled(
            ["One Thing", "Another", "3D Vision"], TASKS["citation"], input='[1]: "One Thing", [2]: "Another".'
        )
        assert answers(made) == ["[1]", "[2]"] and made.notes["items_left_out"] == 1

    def test_as_many_candidates_as_the_input_has(self) -> None:
        [done] = settled(["[3]"], TASKS["citation"], input="p [1]: a [2]: b [3]: c").items
        assert done.choices == ("[1]", "[2]", "[3]") and done.answered

    def test_a_paper_and_what_it_cites_is_a_text(self) -> None:
        [done] = settled(["Some Reference"], TASKS["citation"], input="My Title").items
        assert done.bare and done.input == "My Title cites: Some Reference"

    def test_texts_have_no_choices(self) -> None:
        done = settled(["x", ""], replace(FREE, kind="text"), choices=("a", "b"))
        assert all(i.choices == () for i in done.items) and done.notes["items_without_output"] == 1


class TestRatings:
    def test_equal_numbers_are_one_label(self) -> None:
        done = settled(["5.0", "1", " 2 ".strip()], TASKS["product_rating"])
        assert answers(done) == ["5", "1", "2"] and done.items[0].choices == ("1", "2", "3", "4", "5")

    @pytest.mark.parametrize(
        "text", ["4 stars", "4 Star", "4/5", "4 / 10", "4 out of 5", "4,0", "4.0 points", "4 \u2605\u2605\u2605\u2605"]
    )
    def test_a_unit_or_a_scale_is_left_out(self, text: str) -> None:
        done = settled(["4", text, "5 stars"], TASKS["product_rating"])
        assert answers(done) == ["4", "4", "5"] and done.notes["items_left_out"] == 0
        own = settled(["4 stars"], TASKS["product_rating"], choices=("3 stars", "4 stars"))
        assert (answers(own), own.items[0].choices) == (["4"], ("3", "4"))
        assert answers(settled(["4", "4 pieces", "four", "1,200 points"], TASKS["product_rating"])) == ["4"]

    @pytest.mark.parametrize("said", [["4/5", "8/10", "3"], ["4/5", "2020/2021", "3"], ["4/5", "2/5", "8", "3"]])
    def test_scales_that_differ_are_not_mixed(self, said: list[str]) -> None:
        done = settled(said, TASKS["product_rating"])
        assert answers(done) == [text for text in said if "/" not in text]
        assert done.notes["items_left_out"] == sum("/" in text for text in said)

    def test_another_scale_is_learnt_and_in_order(self) -> None:
        assert settled(["10", "9.5", "2", "10.0"], TASKS["product_rating"]).items[0].choices == ("2", "9.5", "10")

    def test_what_is_no_number_is_left_out(self) -> None:
        done = settled(["5", "good", "nan", "inf"], TASKS["product_rating"])
        assert answers(done) == ["5"] and done.notes["items_left_out"] == 3
        assert answers(settled(["3"], TASKS["product_rating"], choices=("1", "3.0"))) == ["3.0"]
        with pytest.raises(ConfigError, match="--labels: a rating task expects numbers"):
            settled(["5"], TASKS["product_rating"], given=["good", "bad"])


def test_nothing_that_fits_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"some item of task pick$"):
        settled([])
    with pytest.raises(ConfigError, match="that fits it; 2 do not"):
        settled(["x", "y"], choices=("a", "b"))


def test_items_come_oldest_first() -> None:
    made = [replace(item("u", at), choices=()) for at in (2, 0, 1)]
    done = settle(made, FREE, lambda items: list(items), None)
    assert [i.day for i in done.items] == sorted(i.day for i in made)
    assert isinstance(done.items[0], Item)


def test_ratings_that_are_no_numbers_name_the_output() -> None:
    with pytest.raises(ConfigError, match="events: output: expected a number, such as 4, .* none of 2 items"):
        settled(["great", "poor"], TASKS["product_rating"])
    with pytest.raises(ConfigError, match="that fits it; 1 do not"):
        settled(["5"], TASKS["product_rating"], choices=("1", "2"))
