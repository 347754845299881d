"""Choices that branch much along one prompt: read once or line by line, the scores are the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from oppu.lm import choices
from oppu.lm.forward import Runner
from oppu.lm.model import TorchModel
from oppu.lm.port import AdapterRef, Row
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from oppu.values import UserId

Make = Callable[..., Any]
FAMILIES = ("bert", "gpt2", "opt", "llama", "mistral", "gemma2", "gemma3", "qwen3")
ANNA = AdapterRef(UserId("anna"), 0, 1)
MANY = tuple(f"{word} {end}" for word in ("car", "cart", "house", "hour", "a", "sea") for end in ("yes", "no", "nota"))
FEW = ("politics", "crime", "comedy")
TEXT = "an article of some length " * 3


def rows(adapter: AdapterRef | None) -> list[Row]:
    asked = [("short", MANY), (TEXT, MANY), (TEXT, FEW), (TEXT, tuple(f"car {end}" for end in "abc"))]
    return [Row("news_categorize", text, choices=own, adapter=adapter) for text, own in asked]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [130, 4096])
def test_a_prompt_that_is_read_once_scores_as_one_read_again(
    make_base: Make, make_adapter: Make, tasks: Tasks, settings: ModelSettings,
    monkeypatch: pytest.MonkeyPatch, family: str, tokens: int,
) -> None:  # fmt: skip
    base = make_base(family, torch.float64)
    model = TorchModel(base, tasks, settings=settings, slots=2)
    model.install(ANNA, make_adapter(base.model, 1))
    asked = [*rows(None), *rows(ANNA)]
    monkeypatch.setattr(choices, "_AGAIN_SHARE", 1e-9)  # nothing branches enough
    again = model.answer(asked)
    model._runner.tokens = tokens  # few: a prompt's lines do not fit into one forward
    monkeypatch.setattr(choices, "_AGAIN_SHARE", float("inf"))
    once: list[int] = []
    read = choices.read_branches

    def noted(*args: Any) -> Any:
        once.append(len(args[3].lines))
        return read(*args)

    monkeypatch.setattr(choices, "read_branches", noted)
    found = model.answer(asked)
    assert once == [6] * 6  # the long choices of four rows, two of them with an adapter too
    for one, other in zip(found, again, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-9)
        np.testing.assert_allclose(one.base_scores, other.base_scores, atol=1e-9)
        assert np.exp(one.scores).sum() == pytest.approx(1)


@pytest.mark.parametrize("branches", [False, True])
def test_nested_choices_are_read_within_what_a_forward_holds_in_logits(
    make_base: Make, make_adapter: Make, tasks: Tasks, settings: ModelSettings,
    monkeypatch: pytest.MonkeyPatch, branches: bool,
) -> None:  # fmt: skip
    base = make_base("llama", torch.float64)
    model = TorchModel(base, tasks, settings=settings, slots=1)
    model.install(ANNA, make_adapter(base.model, 1))
    monkeypatch.setattr(choices, "_AGAIN_SHARE", float("inf") if branches else 1e-9)
    nested = tuple(first + " a" * times for first in ("b", "c", "bc", "bd", "d" * 30) for times in range(9))
    asked = [Row("news_categorize", text, choices=nested, adapter=ANNA) for text in ("one", "other")]
    wanted = model.answer(asked)

    read: list[tuple[int, int]] = []  # rows and positions of each forward
    picking = Runner._picking

    def noted(self: Runner, picked: Any, narrow: Any) -> Any:
        read.append((len({row for row, _ in picked}), len(picked)))
        return picking(self, picked, narrow)

    monkeypatch.setattr(Runner, "_picking", noted)
    model._runner.packs = False
    model._runner.reads = 24  # a row of nested choices reads eight or nine, but for one that reads more
    found = model.answer(asked)
    assert max(reads for _, reads in read) > 8  # several positions a row
    assert all(reads <= 24 or rows == 1 for rows, reads in read)
    assert max(rows for rows, _ in read) > 1  # and several rows a forward, still
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-9)
        np.testing.assert_allclose(one.base_scores, other.base_scores, atol=1e-9)


def test_one_row_may_read_more_than_a_forward_holds_in_logits(
    make_base: Make, tasks: Tasks, settings: ModelSettings
) -> None:
    model = TorchModel(make_base("llama"), tasks, settings=settings, slots=1)
    model._runner.reads = 1
    [found] = model.answer([Row("news_categorize", "one", choices=tuple("a" + " a" * times for times in range(9)))])
    assert np.exp(found.scores).sum() == pytest.approx(1)


def test_many_choices_do_not_read_their_prompt_many_times(
    make_base: Make, tasks: Tasks, settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TorchModel(make_base("llama"), tasks, settings=settings, slots=1)
    read: list[int] = []
    padded = Runner.padded

    def counted(self: Runner, sequences: Any) -> torch.Tensor:
        ids = padded(self, sequences)
        read.append(ids.numel())
        return ids

    monkeypatch.setattr(Runner, "padded", counted)
    most = tuple(f"w{a:03d} {end}" for a in range(250) for end in ("yes", "no"))
    [answer] = model.answer([Row("news_categorize", TEXT, choices=most)])
    assert len(answer.scores) == 500
    assert sum(read) < 250 * 10  # a line is six tokens, the prompt about ninety
