"""The serving benchmark on the real base: everybody computes the same, and the base that is compared with is bare."""

from typing import cast

import pytest
import torch

from benchmarks import bank_serve
from benchmarks.bank_serve import Scope, against_others, on_prompts, sweep_users
from benchmarks.batch_mates import changed_by_batch_mates
from benchmarks.subjects import banked, bare, base_named
from oppu.lm.hardware import fast_bfloat16
from oppu.tasks import load_tasks


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bank_and_peft_agree_and_every_ratio_is_there(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == "bfloat16" and not fast_bfloat16("cpu"):
        pytest.skip("this CPU does not multiply bfloat16 itself")
    for name, few in (("ROWS", 4), ("WIDE_ROWS", 8), ("DECODED", 2)):
        monkeypatch.setattr(bank_serve, name, few)
    scope = Scope(tokens=(1, 8), ranks=(8,), users=(1, 4), wide_tokens=(1,), repeats=1)
    base = base_named("offline", device="cpu", dtype=dtype)
    rows = [*against_others(base, scope), *sweep_users(base, scope, None), on_prompts(base, load_tasks(None), scope)]
    assert [row["distinct_users"] for row in rows] == [4, 4, 1, 4, 4]
    assert [row["tokens"] for row in rows[:4]] == [1, 8, 1, 1]
    shortest, mean, longest = (cast(float, rows[4][name]) for name in ("shortest", "tokens", "longest"))
    assert shortest < mean < longest
    for row in rows:
        names = ("ratio_to_base", "ratio_to_well_run_base", "ratio_to_peft_set_adapter", "ratio_to_peft_adapter_names")
        found = [row[name] for name in (names if row["rows"] == 4 else names[:2])]
        assert all(cast(float, ratio) > 0 for ratio in found)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_mates_turn_no_answer_but_near_ties(dtype: str) -> None:
    if dtype == "bfloat16" and not fast_bfloat16("cpu"):
        pytest.skip("this CPU does not multiply bfloat16 itself")
    base = base_named("offline", device="cpu", dtype=dtype)
    found = changed_by_batch_mates(base, load_tasks(None), users=16, questions=4)
    assert found.answers == 2 * 64
    assert found.largest_difference <= (1e-4 if dtype == "float32" else 0.2)
    assert found.flipped_share <= (0 if dtype == "float32" else 0.05)


def test_the_base_that_is_compared_with_stays_as_it_comes() -> None:
    base = base_named("offline", device="cpu", dtype="float32")
    ids = {"input_ids": torch.tensor([[1000, 2000, 3000]])}
    before = bare(base, ids)
    subject = banked(base, slots=1, rank=2, alpha=4)
    own = subject.run([(1000, 2000, 3000)], [1])
    assert torch.equal(bare(base, ids), before)
    assert not torch.equal(own, before)
    touched = [module for module in base.model.modules() if module._forward_hooks or "forward" in vars(module)]
    assert not touched
    subject.close()
