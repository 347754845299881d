"""The statistics profile: weights, windows, and what the prompt's line says."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oppu.values import Event, EventId, UserId
from retriever.profile import Columns, summarise

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def event(seq: int, output: str, choices: tuple[str, ...] | None = None) -> Event:
    return Event(UserId("u"), seq, EventId(f"e{seq}"), "t", NOW, NOW, "input", output, choices)


def events(*outputs: str) -> list[Event]:
    return [event(i, output) for i, output in enumerate(outputs, start=1)]


def test_an_event_counts_half_after_one_half_life() -> None:
    prior = summarise(events("old", "mid", "new"), half_life_events=1.0).prior
    assert prior == pytest.approx({"new": 1.0, "mid": 0.5, "old": 0.25})


def test_prior_adds_up_repeats() -> None:
    assert summarise(events("a", "b", "a"), half_life_events=1.0).prior == pytest.approx({"a": 1.25, "b": 0.5})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", " ", "a long text of some words", "one more text of words"]), max_size=20),
    st.data(),
)
def test_a_window_equals_a_profile_of_those_events_alone(outputs: list[str], data: st.DataObject) -> None:
    whole, columns = events(*outputs), Columns()
    cut = data.draw(st.integers(0, len(whole)))
    columns.extend(whole[:cut])
    columns.extend(whole[cut:])
    low = data.draw(st.integers(0, len(whole)))
    high = data.draw(st.integers(0, len(whole)))
    window = columns.summary(low, high, half_life_events=5.0)
    alone = summarise(whole[low:high] if low < high else [], half_life_events=5.0)
    assert window.prior == pytest.approx(alone.prior)
    assert window.line == alone.line


@pytest.mark.parametrize(
    ("outputs", "line"),
    [
        ((), ""),
        (("politics",), "mostly: politics"),
        (("politics", "media", "politics"), "mostly: politics, media"),
        (("4", "5", "5"), "mostly: 5, 4"),
        (
            ("a b c d e", "f g h i j k l", "m n o p q r"),
            "usually about 6 words",
        ),
        (
            ("new climate plan is here now", "the climate vote of today failed", "a quiet day in spring again"),
            "usually about 6 words; often: climate",
        ),
        (("science and technology of the future",) * 4, "mostly: science and technology of the future"),
        (("x" * 100, "x" * 100), "mostly: " + "x" * 39 + "…"),
        (("two\nlines",), "mostly: two lines"),
    ],
)
def test_line(outputs: tuple[str, ...], line: str) -> None:
    assert summarise(events(*outputs), half_life_events=50.0).line == line


def test_without_an_output_the_input_is_the_users_own_text() -> None:
    bare = [replace(event(n, " "), input=f"so {word} today again") for n, word in enumerate(("tired", "happy"))]
    found = summarise(bare, half_life_events=9.0)
    assert (found.prior, found.line) == ({}, "usually about 4 words; often: again, today")
    mixed = summarise([*bare, *events("a", "b", "a")], half_life_events=1.0)
    assert mixed.prior == pytest.approx({"a": 1.25, "b": 0.5}) and mixed.line == "mostly: a, b"


def test_long_distinct_choices_are_labels() -> None:
    offered = ("a title of a cited paper in full", "the title of some other paper in full")
    history = [event(1, offered[0], offered), event(2, offered[1], offered)]
    assert summarise(history, half_life_events=50.0).line.startswith("mostly: the title of some")


def test_rare_labels_are_not_mostly() -> None:
    history = events(*["a"] * 30, "b")
    assert summarise(history, half_life_events=1000.0).line == "mostly: a"


def test_prior_is_bounded_and_keeps_the_heaviest() -> None:
    prior = summarise(events(*(f"o{i}" for i in range(400)), "o0"), half_life_events=50.0).prior
    assert len(prior) == 256
    assert {"o0", "o399"} <= set(prior)
    assert "o1" not in prior


def test_ties_go_by_name() -> None:
    history = events("b", "a")
    assert list(summarise(history, half_life_events=1e12).prior) == ["a", "b"]


def test_very_old_events_do_not_overflow() -> None:
    prior = summarise(events(*["a"] * 3000, "b"), half_life_events=0.5).prior
    assert prior == pytest.approx({"b": 1.0, "a": 1 / 3})
