"""``oppu evaluate``: the paper's experiment on a file of events, by the project's protocol."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oppu.cli import Session, compose, emit, json_option
from oppu.cli.clients import read_events
from oppu.errors import ConfigError
from oppu.tasks import Tasks

if TYPE_CHECKING:
    from evaluation.corpus import Item

QUICK_USERS = 8


@click.command()
@click.argument("task")
@click.option("--events", type=click.Path(path_type=Path), required=True, help="Events, or a LaMP or OPPU JSON file.")
@click.option("--outputs", type=click.Path(path_type=Path), help="LaMP's file of gold outputs.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Work folder; a killed run goes on here.")
@click.option("--seed", "seeds", type=int, multiple=True, default=(0,), show_default=True, help="May be repeated.")
@click.option("--min-target", type=click.IntRange(5), default=50, show_default=True, help="Items of a target user.")
@click.option("--min-calibrate", type=click.IntRange(3), default=20, show_default=True)
@click.option("--quick", is_flag=True, help=f"The first {QUICK_USERS} targets and short training: not evidence.")
@click.option("--all-arms", is_flag=True, help="Also OPPU with k=2 and 4, profile with k=1, and without adaption.")
@click.option("--methods", is_flag=True, help="Also LoRA, IA3 and prompt tuning, one user after the other.")
@click.option("--analyses", is_flag=True, help="Also the paper's analyses; all arms run.")
@click.option("--final", is_flag=True, help="Open the held-back last fifth; it is written down that this was done.")
@json_option
@click.pass_obj
def evaluate(  # noqa: PLR0913 - one parameter an option
    session: Session,
    /,
    task: str,
    events: Path,
    outputs: Path | None,
    out: Path,
    seeds: tuple[int, ...],
    min_target: int,
    min_calibrate: int,
    quick: bool,
    all_arms: bool,
    methods: bool,
    analyses: bool,
    final: bool,
    as_json: bool,
) -> None:
    """Compare all arms and controls of TASK on users' own events, and write tables and tests to OUT."""
    from evaluation.budget import Progress
    from evaluation.corpus import load
    from evaluation.experiment import Plan, run
    from evaluation.quick import shortened
    from evaluation.report import markdown, summarise, write
    from evaluation.splits import Bounds
    from evaluation.training import Recipe

    settings, began = session.settings, time.monotonic()
    tasks = compose.tasks(settings)
    if task not in tasks:
        raise ConfigError(f"TASK: expected one of {', '.join(sorted(tasks))}")
    items = load(events, task, tasks, outputs=outputs)

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.0f} s] {text}", err=True)

    recipe = Recipe(base_epochs=1, passes=1, chunk_passes=1, strangers=1) if quick else Recipe()
    bounds = Bounds(min_target, min_calibrate)
    if quick:
        items, bounds = shortened(items, bounds)
    name = f"{task}-{'final' if final else 'dev'}-{recipe.digest()}{'-quick' if quick else ''}"
    plan = Plan(task, out / name, seeds, recipe, bounds, final, QUICK_USERS if quick else None, say)
    plan = replace(plan, all_arms=all_arms, methods=methods, analyses=analyses, progress=Progress(say))
    if analyses:
        plan = replace(plan, sisters=_sisters(events, task, tasks))
    outcomes = run(plan, items, settings, tasks, compose.embedder(settings))
    command = " ".join(["oppu evaluate", *(f"'{a}'" if " " in a else a for a in _arguments(events))])
    result = summarise(plan, outcomes, tasks[task].kind, settings.model.base, command)
    data, page = write(result, outcomes, tasks[task].kind, out)
    emit({**result, "json": str(data), "markdown": str(page)}, as_json=as_json, text=markdown(result))
    say(f"written: {data}, {page}")


def _sisters(events: Path, task: str, tasks: Tasks) -> "tuple[Item, ...]":
    """Return the items of the other tasks that a file of events holds; a benchmark's file is of one task."""
    from evaluation.corpus import of_events, prepared

    if not {".jsonl", ".gz"} & set(events.suffixes):
        return ()
    every = read_events(events)
    others = sorted({event.task for event in every if event.task != task and event.task in tasks})
    return tuple(item for other in others for item in prepared(of_events(every, other), other, tasks))


def _arguments(events: Path) -> list[str]:
    """Return the command's own arguments, the events' folder left out: it is this machine's."""
    given = sys.argv[sys.argv.index("evaluate") + 1 :] if "evaluate" in sys.argv else []
    return [events.name if a == str(events) else a for a in given]
