"""``oppu evaluate`` as a function, over a tiny random base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from oppu.cli import cli, compose
from tests.evaluation.world import EMBEDDER
from tests.oppu.lm.conftest import byte_tokenizer, tiny_model

BOUNDS = ("--min-target", "20", "--min-calibrate", "6")
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(str(folder))
    byte_tokenizer().save_pretrained(str(folder))
    return folder


@pytest.fixture
def evaluate(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a runner of ``oppu evaluate TASK --events FILE …`` that gives back the result file."""
    monkeypatch.setattr(compose, "embedder", lambda _: EMBEDDER)
    for name, value in {"BASE": str(base), "MAX_TOKENS": "128", "LORA_RANK": "2", "THREADS": "1"}.items():
        monkeypatch.setenv(f"OPPU_MODEL__{name}", value)

    def run(task: str, events: Path, *more: str, bounds: tuple[str, ...] = BOUNDS) -> dict[str, Any]:
        args = ["evaluate", task, "--events", str(events), "--out", str(tmp_path / "out"), "--quick", *bounds, *more]
        done = CliRunner().invoke(cli, args)
        if done.exception is not None:
            raise done.exception
        result = json.loads(
            (tmp_path / "out" / f"{task}.json").read_text(), parse_constant=lambda name: pytest.fail(name)
        )
        assert isinstance(result, dict) and (tmp_path / "out" / f"{task}.md").read_text()
        return result

    return run
