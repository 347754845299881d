"""What of the user's own history gets into an answer, and what is said of what does not."""

import math
from datetime import UTC, datetime

import numpy as np
import pytest

from inference.evidence import Personal
from oppu.values import Event, EventId, UserId, UserState
from retriever.port import Degradation, Hit, Profile, Retrieved

ANNA = UserState(UserId("anna"), 0, 9, None)
AT = datetime(2026, 1, 1, tzinfo=UTC)


def _hit(seq: int, output: str, similarity: float) -> Hit:
    event = Event(ANNA.user_id, seq, EventId(f"e{seq}"), "label", AT, AT, "words", output)
    return Hit(event, similarity)


def _profile(through: int, line: str = "likes a", **prior: float) -> Profile:
    return Profile(ANNA.user_id, "v1", through, prior, line)


def test_neighbours_without_a_similarity_have_no_vote() -> None:
    personal = Personal(ANNA, Retrieved((), (_hit(1, "a", math.nan), _hit(2, "b", 0.5)), 9))
    vote = personal.knn(("a", "b"))
    assert vote is not None and vote[1] > vote[0]
    assert np.isfinite(vote).all()


@pytest.mark.parametrize("neighbours", [(), (_hit(1, "other", 0.9),), (_hit(1, "a", math.nan),)])
def test_no_vote_where_no_neighbour_gave_any_of_the_choices(neighbours: tuple[Hit, ...]) -> None:
    assert Personal(ANNA, Retrieved((), neighbours, 9)).knn(("a", "b")) is None
    assert Personal(ANNA).knn(("a", "b")) is None


def test_neighbours_that_say_nothing_of_what_is_asked_are_no_voices() -> None:
    neighbours = (_hit(1, "b", 0.1), _hit(2, "other", 0.9), _hit(3, "a", math.nan), _hit(4, " ", 0.2))
    personal = Personal(ANNA, Retrieved((_hit(5, "a", math.nan),), neighbours, 9))
    assert [hit.event.seq for hit in personal.voices(("a", "b"))] == [1]
    assert [hit.event.seq for hit in personal.voices(())] == [1, 2]
    assert Personal(ANNA).voices(("a", "b")) == ()


def test_an_empty_profile_is_none() -> None:
    assert Personal(ANNA, profile=_profile(9, line="")).profiled is None
    assert Personal(ANNA, profile=_profile(9, line="", a=1.0)).profiled is not None
    assert Personal(ANNA, profile=_profile(9)).profiled is not None


def test_whole_evidence_is_not_degraded() -> None:
    assert Personal(ANNA, Retrieved((), (), 9), _profile(9)).degraded(behind=False) == []
    assert Personal(None).degraded(behind=False) == []


@pytest.mark.parametrize(
    ("personal", "behind", "expected"),
    [
        (Personal(None), True, [("history", "history_behind")]),
        (Personal(ANNA, Retrieved((), (), 8)), False, [("retrieval", "history_behind")]),
        (
            Personal(ANNA, Retrieved((), (), 9, Degradation.EMBEDDER_MISMATCH)),
            False,
            [("retrieval", "embedder_mismatch")],
        ),
        (
            Personal(ANNA, Retrieved((), (), 0, Degradation.EPOCH_BEHIND), _profile(0)),
            False,
            [("retrieval", "epoch_behind"), ("profile", "history_behind")],
        ),
    ],
)
def test_every_lack_is_named(personal: Personal, behind: bool, expected: list[tuple[str, str]]) -> None:
    assert [(fault.part, fault.reason) for fault in personal.degraded(behind=behind)] == expected
