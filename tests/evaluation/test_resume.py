"""A run killed by the signal that nobody can catch goes on where it was, and ends with the same file as another.

Three processes, each with hash seeds of its own: so equal seeds give equal numbers, too.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oppu.settings import Settings
from tests.evaluation.test_experiment import settings

__all__ = ["settings"]  # a fixture

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from dataclasses import replace
from evaluation.experiment import run
from evaluation.report import summarise, write
from oppu.settings import Settings
from tests.evaluation.test_experiment import TASKS, everybody, planned
from tests.evaluation.world import EMBEDDER

out, base = Path(sys.argv[1]), sys.argv[2]
own = Settings.load(model={"base": base, "max_tokens": 200, "lora_rank": 2, "threads": 1})
plan = replace(planned(out / "work"), say=lambda text: print(text, flush=True))
outcomes = run(plan, everybody(), own, TASKS, EMBEDDER)
write(summarise(plan, outcomes, "choice", "tiny", "oppu evaluate pick"), outcomes, "choice", out)
"""
LIMIT_SECONDS = 240


def started(out: Path, base: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), base], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def finished(out: Path, base: str) -> str:
    with started(out, base) as child:
        assert child.wait(LIMIT_SECONDS) == 0
    return (out / "pick.json").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("after", ["base retrieval: 1 epochs", "permuted-0: done"])
def test_a_run_killed_in_mid_stage_ends_with_the_same_file(
    after: str, settings: Settings, tmp_path: Path, whole: str
) -> None:
    with started(tmp_path, settings.model.base) as child:
        assert child.stdout is not None
        next(line for line in child.stdout if line.startswith(after))
        time.sleep(0.02)  # into the next stage
        child.send_signal(signal.SIGKILL)
        assert child.wait(LIMIT_SECONDS) == -signal.SIGKILL
    assert not (tmp_path / "pick.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.npz")}
    assert kept
    assert finished(tmp_path, settings.model.base) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing was done twice


@pytest.fixture(scope="module")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> str:
    return finished(tmp_path_factory.mktemp("whole"), settings.model.base)
