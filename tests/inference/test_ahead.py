"""Queries that are embedded ahead, while the model runs: the answers are those of a worker that embeds when it asks."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference import engine, worker
from inference.admission import admit
from oppu.effects import perform
from oppu.embedder import HashEmbedder
from oppu.errors import TransientError
from oppu.settings import Settings, StoreSettings
from oppu.values import Record, UserId
from retriever.port import Query
from tests.inference.conftest import LABELS, World

USERS = ("anna", "bert", "carl")
PAIRS = [("red apple", LABELS[0]), ("blue sky", LABELS[1]), ("green tree", LABELS[0])]
COUNT, QUERY = 30, "a red sky"


class Counting(HashEmbedder):
    """Remembers what it embeds; stumbles over one text."""

    def __init__(self, refused: str = "") -> None:
        super().__init__()
        self.calls: list[list[str]] = []
        self.refused = refused

    @property
    def asked(self) -> list[str]:
        """All texts of requests."""
        return [text for call in self.calls for text in call if text.startswith(QUERY)]

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        self.calls.append(list(texts))
        if self.refused in texts:
            raise ValueError("a text that cannot be embedded")
        return super().embed(texts)


Make = Callable[[HashEmbedder, bool], World]


@pytest.fixture
def make(settings: Settings, make_world: Callable[..., World], tmp_path: Path) -> Make:
    """Return a maker of worlds, each with a store of its own, by embedder and whether it has a thread."""

    def build(embedder: HashEmbedder, ahead: bool) -> World:
        url = f"sqlite:///{tmp_path}/{'ahead' if ahead else 'plain'}.db"
        own = settings.model_copy(update={"store": StoreSettings(url=url)})
        world = make_world(own, embedder=embedder, ahead=ThreadPoolExecutor(1, "ahead") if ahead else None)
        for user in USERS:
            world.remember(user, PAIRS)
        for number in range(COUNT):
            world.ask(USERS[number % 3], f"r{number:02}", input=f"{QUERY} {number}")
        return world

    return build


def answers(world: World) -> list[dict[str, Any]]:
    return [prediction.model_dump(exclude={"timings"}) for prediction in world.predictions()]


def test_it_changes_no_answer(make: Make) -> None:
    plain, ahead = make(HashEmbedder(), False), make(HashEmbedder(), True)
    plain.turn()
    ahead.turn()
    assert len(answers(ahead)) == COUNT
    assert answers(ahead) == answers(plain)
    assert all(answer["provenance"]["retrieved"] for answer in answers(ahead))


def test_a_whole_poll_is_embedded_at_once(make: Make) -> None:
    embedder = Counting()
    make(embedder, True).turn()
    assert [len(call) for call in embedder.calls if call[0].startswith(QUERY)] == [COUNT]


def test_what_a_step_did_not_reach_is_not_embedded_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Counting()
    world = make(embedder, True)
    monkeypatch.setattr(engine, "STEP_BUDGET_SECONDS", 0.0)
    steps = -(-COUNT // world.settings.inference.batch)
    for step in range(1, steps + 1):
        world.turn()
        assert len(answers(world)) == min(COUNT, step * world.settings.inference.batch)
    assert sorted(embedder.asked) == sorted(f"{QUERY} {n}" for n in range(COUNT))


@pytest.mark.parametrize("leave", ["recover", "close"])
def test_what_will_not_be_asked_again_is_forgotten(make: Make, monkeypatch: pytest.MonkeyPatch, leave: str) -> None:
    embedder = Counting()
    world = make(embedder, True)
    monkeypatch.setattr(engine, "STEP_BUDGET_SECONDS", 0.0)
    world.turn()
    if leave == "recover":
        perform(world.worker.recover(TransientError("rebalanced")))
    else:
        world.worker.close()
    first = len(embedder.asked)
    world.retriever.retrieve(
        [Query(world.store.users([UserId("anna")], world.model.base)[UserId("anna")], "label", f"{QUERY} 29", 4, 4)]
    )
    assert len(embedder.asked) == first + 1


def test_a_text_that_cannot_be_embedded_stops_no_other_batch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a thread: the batches before it are answered, and its own ends the worker, whose guard finds it."""
    world = make(Counting(refused=f"{QUERY} 29"), True)
    monkeypatch.setattr(engine, "STEP_BUDGET_SECONDS", 0.0)
    with pytest.raises(ValueError, match="cannot be embedded"):
        for _ in range(COUNT):
            world.turn()
    assert COUNT - 2 * world.settings.inference.batch <= len(answers(world)) < COUNT


@pytest.mark.parametrize("recovered", [False, True])
def test_a_request_that_waits_is_parsed_once(make: Make, monkeypatch: pytest.MonkeyPatch, recovered: bool) -> None:
    """Unless it is read again."""
    parsed = list[bytes | None]()

    def noted(record: Record, *rest: Any) -> Any:
        parsed.append(record.value)
        return admit(record, *rest)

    monkeypatch.setattr(worker, "admit", noted)
    monkeypatch.setattr(engine, "STEP_BUDGET_SECONDS", 0.0)
    world = make(HashEmbedder(), False)
    world.turn()
    assert len(parsed) == COUNT
    if recovered:
        perform(world.worker.recover(TransientError("rebalanced")))
        world.held = []
    while len(answers(world)) < COUNT:
        world.turn()
    left = COUNT - world.settings.inference.batch
    assert len(parsed) == COUNT + (left if recovered else 0)
