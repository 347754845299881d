"""What of the user's own history gets into an answer, and what is said of what does not."""

import math
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

import pytest

from inference.evidence import Personal
from oppu.settings import Settings
from oppu.values import Event, EventId, UserId, UserState
from retriever.lexical import LexicalIndex
from retriever.port import Degradation, Hit, Profile, Retrieved
from tests.inference.conftest import LABELS, World

ANNA = UserState(UserId("anna"), 0, 9, None)
AT = datetime(2026, 1, 1, tzinfo=UTC)
WORDS = ("red apple", "blue sky", "green tree")


def _hit(seq: int, output: str, similarity: float) -> Hit:
    event = Event(ANNA.user_id, seq, EventId(f"e{seq}"), "label", AT, AT, "words", output)
    return Hit(event, similarity)


def _profile(through: int, line: str = "likes a", **prior: float) -> Profile:
    return Profile(ANNA.user_id, "v1", through, prior, line)


def test_neighbours_without_a_similarity_are_none() -> None:
    personal = Personal(ANNA, Retrieved((), (_hit(1, "a", math.nan), _hit(2, "b", 0.5)), 9))
    assert [hit.event.seq for hit in personal.neighbours] == [2]
    assert Personal(ANNA).neighbours == ()


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


@pytest.mark.parametrize(("held", "ranked"), [("none", 0), ("text", 0), ("all", len(WORDS))])
def test_items_are_ranked_for_prompts_that_hold_some_and_neighbours_vote_in_any_case(
    settings: Settings, make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, held: str, ranked: int
) -> None:
    indexed: list[str] = []
    extend = LexicalIndex.extend

    def noted(self: LexicalIndex, texts: Iterable[str]) -> None:
        indexed.extend(kept := list(texts))
        extend(self, kept)

    monkeypatch.setattr(LexicalIndex, "extend", noted)
    model = settings.model.model_copy(update={"prompt_evidence": held})
    world = make_world(settings.model_copy(update={"model": model}))
    world.remember("anna", [(words, LABELS[at % 2]) for at, words in enumerate(WORDS)])
    world.ask("anna", "one", input="red apple")
    world.ask("anna", "bare", input="red apple", options={"retrieve": 0})
    world.turn()
    assert len(indexed) == ranked
    one, bare = world.answer("one").provenance, world.answer("bare").provenance
    assert one is not None and bare is not None
    assert set(one.retrieved) == {f"anna-{at}" for at in range(len(WORDS))} and not bare.retrieved
