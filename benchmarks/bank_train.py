"""Training: many users' adapters through the bank, against a loop over PEFT adapters, one rung of a ladder at a time.

Every rung takes the same optimizer steps on the same rows, apart from the update, which learns the new events and some
older ones instead of the whole history. ``peft_training`` has OPPU's way, in float32, and the well-run PEFT loop, which
is the fastest of its four in the rung's own type; beside it stands the fastest of either type, which a user would take.
The next rung is the same loop through the bank's ``Runner``, which computes the last block at targets only too, short
bfloat16 attention in plain products, and float32 matrices packed (PEFT's adapters are in float32 and need autocast in
bfloat16, which packs none). The bank adds that users share the forwards, a user's examples rows, and packed bfloat16
matrices. Ratios are of one type, float32, unless their name ends in another. None of them saves what it trained.
"""

import functools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peft_training import ALPHA, ATTENTION, RANK, Job, PeftLoop, encoder_of, train_as_oppu
from benchmarks.timing import REPEATS, Cell, Timing, interleaved, rounded
from benchmarks.train_at_once import LOOP_USERS, USERS, Device, Train, at_once
from evaluation.analysis_tables import FOLLOW, INCREMENTS_LESS_FULL, POLICY, RETRAINED
from oppu.cli.demo import read_sample
from oppu.errors import ConfigError, FatalError
from oppu.lm.base import LoadedBase
from oppu.lm.model import TorchModel
from oppu.lm.port import Example, Tensors, TrainConfig, TrainJob
from oppu.settings import ModelSettings, UpdaterSettings
from oppu.tasks import Tasks
from oppu.values import UserId
from updater.scoring import assess

HISTORY, NEW = 200, 16
OPPU_PASSES = 2
"""Epochs of OPPU's released code; the paper's hyper-parameters are its own."""
CASES: Mapping[str, tuple[int, int]] = {"one user": (1, HISTORY), "many users": (16, NEW)}
MIXED = (64, 128, 4)
"""Users of unequal histories: how many, the events of the first, the fewest; the k-th has 1/k of the first's."""
GROUP = 16
UPPER = 0.5
"""Share of the blocks that the last rung adapts, as ``model.lora_upper``: cheaper, and less accurate (docs/results.md).
"""
AGREEMENT = 0.02
"""Relative difference of mean losses between bank and PEFT, float32: over many steps Adam magnifies rounding."""
_TYPES = ("float32", "bfloat16")
_SUFFIXES = {"float32": "", "bfloat16": "_bfloat16"}
_RATIOS = {
    "examples_per_second_ratio": "ratio_to_oppu",
    "ratio_to_well_run_peft": "ratio_to_well_run_peft",
    "ratio_to_fastest_peft": "ratio_to_fastest_peft",
}
"""What is said of the bank in either type, and the rows' field that says it."""
Named = Callable[[str], LoadedBase]
WELL_RUN: Mapping[str, tuple[bool, str]] = {
    "targets only": (False, ATTENTION[0]),
    "length buckets": (True, ATTENTION[0]),
    "targets only, eager attention": (False, ATTENTION[1]),
    "length buckets, eager attention": (True, ATTENTION[1]),
}
"""PEFT's loops by rung: whether in length buckets, and by which attention."""


@dataclass(frozen=True, slots=True)
class Subjects:
    """The base in both types, each with PEFT's and the bank's way to train; ``narrowed`` loops compute the last block
    at targets only, ``uppers`` adapt the upper half only."""

    loops: Mapping[str, PeftLoop]
    narrowed: Mapping[str, PeftLoop]
    banks: Mapping[str, TorchModel]
    uppers: Mapping[str, TorchModel]


