"""Task adaption: the written folder is a base that has learnt the task, by either method."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from oppu.errors import ConfigError
from oppu.lm.adaption import AdaptConfig, adapt
from oppu.lm.base import load_base
from oppu.lm.model import TorchModel
from oppu.lm.port import Example
from oppu.settings import ModelSettings
from oppu.tasks import Tasks

Make = Callable[..., Any]
CHOICES = ("alpha", "beta", "bravo")


def examples(count: int = 48) -> list[Example]:
    """The input's first letter decides the answer; some have evidence, a profile, or text as answer."""
    made = []
    for n in range(count):
        output = CHOICES[n % 3]
        text = f"{output[1]}{n % 7} film"
        evidence = (("x", "beta"),) if n % 4 == 0 else ()
        made.append(Example("movie_tagging", text, output, CHOICES, evidence, "p" if n % 5 == 0 else ""))
    return made


@pytest.mark.parametrize("method", ["full", "lora"])
def test_writes_a_base_that_has_learnt(
    method: Literal["full", "lora"], make_base: Make, tasks: Tasks, settings: ModelSettings, tmp_path: Path
) -> None:
    out = tmp_path / "adapted"
    seen: list[tuple[int, int, float]] = []
    config = AdaptConfig(method=method, epochs=6, learning_rate=1e-2, batch=8)
    report = adapt(
        make_base("llama"),
        tasks,
        [*examples(), Example("news_headline", "some text", "a head")],
        out,
        config=config,
        settings=settings,
        progress=lambda done, total, loss: seen.append((done, total, loss)),
    )
    assert report.steps == 42 == len(seen) and seen[-1][:2] == (42, 42)
    assert report.last_loss < report.first_loss
    base = load_base(settings.model_copy(update={"base": str(out)}))
    assert base.fingerprint == report.base
    before = TorchModel(make_base("llama"), tasks, settings=settings, slots=1).losses(examples(), None)
    after = TorchModel(base, tasks, settings=settings, slots=1).losses(examples(), None)
    assert after.mean() < 0.7 * before.mean()
    recipe = json.loads((out / "oppu.json").read_text())
    assert recipe["method"] == method and recipe["from"] == "0" * 32 and recipe["examples"] == 49
    assert not (tmp_path / "adapted.new").exists()


def test_one_seed_makes_one_base(make_base: Make, tasks: Tasks, settings: ModelSettings, tmp_path: Path) -> None:
    def run(seed: int) -> str:
        config = AdaptConfig(epochs=1, batch=16, seed=seed)
        out = tmp_path / "base"  # an earlier result is replaced
        return adapt(make_base("bert"), tasks, examples(), out, config=config, settings=settings).base

    assert run(1) == run(1) != run(2)


def test_faults_are_told_before_any_work(
    make_base: Make, tasks: Tasks, settings: ModelSettings, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError) as caught:
        adapt(make_base("llama", torch.bfloat16), tasks, [], tmp_path, config=AdaptConfig(), settings=settings)
    assert len(caught.value.problems) == 3
    single = [Example("citation", "x", "[1]", ("[1]",))]
    with pytest.raises(ConfigError, match="nothing to learn"):
        adapt(make_base(), tasks, single, tmp_path / "new", config=AdaptConfig(), settings=settings)
    with pytest.raises(ConfigError, match="not a folder"):
        adapt(make_base(), tasks, single, tmp_path / "mine.txt", config=AdaptConfig(), settings=settings)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_divergence_is_told_and_writes_nothing(
    make_base: Make, tasks: Tasks, settings: ModelSettings, tmp_path: Path
) -> None:
    config = AdaptConfig(learning_rate=1e30, epochs=3, batch=8)
    with pytest.raises(ConfigError, match="no longer finite"):
        adapt(make_base(), tasks, examples(), tmp_path / "new", config=config, settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_the_causal_warm_up_sees_no_output(
    make_base: Make, tasks: Tasks, settings: ModelSettings, tmp_path: Path
) -> None:
    other = [Example(e.task, e.input, CHOICES[2 - CHOICES.index(e.output)], CHOICES, e.evidence) for e in examples()]
    ours = [Example(e.task, e.input, e.output, CHOICES, e.evidence) for e in examples()]

    def made(given: list[Example], name: str, answers: bool) -> str:
        config = AdaptConfig(epochs=1, learning_rate=1e-2, batch=8, answers=answers)
        return adapt(make_base(), tasks, given, tmp_path / name, config=config, settings=settings).base

    assert made(ours, "1", False) == made(other, "2", False)
    assert made(ours, "3", True) != made(other, "4", True)
