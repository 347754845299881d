"""PEFT methods on tiny bases: each learns its user alone, and is measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.bases import Study
from evaluation.history import Past
from evaluation.methods import METHODS, VIRTUAL_TOKENS, Tuner, run_methods, tuned
from evaluation.prompting import example
from evaluation.splits import Fold, Person
from evaluation.training import RATES, Recipe
from oppu.errors import ConfigError
from oppu.lm.base import load_base
from oppu.lm.model import TorchModel
from oppu.lm.port import TrainConfig, TrainJob
from oppu.settings import Settings
from tests.evaluation.test_experiment import TASKS
from tests.evaluation.world import item
from tests.oppu.lm.conftest import FAMILIES, byte_tokenizer, tiny_model

pytestmark = [pytest.mark.slow]
RECIPE = Recipe(base_epochs=1, passes=4, batch=4, learning_rate=1e-2)


def person(user: str, output: str, task: str = "pick") -> Person:
    items = tuple(item(user, at, output=output, text=f"{user} {at % 3}", task=task) for at in range(12))
    if task == "write":
        items = tuple(replace(i, choices=(), output=f"{output} {output}") for i in items)
    return Person(user, items, tuple(range(12)), 8)


def study(folder: Path, family: str = "llama", task: str = "pick") -> Study:
    base = folder / "given"
    tiny_model(family).save_pretrained(str(base))
    byte_tokenizer().save_pretrained(str(base))
    settings = Settings.load(
        model={"base": str(base), "max_tokens": 64, "lora_rank": 2, "lora_alpha": 4, "threads": 1, "dtype": "float32"}
    )
    adapt = person("a", "b", task).items
    fold = Fold("all", adapt, (person("c", "a", task),), (person("u", "a", task), person("v", "c", task)))
    people = {"a": len(adapt), "c": 12, "u": 12, "v": 12}
    pasts = {user: [Past(0, None, None, (), "")] * count for user, count in people.items()}
    return Study(fold, pasts, settings, TASKS, folder, RECIPE, 0, lambda _: None)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_method_learns_on_each_family(family: str, name: str, tmp_path: Path) -> None:
    made = study(tmp_path, family)
    own = [example(i) for i in made.fold.target[0].train]
    with tuned(made, name) as tuner:
        before = tuner.losses(own).mean()
        tuner.train(own, TrainConfig(3e-2, 0.0, 6, 4))
        assert tuner.losses(own).mean() < before - 0.01


@pytest.mark.parametrize("name", METHODS)
def test_scores_are_the_losses_and_untrained_adapters_the_bases(name: str, tmp_path: Path) -> None:
    made = study(tmp_path)
    own = [example(i) for i in made.fold.target[0].items]
    with tuned(made, name) as tuner:
        scores, losses = tuner.scores(own), tuner.losses(own)
    np.testing.assert_allclose([-s[e.choices.index(e.output)] for s, e in zip(scores, own, strict=True)], losses, 1e-5)
    settings = made.settings.model.model_copy(update={"base": str(tmp_path / "base-plain" / "1")})
    model = TorchModel(load_base(settings), TASKS, settings=settings, slots=1)
    same = np.allclose(np.stack(model.scores(own, None)), scores, atol=1e-4)
    assert same == (name != "prompt-tuning")  # virtual tokens begin at random, the others at nothing


def test_a_user_does_not_see_who_came_before(tmp_path: Path) -> None:
    made = study(tmp_path)
    both = run_methods(made)
    (tmp_path / "alone").mkdir()
    alone = run_methods(replace(made, folder=tmp_path / "alone", fold=replace(made.fold, target=made.fold.target[1:])))
    for name in METHODS:
        assert both[name].rate == alone[name].rate and both[name].rate in {s * 1e-2 for s in RATES}
        np.testing.assert_array_equal(both[name].scores["v"], alone[name].scores["v"])
    wide, layers, rank = 32, 2, 2
    sizes = {name: both[name].parameters for name in METHODS}
    assert sizes["lora"] == layers * rank * ((wide + wide) + (wide + wide // 2))  # query, and grouped value
    assert sizes["prompt-tuning"] == VIRTUAL_TOKENS * wide
    assert sizes["ia3"] == layers * (16 + 16 + 48)
    for result in both.values():
        assert result.bytes > 4 * result.parameters and result.seconds > 0


def test_lora_by_peft_equals_the_bank(tmp_path: Path) -> None:
    made = study(tmp_path)
    own = [example(i) for i in made.fold.target[0].train]
    with tuned(made, "lora") as tuner:
        start = _tensors(tuner)
        tuner.train(own, TrainConfig(1e-3, 0.01, 3, 4))
        ours = _tensors(tuner)
    from oppu.values import UserId

    settings = made.settings.model.model_copy(update={"base": str(tmp_path / "base-plain" / "1")})
    model = TorchModel(load_base(settings), TASKS, settings=settings, slots=1)
    job = TrainJob(UserId("u"), start, tuple(own))
    [theirs] = model.train([job], TrainConfig(1e-3, 0.01, 3, 4), heartbeat=lambda: None)
    assert theirs.tensors is not None
    for key, value in theirs.tensors.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-3, atol=2e-5)


def test_a_text_task_is_scored_by_its_loss(tmp_path: Path) -> None:
    found = run_methods(study(tmp_path, task="write"))
    assert all(result.scores["u"].shape == (4, 1) and (result.scores["u"] < 0).all() for result in found.values())


def test_a_base_that_a_method_does_not_know_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise ValueError("Please specify `target_modules`")

    monkeypatch.setattr("evaluation.methods.get_peft_model", unknown)
    with pytest.raises(ConfigError, match="--methods: ia3 does not fit"), tuned(study(tmp_path), "ia3"):
        pass


def _tensors(tuner: Tuner) -> dict[str, np.ndarray]:
    state: dict[str, torch.Tensor] = tuner._model.state_dict()
    return {k.replace(".default", ""): v.numpy().copy() for k, v in state.items() if "lora_" in k}