def ladder(
    tasks: Tasks,
    named: Named,
    *,
    repeats: int = REPEATS,
    cases: Mapping[str, tuple[int, int]] = CASES,
    mixed: tuple[int, int, int] = MIXED,
) -> dict[str, Any]:
    """Climb it.

    Args:
        tasks: The known tasks.
        named: Loads the base in a type.
        repeats: Rounds.
        cases: Users and events each, by name.
        mixed: Users of unequal histories, as ``MIXED``.

    Returns:
        ``rows``, one a case and rung; by case ``examples_per_second_ratio``, of the bank in float32 to OPPU's way,
        ``ratio_to_well_run_peft`` and ``ratio_to_fastest_peft``, and ``update_cost_ratio_to_oppu`` (``..._bfloat16``:
        of the bank in bfloat16); and ``full_bank_ratio``, of slots that are filled again to groups that last as long as
        their longest user.

    Raises:
        FatalError: Bank and PEFT do not arrive at the same loss.
    """
    subjects = _subjects(tasks, named)
    rows: list[dict[str, Cell]] = []
    ratios: dict[str, dict[str, Cell]] = {f"{ratio}{suffix}": {} for ratio in _RATIOS for suffix in _SUFFIXES.values()}
    for name, (users, events) in cases.items():
        jobs = jobs_of(users, events, tasks)
        times = interleaved(_rungs(subjects, jobs, tasks, named), repeats=repeats)
        shares = {row["rung"]: row for row in shown(name, times, users * events * OPPU_PASSES)}
        rows += shares.values()
        for ratio, field in _RATIOS.items():
            for dtype, suffix in _SUFFIXES.items():
                ratios[f"{ratio}{suffix}"][name] = shares[f"bank {dtype}"][field]
    full = interleaved(_turnover(subjects.banks["bfloat16"], tasks, mixed), repeats=repeats)
    cost = interleaved(_updates(subjects, tasks, named), repeats=repeats)
    return {
        "rows": rows,
        **ratios,
        **costs(cost, UpdaterSettings().users_per_tick),
        "full_bank_ratio": rounded(full["groups"].median / full["full"].median),
        "full_bank_spread": rounded(max(time.spread for time in full.values())),
    }


def costs(times: Mapping[str, Timing], users: int) -> dict[str, float]:
    """Return what OPPU's way takes for a user's update, over what the bank takes.

    Args:
        times: OPPU's way; in both types, so many users' updates ``together`` and one ``alone``.
        users: As many.

    Returns:
        A ratio for each of the bank's.
    """
    oppu = times["oppu"].median
    each = {
        f"update_cost_ratio_to_oppu{kind}{suffix}": times[f"{case} {dtype}"].median / count
        for kind, case, count in (("", "together", users), ("_one_user", "alone", 1))
        for dtype, suffix in _SUFFIXES.items()
    }
    return {name: rounded(oppu / seconds) for name, seconds in each.items()}


def jobs_of(users: int, events: int, tasks: Tasks) -> list[Job]:
    """Return so many users' events, from the packaged sample again and again."""
    sample = read_sample()
    rows = [Example(e.task, e.input, e.output, tasks.require(e.task).allowed(e.choices)) for e in sample.population]
    return [tuple(rows[(user * events + at) % len(rows)] for at in range(events)) for user in range(users)]


def updates_at_once(tasks: Tasks, named: Named, device: Device | None, *, repeats: int = REPEATS) -> dict[str, object]:
    """Measure updates a second and memory on a GPU, of the bank and of PEFT's loop without length buckets.

    Args:
        tasks: The known tasks.
        named: Loads the base in a type.
        device: Where it loads it; ``None``: no GPU.
        repeats: Rounds.

    Returns:
        As ``train_at_once.at_once``.
    """
    config = update_config()

    def bank(dtype: str) -> Train:
        settings = ModelSettings(lora_rank=RANK, lora_alpha=ALPHA)
        model = TorchModel(named(dtype), tasks, settings=settings, slots=1)
        return lambda jobs: _banked(model, jobs, config)

    def loop(dtype: str) -> Train:
        return functools.partial(PeftLoop(named(dtype), tasks, config, library=True).train, bucketed=False)

    subjects: dict[str, tuple[Callable[[], Train], Sequence[int]]] = {}
    for dtype in _TYPES:
        subjects[f"bank {dtype}"] = functools.partial(bank, dtype), USERS
        subjects[f"PEFT {dtype}"] = functools.partial(loop, dtype), LOOP_USERS
    jobs = jobs_of(max(USERS), NEW + UpdaterSettings().replay, tasks)
    return at_once(device, subjects, jobs, repeats=repeats)


