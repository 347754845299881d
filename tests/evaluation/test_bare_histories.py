"""A text without an output costs the same in the experiment's training as in the updater's: its next-token loss."""

from datetime import UTC, date, datetime

import numpy as np
import pytest
import torch

from evaluation.corpus import Item
from evaluation.prompting import example as learnt
from oppu.lm.base import LoadedBase, ready
from oppu.lm.model import TorchModel
from oppu.lm.port import Example, TrainConfig, TrainJob
from oppu.settings import ModelSettings
from oppu.tasks import load_tasks
from oppu.values import Event, EventId, UserId
from tests.oppu.lm.conftest import byte_tokenizer, tiny_model
from updater import examples

TASKS = load_tasks()
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def base() -> LoadedBase:
    cpu = torch.device("cpu")
    return ready("llama", tiny_model("llama"), byte_tokenizer(), "0" * 32, device=cpu, dtype=torch.float64)


def by_hand(text: str) -> float:
    """Mean of −log p of each byte of " text" and the end, after the start token, by the plain model."""
    own = base()
    ids = [own.tokenizer.bos_token_id, *own.tokenizer(f" {text}")["input_ids"], own.tokenizer.eos_token_id]
    with torch.no_grad():
        logits = own.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -float(np.mean([float(logits[at, token]) for at, token in enumerate(ids[1:])]))


def phrased(task: str, text: str) -> tuple[Example, Example]:
    choices = TASKS[task].labels
    item = Item("i", "u", task, date(2026, 1, 1), text, "", choices)
    [event] = examples.usable([Event(UserId("u"), 1, EventId("e"), task, NOW, NOW, text, " ")], TASKS)
    return learnt(item), examples.example(event, TASKS)


@pytest.mark.parametrize("task", ["citation", "tweet_paraphrase"])
def test_both_train_by_the_hand_computed_loss(task: str) -> None:
    model = TorchModel(base(), TASKS, settings=ModelSettings(max_tokens=96, lora_rank=2), slots=1)
    text = "a title of mine"
    wanted = by_hand(text)
    for example in phrased(task, text):
        job = TrainJob(UserId("u"), None, (example,))
        [trained] = model.train([job], TrainConfig(1e-2, 0.0, 1, 1), heartbeat=lambda: None)
        assert trained.mean_loss == pytest.approx(wanted)
        assert model.losses([example], trained.tensors)[0] < wanted
