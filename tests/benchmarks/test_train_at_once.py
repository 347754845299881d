"""What is said of a GPU: measured on one, and otherwise not at all."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner

from benchmarks import bank_train
from benchmarks.peft_training import Job
from benchmarks.train_at_once import NOT_MEASURED, Device, Train, at_once, on_gpu
from oppu.cli import Session
from oppu.cli.bench import bench


class _Gpu:
    """What is loaded stays; what is trained is given back."""

    def __init__(self) -> None:
        self.loaded = self.most = 0

    def held(self) -> int:
        return self.loaded

    def peak(self, work: Callable[[], object]) -> int:
        self.most = 0
        work()
        return self.loaded + self.most


def _loader(gpu: _Gpu, own: int, a_user: int) -> Callable[[], Train]:
    def load() -> Train:
        gpu.loaded += own

        def train(jobs: Sequence[Job]) -> None:
            gpu.most = a_user * len(jobs)

        return train

    return load


def test_memory_is_each_subjects_own_and_speed_is_of_all_users_at_once() -> None:
    gpu = _Gpu()
    subjects = {"bank": (_loader(gpu, 100, 2), (1, 4)), "PEFT": (_loader(gpu, 50, 0), (1,))}
    found = cast(dict[str, Any], at_once(cast(Device, gpu), subjects, [()] * 4, repeats=2))
    assert found["memory_bytes"] == {"1": {"bank": 102, "PEFT": 50}, "4": {"bank": 108, "PEFT": NOT_MEASURED}}
    speed = found["updates_per_second"]
    assert speed["1"]["bank"] > 0 and speed["1"]["PEFT"] > 0 and speed["4"]["bank"] > 0
    assert speed["4"]["PEFT"] == NOT_MEASURED


def test_without_a_gpu_nothing_is_loaded_or_measured() -> None:
    def load() -> Train:
        pytest.fail("loaded")

    assert on_gpu("cpu") is None
    assert on_gpu("cuda:1") == Device(cast(Any, on_gpu("cuda:1")).device)
    found = at_once(None, {"bank": (load, (1,))}, [], repeats=1)
    assert found == {"updates_per_second": "not measured", "memory_bytes": "not measured"}


def test_training_takes_a_base_and_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str, str]] = []

    def base_named(name: str, *, device: str, dtype: str) -> object:
        asked.append((name, device, dtype))
        return SimpleNamespace()

    def ladder(_tasks: object, named: Callable[[str], object], **_: object) -> dict[str, object]:
        named("bfloat16")
        return {"rows": []}

    monkeypatch.setattr("benchmarks.subjects.base_named", base_named)
    monkeypatch.setattr(bank_train, "ladder", ladder)
    out = tmp_path / "out.json"
    session = Session(None)
    command = ["bank-train", "--quick", "--base", "some-base", "--device", "cpu", "--json", str(out)]
    done = CliRunner().invoke(bench, command, obj=session, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert asked == [("some-base", "cpu", "bfloat16")]
    written = json.loads(out.read_text())
    assert (written["updates_per_second"], written["memory_bytes"]) == ("not measured", "not measured")