def accuracies(results: Path | None) -> dict[str, Cell]:
    """Read what increments and full training reach from the result of ``oppu evaluate news_categorize --analyses``.

    Args:
        results: The JSON file, if any.

    Returns:
        ``accuracy``, ``accuracy_oppu`` (both after the sixteenth event, each event before it was learnt) and the lower
        bound of their difference; ``None``: not measured, or too few users for a bound.

    Raises:
        ConfigError: It is not such a file.
    """
    names = ("accuracy", "accuracy_oppu", "accuracy_difference_low")
    if results is None:
        return dict.fromkeys(names)
    try:
        content = json.loads(results.read_text(encoding="utf-8"))
        row = content["analyses"][POLICY][0]
        interval = row.get(INCREMENTS_LESS_FULL, {}).get("ci")
        found = (row[FOLLOW]["mean"], row[RETRAINED]["mean"], interval[0] if interval else None)
        return dict(zip(names, found, strict=True))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"--results: expected a result of oppu evaluate --analyses: {error!r}") from error


def _subjects(tasks: Tasks, named: Named) -> Subjects:
    config = _config()
    settings = ModelSettings(lora_rank=RANK, lora_alpha=ALPHA)
    upper = settings.model_copy(update={"lora_upper": UPPER})
    bases = {dtype: [named(dtype) for _ in range(4)] for dtype in _TYPES}
    return Subjects(
        loops={dtype: PeftLoop(own[0], tasks, config, library=True) for dtype, own in bases.items()},
        narrowed={dtype: PeftLoop(own[3], tasks, config, library=False) for dtype, own in bases.items()},
        banks={dtype: TorchModel(own[1], tasks, settings=settings, slots=1) for dtype, own in bases.items()},
        uppers={dtype: TorchModel(own[2], tasks, settings=upper, slots=1) for dtype, own in bases.items()},
    )


def _rungs(subjects: Subjects, jobs: Sequence[Job], tasks: Tasks, named: Named) -> dict[str, Callable[[], object]]:
    config, plain = _config(), named("float32")
    encoder = encoder_of(plain, tasks)
    _agree(subjects, jobs)
    rungs: dict[str, Callable[[], object]] = {"oppu": lambda: train_as_oppu(plain, encoder, jobs, config)}
    for dtype in _TYPES:
        loop, bank, upper = subjects.loops[dtype], subjects.banks[dtype], subjects.uppers[dtype]
        narrowed = subjects.narrowed[dtype]
        rungs |= {
            f"{rung} {dtype}": functools.partial(loop.train, jobs, bucketed=bucketed, attention=attention)
            for rung, (bucketed, attention) in WELL_RUN.items()
        }
        rungs |= {
            f"last block at targets {dtype}": functools.partial(narrowed.train, jobs, bucketed=True),
            f"bank {dtype}": functools.partial(_banked, bank, jobs, config),
            f"bank, upper half of the blocks {dtype}": functools.partial(_banked, upper, jobs, config),
        }
    return rungs


