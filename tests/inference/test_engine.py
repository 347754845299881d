"""How much a step takes on: pieces of texts by what they write, and the time looked at between chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from inference import engine
from oppu.lm.fake import FakeModel
from oppu.lm.port import Row, Scored
from oppu.settings import InferenceSettings, LimitsSettings, Settings

if TYPE_CHECKING:
    from retriever.port import Query, Retrieved
    from tests.inference.conftest import World

MakeWorld = Callable[..., "World"]
LIMIT = 100
MANY = 25


class Chunked(FakeModel):
    """Keeps each call's rows, and says when it was asked."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.calls: list[list[Row]] = []
        self.on_answer: Callable[[], None] = lambda: None

    def answer(self, rows: Any) -> list[Scored]:
        self.calls.append(list(rows))
        self.on_answer()
        return super().answer(rows)

    @property
    def sizes(self) -> list[int]:
        """Rows of each call."""
        return [len(rows) for rows in self.calls]


@pytest.fixture
def wide(settings: Settings) -> Settings:
    """Return settings whose pieces rows alone do not bound."""
    inference = InferenceSettings(batch=64, resident_adapters=64)
    return settings.model_copy(update={"inference": inference, "limits": LimitsSettings(max_new_tokens=LIMIT)})


def texts(world: World, count: int, tokens: int, *, first: int = 0) -> None:
    for number in range(first, first + count):
        world.ask("anna", f"r{number:02}", task="write", options={"max_new_tokens": tokens})


def labels(world: World, count: int, *, first: int = 0) -> None:
    for number in range(first, first + count):
        world.ask("anna", f"r{number:02}")


@pytest.mark.parametrize("limited", [True, False])
def test_texts_are_written_in_pieces_of_so_many_tokens(wide: Settings, make_world: MakeWorld, limited: bool) -> None:
    model = Chunked()
    world = make_world(wide, model=model)
    if limited:
        texts(world, MANY, LIMIT)
    else:  # the task's own limit, of 4 tokens, counts
        for number in range(MANY):
            world.ask("anna", f"r{number:02}", task="write")
    world.turn()
    assert model.sizes == ([20, 5] if limited else [MANY])
    assert all(sum(row.max_new_tokens for row in rows) <= engine.PIECE_TOKENS for rows in model.calls)
    assert [p.status for p in world.predictions()] == ["ok"] * MANY


def test_what_is_asked_beyond_the_limit_does_not_count(
    wide: Settings, make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PIECE_TOKENS", 8)
    model = Chunked()
    world = make_world(wide.model_copy(update={"limits": LimitsSettings(max_new_tokens=2)}), model=model)
    for number in range(8):
        world.ask("anna", f"r{number}", task="write")  # the task allows 4
    world.turn()
    assert model.sizes == [4, 4]


def test_a_lone_text_may_write_more(wide: Settings, make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PIECE_TOKENS", 8)
    model = Chunked()
    world = make_world(wide, model=model)
    texts(world, 3, 9)
    world.turn()
    assert model.sizes == [1, 1, 1]
    assert [p.status for p in world.predictions()] == ["ok"] * 3


def test_choices_are_not_cut_by_tokens(wide: Settings, make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "PIECE_TOKENS", 1)
    model = Chunked()
    world = make_world(wide, model=model)
    labels(world, 60)
    texts(world, 1, 9, first=60)
    labels(world, 13, first=61)
    texts(world, 2, 9, first=74)
    world.turn()
    assert model.sizes == [64, 11, 1]


def test_a_step_of_texts_ends_soon_after_its_budget(wide: Settings, make_world: MakeWorld) -> None:
    """With a model that takes 5 ms a token."""
    model, count = Chunked(), 40
    world = make_world(wide, model=model)
    model.on_answer = lambda: world.clock.advance(0.005 * sum(row.max_new_tokens for row in model.calls[-1]))
    texts(world, count, LIMIT)
    times, handled = [world.clock.monotonic()], 0
    while handled < count:
        outcome = world.turn()
        assert outcome is not None and outcome.handled > 0
        handled += outcome.handled
        times.append(world.clock.monotonic())
    longest = engine.STEP_BUDGET_SECONDS + 0.005 * engine.PIECE_TOKENS
    assert max(after - before for before, after in pairwise(times)) <= longest
    assert [(p.request_id, p.status) for p in world.predictions()] == [(f"r{n:02}", "ok") for n in range(count)]
    assert model.sizes == [20] * 2


def test_the_time_is_looked_at_after_each_chunk_of_a_piece(settings: Settings, make_world: MakeWorld) -> None:
    """Adapters that do not fit beside each other cut a piece: the step ends between, and nothing is passed over."""
    one = settings.model_copy(update={"inference": InferenceSettings(batch=4, resident_adapters=1)})
    model = Chunked(slots=1)
    world = make_world(one, model=model)
    model.on_answer = lambda: world.clock.advance(engine.STEP_BUDGET_SECONDS)
    for user in ("anna", "bert", "cleo"):
        world.remember(user, [("goal match", "sport")])
        world.publish(user, "art")
    for number, user in enumerate(("anna", "bert", "cleo")):
        world.ask(user, f"r{number}")
    handled = []
    for _ in range(3):
        outcome = world.turn()
        assert outcome is not None
        handled.append(outcome.handled)
    assert (handled, model.sizes) == ([1, 1, 1], [1, 1, 1])
    assert [(p.request_id, p.status) for p in world.predictions()] == [("r0", "ok"), ("r1", "ok"), ("r2", "ok")]


@pytest.mark.parametrize(
    ("evidence", "order"),
    [
        ("none", ["retrieve 1", "model", "retrieve 2"]),
        ("text", ["retrieve 1", "model", "retrieve 2"]),
        ("all", ["retrieve 3", "model"]),
    ],
)
def test_evidence_is_gathered_after_the_model_where_its_row_holds_none(
    wide: Settings, make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, evidence: str, order: list[str]
) -> None:
    """Meanwhile the queries are embedded; a text is written from caches, so its own come first."""
    model_settings = wide.model.model_copy(update={"prompt_evidence": evidence})
    model, happened = Chunked(), list[str]()
    world = make_world(wide.model_copy(update={"model": model_settings}), model=model)
    retrieve = world.retriever.retrieve

    def noted(queries: Sequence[Query]) -> list[Retrieved]:
        happened.append(f"retrieve {len(queries)}")
        world.clock.advance(0.5)
        return retrieve(queries)

    monkeypatch.setattr(world.retriever, "retrieve", noted)
    model.on_answer = lambda: happened.append("model")
    world.remember("anna", [("red apple", "art")])
    world.remember("anna", [("green tree", "a title")], task="write")
    texts(world, 1, 4)
    labels(world, 2, first=1)
    world.turn()
    assert happened == order
    answers = world.predictions()
    assert all(answer.provenance is not None and answer.provenance.retrieved for answer in answers)
    assert {answer.timings["retrieve"] for answer in answers} == {500.0 * (len(order) - 1)}
