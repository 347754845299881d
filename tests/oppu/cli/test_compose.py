"""What the composition root makes of the settings."""

from datetime import UTC, datetime

import pytest

from oppu.cli import compose
from oppu.effects import perform
from oppu.embedder import HashEmbedder
from oppu.metrics import fresh
from oppu.settings import Settings
from tests.updater.world import GLAD, World


@pytest.mark.parametrize(("setting", "items"), [("none", 0), ("text", 0), ("all", 3)])
def test_the_updater_trains_on_the_prompts_that_are_served(
    world: World, monkeypatch: pytest.MonkeyPatch, setting: str, items: int
) -> None:
    monkeypatch.setattr(compose, "model", lambda settings, *, slots: world.model)
    monkeypatch.setattr(compose, "embedder", lambda settings: HashEmbedder())
    monkeypatch.setenv("OPPU_MODEL__PROMPT_EVIDENCE", setting)
    monkeypatch.setenv("OPPU_RETRIEVER__K", "3")
    world.act("ada", GLAD * 2)
    updater = compose.updater(Settings.load(), fresh())
    perform(updater.open())
    assert perform(updater.tick(datetime.now(UTC))).claimed == 1
    (job,) = world.model.jobs[-1]
    late = [made for made in job.examples if int(made.input.removeprefix("input ")) > 20]
    assert {len(made.evidence) for made in late} == {items}
    updater.store.close()
