"""The neighbours' vote."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oppu.values import Event, EventId, UserId
from retriever.port import Hit, knn_distribution, knn_distributions, nearness
from tests.inference.conftest import START

CHOICES = ("a", "b", "c")
neighbours = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "other", ""]), st.floats(-1, 1)), max_size=20)


def hits(said: list[tuple[str, float]]) -> tuple[Hit, ...]:
    return tuple(
        Hit(Event(UserId("anna"), seq, EventId(f"e{seq}"), "label", START, START, "words", output), similarity)
        for seq, (output, similarity) in enumerate(said, start=1)
    )


def by_the_formula(said: tuple[Hit, ...]) -> list[float] | None:
    """exp(similarity / temperature) by output, the nearest one's being 1, and one vote spread over all."""
    if not any(hit.event.output in CHOICES for hit in said):
        return None
    votes = dict.fromkeys(CHOICES, 0.0)
    for hit in said:
        if hit.event.output in votes:
            votes[hit.event.output] += math.exp((hit.similarity - max(h.similarity for h in said)) / 0.1)
    return [(votes[choice] + 1 / len(CHOICES)) / (sum(votes.values()) + 1) for choice in CHOICES]


@given(st.lists(neighbours, max_size=6))
def test_each_querys_vote_is_its_own_neighbours(queries: list[list[tuple[str, float]]]) -> None:
    every = [hits(said) for said in queries]
    found = knn_distributions(every, CHOICES)
    assert found.shape == (len(every), len(CHOICES))
    for own, row in zip(every, found, strict=True):
        expected, alone = by_the_formula(own), knn_distribution(own, CHOICES)
        if expected is None:
            assert alone is None
            assert np.isnan(row).all()
        else:
            assert row == pytest.approx(expected)
            np.testing.assert_array_equal(row, alone)


def test_the_nearest_neighbour_has_the_largest_vote() -> None:
    vote = knn_distribution(hits([("a", 0.2), ("b", 0.5), ("other", 0.9)]), CHOICES)
    assert vote is not None
    assert vote[1] > vote[0] > vote[2]
    assert nearness(hits([("a", 0.2), ("b", 0.5)]))[1] == 1.0


@pytest.mark.parametrize("unknown", [math.nan, math.inf, -math.inf])
def test_a_neighbour_without_a_similarity_has_no_vote(unknown: float) -> None:
    known = [("a", 0.2), ("b", 0.5)]
    for output in ("a", "other"):
        vote = knn_distribution(hits([*known, (output, unknown)]), CHOICES)
        np.testing.assert_array_equal(vote, knn_distribution(hits(known), CHOICES))
    assert knn_distribution(hits([("a", unknown), ("other", 0.4)]), CHOICES) is None


def test_without_choices_there_is_no_vote() -> None:
    assert knn_distribution(hits([("a", 0.2)]), ()) is None
