"""The whole path on each model family, from a folder: adapt, select targets, train, score, generate, as PEFT does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oppu.lm.adaption import AdaptConfig, adapt
from oppu.lm.base import load_base
from oppu.lm.model import TorchModel
from oppu.lm.port import AdapterRef, Example, Row, TrainConfig, TrainJob
from oppu.lm.targets import find_targets
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from oppu.values import UserId
from tests.oppu.lm.conftest import byte_tokenizer, tiny_model

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")
LABELS = ("crime", "comedy", "sports")
USERS = LABELS[:2]
CONFIG = TrainConfig(learning_rate=2e-2, weight_decay=0.01, passes=4, batch=4, schedule="linear")


def examples(label: str) -> list[Example]:
    made = [Example("news_categorize", f"article {n} with some words", label, LABELS) for n in range(4)]
    made += [Example("news_headline", f"article {n}", f"{label} {n}") for n in range(2)]
    return [*made, Example("tweet_paraphrase", f"my {label} again", "")]


@pytest.mark.parametrize("family", FAMILIES)
def test_from_folder_to_answers(
    family: str, tasks: Tasks, settings: ModelSettings, tmp_path: Path, as_peft: Callable[..., Any]
) -> None:
    source = tmp_path / "source"
    plain = tiny_model(family)
    plain.save_pretrained(str(source))
    byte_tokenizer().save_pretrained(str(source))
    own = settings.model_copy(update={"base": str(source), "dtype": "float32"})
    config = AdaptConfig("lora", epochs=1, learning_rate=1e-2, batch=4)
    adapt(load_base(own, adapting=True), tasks, examples("sports"), tmp_path / "made", config=config, settings=own)
    base = load_base(own.model_copy(update={"base": str(tmp_path / "made")}))

    layers: dict[str, Any] = find_targets(base.model, None)
    shapes = {name: tuple(module.weight.shape) for name, module in layers.items()}
    assert shapes == {
        f"model.layers.{layer}.self_attn.{name}": (size, 32)
        for layer in range(2)
        for name, size in (("q_proj", 32), ("v_proj", 16))  # two of four heads are keys and values
    }
    untouched = copy.deepcopy(base)
    model = TorchModel(base, tasks, settings=own, slots=2)
    jobs = [TrainJob(UserId(label), None, tuple(examples(label)), seed=at) for at, label in enumerate(USERS)]
    trained = [result.tensors for result in model.train(jobs, CONFIG, heartbeat=lambda: None)]
    asked = Example("news_headline", "article 9", "comedy 1")
    [target] = model._encoder.targets([asked])
    rows = []
    for label, tensors in zip(USERS, trained, strict=True):
        assert tensors is not None
        assert model.losses(examples(label), tensors).mean() < model.losses(examples(label), None).mean()
        peft = as_peft(untouched, dict(tensors), model.adapter_config())
        with torch.no_grad():
            logits = peft(input_ids=torch.tensor([target.ids])).logits[0].log_softmax(-1)
        by_hand = -np.mean([float(logits[p, a.index]) for p, a in zip(target.positions, target.aims, strict=True)])
        assert model.losses([asked], tensors)[0] == pytest.approx(by_hand, rel=1e-4)
        name = AdapterRef(UserId(label), 0, 1)
        model.install(name, tensors)
        rows.append(Row("news_categorize", "article 9 with some words", choices=LABELS, adapter=name))
        rows.append(Row("news_headline", "article 9", adapter=name, max_new_tokens=5))
    answers = model.answer(rows)
    assert [LABELS[int(answer.scores.argmax())] for answer in answers[::2]] == list(USERS)
    assert all(answer.text is not None for answer in answers[1::2])
