"""Adapters are trained under the prompts they serve: a request and the event that it becomes have one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import pytest

from oppu.lm.fake import FakeModel
from oppu.lm.port import Example, Row, Scored
from oppu.settings import Settings, UpdaterSettings
from oppu.tasks import Task, Tasks
from oppu.values import UserId
from updater.job import Job
from updater.material import Gatherer, Prompts
from updater.state import Machine

if TYPE_CHECKING:
    from tests.inference.conftest import World

TASKS = Tasks(
    {
        "label": Task("label", "choice", "{input}", "is", labels=("art", "law", "sport", "war")),
        "rate": Task("rate", "rating", "{input}", "is", labels=("1", "2", "3", "4", "5")),
        "write": Task("write", "text", "{input}", "is", max_new_tokens=4),
    }
)
DONE = {"label": "war", "rate": "4", "write": "a few words"}


class Watched(FakeModel):
    """Keeps every row that it was asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Row] = []

    def answer(self, rows: Sequence[Row]) -> list[Scored]:
        self.rows.extend(rows)
        return super().answer(rows)


def trained(world: World) -> Example:
    """How the updater phrases the user's last event."""
    base = world.model.base
    world.store.register_base(base)
    claim = world.store.claim(base, UserId("anna"), holder="test", ttl_seconds=60)
    assert claim is not None
    prompts = Prompts(world.retriever, world.settings.model, world.settings.retriever.k)
    gatherer = Gatherer(
        world.store, world.adapters, TASKS, UpdaterSettings(), world.metrics, world.model.check, prompts
    )
    return gatherer.gather(Job(claim, Machine("anna", world.metrics), "anna")).pending[-1]


@pytest.mark.parametrize("task", sorted(DONE))
@pytest.mark.parametrize("setting", ["none", "text", "all"])
def test_a_request_and_its_event_have_one_prompt(
    settings: Settings, make_world: Callable[..., World], setting: Literal["none", "text", "all"], task: str
) -> None:
    model = Watched()
    changed = settings.model.model_copy(update={"prompt_evidence": setting})
    world = make_world(settings.model_copy(update={"model": changed}), model=model)
    world.remember("anna", [(f"text {n}", DONE[task]) for n in range(9)], task)
    world.ask("anna", "r1", task=task, input="text 5 again")
    world.turn()
    (row,) = model.rows
    world.remember("anna", [("text 5 again", DONE[task])], task)
    made = trained(world)
    assert (row.input, row.choices) == (made.input, made.choices)
    assert (row.evidence, row.profile) == (made.evidence, made.profile)
    assert bool(row.evidence) == bool(row.profile) == changed.prompts_hold_evidence(row.choices)