def _turnover(model: TorchModel, tasks: Tasks, mixed: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """Users of unequal histories in any order: in groups of as many as there are slots, or in one call."""
    users, most, fewest = mixed
    longest = jobs_of(users, most, tasks)
    jobs = [job[: max(fewest, most // (rank + 1))] for rank, job in enumerate(longest)]
    random.Random(0).shuffle(jobs)  # noqa: S311 - order of users, not a secret
    groups = [jobs[at : at + GROUP] for at in range(0, users, GROUP)]
    return {
        "groups": lambda: [_banked(model, group, _config()) for group in groups],
        "full": lambda: _banked(model, jobs, _config()),
    }


def _updates(subjects: Subjects, tasks: Tasks, named: Named) -> dict[str, Callable[[], object]]:
    """An update with 16 new events on 200: all of them learnt again, or the new ones beside some older ones, with all
    that the service does beside: the new events scored under the base and under the live adapter, and the candidate on
    those held out."""
    own, config = UpdaterSettings(), update_config()
    plain = named("float32")
    encoder = encoder_of(plain, tasks)
    whole, part = jobs_of(1, HISTORY + NEW, tasks), jobs_of(own.users_per_tick, NEW + own.replay, tasks)
    found: dict[str, Callable[[], object]] = {"oppu": lambda: train_as_oppu(plain, encoder, whole, _config())}
    held = round(own.holdout_share * NEW)
    for dtype, bank in subjects.banks.items():
        [live] = bank.train(_work(part[:1]), config, heartbeat=_nothing)
        for case, jobs in (("together", part), ("alone", part[:1])):
            found[f"{case} {dtype}"] = functools.partial(_update, bank, jobs, config, live.tensors, held)
    return found


def _update(model: TorchModel, jobs: Sequence[Job], config: TrainConfig, live: Tensors | None, held: int) -> None:
    """One tick for users with a live adapter; their first ``NEW`` events are new, the last ``held`` kept out."""
    for job in jobs:
        assess(model, job[:NEW], None, _nothing)
        assess(model, job[:NEW], live, _nothing)
    learnt = [(*job[: NEW - held], *job[NEW:]) for job in jobs]
    work = [replace(one, parent=live) for one in _work(learnt)]
    for job, result in zip(jobs, model.train(work, config, heartbeat=_nothing), strict=True):
        assess(model, job[NEW - held : NEW], result.tensors, _nothing)


def _agree(subjects: Subjects, jobs: Sequence[Job]) -> None:
    bank = _banked(subjects.banks["float32"], jobs, _config())
    for attention in ATTENTION:
        loop = subjects.loops["float32"].train(jobs, bucketed=True, attention=attention)
        if abs(loop - bank) > AGREEMENT * loop:
            raise FatalError(f"mean loss over training: PEFT by {attention} attention {loop:.5f}, bank {bank:.5f}")


def _banked(model: TorchModel, jobs: Sequence[Job], config: TrainConfig) -> float:
    done = model.train(_work(jobs), config, heartbeat=_nothing)
    return math.fsum(result.mean_loss for result in done) / len(done)


def _work(jobs: Sequence[Job]) -> list[TrainJob]:
    return [TrainJob(UserId(f"u{at}"), None, job, at) for at, job in enumerate(jobs)]


def _nothing() -> None:
    """Do nothing between two pieces of work."""


def update_config() -> TrainConfig:
    """Return how the service trains an increment."""
    own = UpdaterSettings()
    return TrainConfig(own.learning_rate, own.weight_decay, own.passes, own.batch)


def _config() -> TrainConfig:
    return TrainConfig(learning_rate=1e-3, weight_decay=0.01, passes=OPPU_PASSES, batch=16)


def shown(case: str, times: Mapping[str, Timing], examples: int) -> list[dict[str, Cell]]:
    """Return a ladder's rows; the well-run PEFT loop is the fastest of its four in the rung's own type.

    Args:
        case: Its name.
        times: By rung, whose last word is its type; OPPU's way is in float32.
        examples: Trained on in each.

    Returns:
        One row a rung.
    """
    loops = {dtype: min((f"{rung} {dtype}" for rung in WELL_RUN), key=lambda it: times[it].median) for dtype in _TYPES}
    fastest = min(times[loop].median for loop in loops.values())
    rows: list[dict[str, Cell]] = []
    for name, time in times.items():
        well_run = loops["bfloat16" if name.endswith("bfloat16") else "float32"]
        rows.append(
            {
                "case": case,
                "rung": name,
                "examples_per_second": rounded(examples / time.median),
                "ratio_to_oppu": rounded(times["oppu"].median / time.median),
                "ratio_to_well_run_peft": rounded(times[well_run].median / time.median),
                "well_run_peft": well_run,
                "ratio_to_fastest_peft": rounded(fastest / time.median),
                "spread": rounded(time.spread),
            }
        )
    return rows
