"""ROUGE against values worked out by hand, and what is no text of its own."""

import pytest

from evaluation.rouge import is_copied, is_repeated, rouge_1, rouge_l, words


@pytest.mark.parametrize(
    ("written", "true", "one", "longest"),
    [
        ("the cat sat", "the cat sat", 1.0, 1.0),
        ("The cat, sat!", "the CAT sat", 1.0, 1.0),
        ("police killed the gunman", "police kill the gunman", 3 / 4, 3 / 4),  # Lin 2004, section 3.1
        ("the gunman kill police", "police kill the gunman", 1.0, 1 / 2),
        ("the the the", "the cat", 2 / 5, 2 / 5),  # a word counts as often as in both
        ("a b c d", "a x b y c z", 6 / 10, 6 / 10),
        ("", "something", 0.0, 0.0),
        ("other words", "something", 0.0, 0.0),
    ],
)
def test_by_hand(written: str, true: str, one: float, longest: float) -> None:
    assert rouge_1(written, true) == pytest.approx(one)
    assert rouge_l(written, true) == pytest.approx(longest)


def test_texts_in_other_scripts_have_words_too() -> None:
    assert rouge_1(
        "\u041c\u043e\u0441\u043a\u0432\u0430 \u0436\u0434\u0451\u0442", "\u043c\u043e\u0441\u043a\u0432\u0430"
    ) == pytest.approx(2 / 3)
    assert words("\u5317\u4eac2008") == ["\u5317", "\u4eac", "2008"]
    assert words("na\u00efve_text") == ["na", "ve", "text"]  # mostly ASCII: as the package reads it
    assert words("\u00fcber\u00e4\u00f6\u00fc") != ["ber"]


def test_words_are_runs_of_letters_and_digits() -> None:
    assert words("It's 5-year-old's café.") == ["it", "s", "5", "year", "old", "s", "caf"]


@pytest.mark.parametrize(
    ("text", "loops"), [("the the the the", True), ("a b a b a b", True), ("a b a b", False), ("", False)]
)
def test_loops(text: str, loops: bool) -> None:
    assert is_repeated(text) == loops


def test_copies() -> None:
    source = "one two three four five six"
    assert is_copied("Two three four five", source, [])
    assert not is_copied("two three four", source, [])
    assert not is_copied("two four five six", source, [])
    assert is_copied("An earlier one", source, ["other", "an earlier one!"])
    assert not is_copied("", source, [""])
