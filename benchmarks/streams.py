"""Parts of a call side by side on the cores, against one forward after the other on all of them.

``python -m benchmarks.streams [--json FILE]``: what a worker answers and learns at a time, on the offline base, in each
type that the machine multiplies. See ``oppu/lm/streams.py``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import click

from benchmarks.bank_train import jobs_of, update_config
from benchmarks.timing import REPEATS, Cell, interleaved, machine, rounded, show, write
from oppu.errors import FatalError
from oppu.lm import streams
from oppu.lm.base import load_base
from oppu.lm.hardware import fast_bfloat16
from oppu.lm.model import TorchModel
from oppu.lm.port import AdapterRef, Row, TrainJob
from oppu.settings import ModelSettings
from oppu.tasks import Tasks, load_tasks
from oppu.values import UserId

USERS = 64
"""With an adapter: trained on ``LEARNT`` events each."""
LEARNT = 4
CHOICE_ROWS, TEXT_ROWS = (16, 64, 128, 256), (16, 64, 128)
TEXT_TASK, TEXT_TOKENS = "news_headline", 16
JOBS = ((1, 64), (2, 64), (8, 32), (16, 16))
"""Users, and examples of each."""
_Models = Mapping[str, TorchModel]
_Calls = Mapping[str, Callable[[], object]]


@click.command()
@click.option("--repeats", type=click.IntRange(min=1), default=REPEATS, show_default=True)
@click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the result there.")
def main(repeats: int, out: Path | None) -> None:
    """Measure streams on this machine."""
    rows = [*measure("float32", repeats), *(measure("bfloat16", repeats) if fast_bfloat16("cpu") else ())]
    show("streams over one forward after the other on all cores", rows)
    write(out, {**machine(), "rows": rows})


def measure(dtype: Literal["float32", "bfloat16"], repeats: int) -> Iterator[dict[str, Cell]]:
    """Time both ways.

    Args:
        dtype: Of base and served adapters.
        repeats: Rounds that count.

    Yields:
        What is computed, and of how many users; rows or examples a second in streams, over the rate without.

    Raises:
        FatalError: A training diverged.
    """
    tasks, settings = load_tasks(), ModelSettings(dtype=dtype)
    models = {"streams": TorchModel(load_base(settings), tasks, settings=settings, slots=USERS)}
    with mock.patch.object(streams, "MOST", 1):
        models["one"] = TorchModel(load_base(settings), tasks, settings=settings, slots=USERS)
    refs = _installed(models, tasks)
    for work, users, count, calls in _cases(models, refs, tasks):
        found = interleaved(calls, repeats=repeats)
        own, other = found["streams"], found["one"]
        figures = {"a_second": count / own.median, "ratio": other.median / own.median}
        spreads = {"spread": own.spread, "other_spread": other.spread}
        shown: dict[str, Cell] = {name: rounded(value) for name, value in (figures | spreads).items()}
        yield {"dtype": dtype, "work": work, "users": users, "of": count, **shown}
    for model in models.values():
        model.close()


def _installed(models: _Models, tasks: Tasks) -> list[AdapterRef]:
    """Train a short adapter for everybody, and put it into both models."""
    jobs = _work(USERS, LEARNT, tasks)
    refs = [AdapterRef(job.user_id, 0, 1) for job in jobs]
    trained = models["streams"].train(jobs, update_config(), heartbeat=lambda: None)
    for ref, one in zip(refs, trained, strict=True):
        if one.tensors is None:
            raise FatalError(f"the adapter of {ref.user_id} did not stay finite")
        for model in models.values():
            model.install(ref, one.tensors)
    return refs


def _cases(models: _Models, refs: Sequence[AdapterRef], tasks: Tasks) -> Iterator[tuple[str, int, int, _Calls]]:
    """Yield the work, its users, its rows or examples, and both ways of doing it."""
    [events] = jobs_of(1, max(CHOICE_ROWS), tasks)
    for texts, counts in ((False, CHOICE_ROWS), (True, TEXT_ROWS)):
        for count in counts:
            rows = [
                Row(TEXT_TASK, event.input, adapter=refs[at % USERS], max_new_tokens=TEXT_TOKENS)
                if texts
                else Row(event.task, event.input, choices=event.choices, adapter=refs[at % USERS])
                for at, event in enumerate(events[:count])
            ]
            calls = {name: partial(model.answer, rows) for name, model in models.items()}
            yield "texts" if texts else "choices", min(count, USERS), count, calls
    config = update_config()
    for users, each in JOBS:
        work = _work(users, each, tasks)
        trained = {name: partial(model.train, work, config, heartbeat=_nothing) for name, model in models.items()}
        yield "learning", users, users * each * config.passes, trained


def _work(users: int, each: int, tasks: Tasks) -> list[TrainJob]:
    return [TrainJob(UserId(f"u{at}"), None, own, at) for at, own in enumerate(jobs_of(users, each, tasks))]


def _nothing() -> None:
    """Do nothing between two forwards."""


if __name__ == "__main__":
    main()
