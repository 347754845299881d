"""The training loops that the bank is compared with."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.bank_train import jobs_of
from benchmarks.peft_training import ATTENTION, PeftLoop, padded
from benchmarks.subjects import base_named
from oppu.lm.port import TrainConfig
from oppu.tasks import load_tasks


def test_every_variant_of_the_loop_trains_alike_by_the_attention_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, config = load_tasks(), TrainConfig(learning_rate=1e-3, weight_decay=0.01, passes=1, batch=4)
    loop = PeftLoop(base_named("offline", device="cpu", dtype="float32"), tasks, config, library=True)
    jobs, fused = jobs_of(2, 4, tasks), ALL_ATTENTION_FUNCTIONS["sdpa"]
    called: list[str] = []

    def counted(*args: object, **kwargs: object) -> object:
        called.append("sdpa")
        return fused(*args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", counted)
    found = {}
    for attention in ATTENTION:
        for bucketed in (False, True):
            called.clear()
            found[attention, bucketed] = loop.train(jobs, bucketed=bucketed, attention=attention)
            assert bool(called) is (attention == "sdpa")
    assert max(found.values()) == pytest.approx(min(found.values()), rel=1e-4)


def test_batches_lie_where_the_base_does() -> None:
    batch = [((1, 2), (3,)), ((4,), (5, 6, 7))]
    assert {values.device.type for values in padded(batch, torch.device("meta")).values()} == {"meta"}
    found = {name: values.tolist() for name, values in padded(batch, torch.device("cpu")).items()}
    assert found["input_ids"] == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert found["labels"] == [[-100, -100, 3, -100], [-100, 5, 6, 7]]
    assert found["attention_mask"] == [[1, 1, 1, 0], [1, 1, 1, 1]]
