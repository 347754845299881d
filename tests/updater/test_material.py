"""What stands beside an event in its prompt: earlier items only, and only where serving puts any."""

from typing import Literal

import pytest

from oppu.embedder import HashEmbedder
from oppu.settings import ModelSettings, RetrieverSettings
from retriever.service import Retriever
from tests.updater.world import GLAD, World, published
from updater.material import Prompts


def test_training_prompts_carry_only_earlier_items(world: World) -> None:
    retriever = Retriever(world.store, HashEmbedder(), RetrieverSettings(mode="recency"), world.metrics)
    updater = world.new_updater("with evidence", prompts=Prompts(retriever, ModelSettings(prompt_evidence="all"), 2))
    world.act("ada", GLAD)
    outcome = world.tick(updater)
    assert outcome.claimed == 1
    (job,) = world.model.jobs[-1]
    for made in job.examples:
        seq = int(made.input.removeprefix("input "))
        assert len(made.evidence) == min(seq - 1, 2)
        assert all(int(text.removeprefix("input ")) < seq for text, _ in made.evidence)
    retriever.close()


@pytest.mark.parametrize(("setting", "of_choices", "of_texts"), [("none", 0, 0), ("text", 0, 1), ("all", 1, 1)])
def test_the_kind_of_task_decides_what_stands_in_the_prompt(
    world: World, setting: Literal["none", "text", "all"], of_choices: int, of_texts: int
) -> None:
    retriever = Retriever(world.store, HashEmbedder(), RetrieverSettings(mode="recency"), world.metrics)
    prompts = Prompts(retriever, ModelSettings(prompt_evidence=setting), 1)
    for _ in range(5):
        world.act("ada", ["glad"])
        world.act("ada", ["a title"], task="title")
    world.tick(world.new_updater("with prompts", prompts=prompts))
    (job,) = world.model.jobs[-1]
    later = [e for e in job.examples if e.input not in ("input 1", "input 2")]  # something came before them
    for made in later:
        expected = of_choices if made.choices else of_texts
        assert (len(made.evidence), bool(made.profile)) == (expected, bool(expected)), made.task
    assert {bool(made.choices) for made in later} == {True, False}
    retriever.close()


def test_plain_prompts_by_default(world: World) -> None:
    published(world)
    assert all((e.evidence, e.profile) == ((), "") for e in world.model.jobs[-1][0].examples)
