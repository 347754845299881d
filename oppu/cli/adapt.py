"""``oppu adapt``: OPPU's first stage, task adaption of the shared base on other users' events."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from oppu.cli import Session, compose, emit, json_option
from oppu.cli.clients import read_events
from oppu.errors import ConfigError, InvalidRecord
from oppu.lm.port import Example
from oppu.settings import Settings
from oppu.wire import BehaviorEvent


@click.command()
@click.argument("events", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--method", type=click.Choice(["full", "lora"]), default="full", show_default=True)
@click.option("--epochs", type=click.IntRange(1, 100), default=3, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=5e-4, show_default=True)
@click.option("--batch", type=click.IntRange(1, 1024), default=32, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
@click.pass_obj
def adapt(session: Session, /, events: Path, out: Path, *, as_json: bool, **recipe: Any) -> None:
    """Adapt model.base on EVENTS (JSON lines) of users who will not be served, and write it to OUT.

    Use the result with OPPU_MODEL__BASE=OUT. Adapters belong to one base: a new base starts its users afresh.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"OUT: expected a new or empty folder, {out} has files")
    report = adapt_base(session.settings, read_events(events), out, recipe)
    emit(report, as_json=as_json, text=", ".join(f"{name} {value}" for name, value in report.items()))


def adapt_base(
    settings: Settings, events: Sequence[BehaviorEvent], out: Path, recipe: Mapping[str, Any]
) -> dict[str, object]:
    """Adapt the configured base, showing progress on a terminal.

    Args:
        settings: Which base, and how it is run.
        events: Other users' events.
        out: Folder to write.
        recipe: Fields of ``oppu.lm.adaption.AdaptConfig``.

    Returns:
        What was done, for display.

    Raises:
        ConfigError: Some event does not fit its task.
    """
    from oppu.lm.adaption import AdaptConfig
    from oppu.lm.adaption import adapt as run
    from oppu.lm.base import load_base

    examples = _examples(settings, events)
    config = AdaptConfig(**recipe)
    with progress_bar("adapting the base") as progress:
        report = run(
            load_base(settings.model, adapting=True),
            compose.tasks(settings),
            examples,
            out,
            config=config,
            settings=settings.model,
            progress=progress,
        )
    return {"examples": len(examples), "steps": report.steps, "seconds": round(report.seconds, 1),
            "first_loss": round(report.first_loss, 4), "last_loss": round(report.last_loss, 4)}  # fmt: skip


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int, float], None]]:
    """Show a training's steps on a terminal as a bar, elsewhere as a few lines.

    Args:
        name: What is done.

    Yields:
        To be told (steps done, steps in all, loss) after each step.
    """
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=None, loss="")

        def progress(done: int, total: int, loss: float) -> None:
            bar.update(task, completed=done, total=total, loss=f"loss {loss:.3f}")
            if not sys.stderr.isatty() and done % max(1, total // 8) == 0:
                click.echo(f"{name}: step {done} of {total}, loss {loss:.3f}", err=True)

        yield progress


def _examples(settings: Settings, events: Sequence[BehaviorEvent]) -> list[Example]:
    tasks = compose.tasks(settings)
    examples: list[Example] = []
    problems: list[str] = []
    for event in events:
        try:
            task = tasks.require(event.task)
            task.check_output(event.output, event.choices)
        except InvalidRecord as error:
            problems.append(f"event {event.event_id}: {error.message}")
            continue
        choices = task.allowed(event.choices) if event.output.strip() else ()
        examples.append(Example(event.task, event.input, event.output, choices))
    if problems:
        raise ConfigError(*problems[:10])
    if not examples:
        raise ConfigError("EVENTS: expected at least one event")
    return examples
