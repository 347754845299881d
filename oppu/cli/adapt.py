"""``oppu adapt``: OPPU's first stage, task adaption of the shared base on other users' events."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from oppu.cli import Session, compose, emit, json_option
from oppu.cli.clients import read_events
from oppu.cli.training import check_new, progress_bar, recipe_options
from oppu.errors import ConfigError, InvalidRecord
from oppu.lm.port import Example
from oppu.settings import Settings
from oppu.wire import BehaviorEvent


@click.command()
@click.argument("events", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--method", type=click.Choice(["full", "lora"]), default="full", show_default=True)
@recipe_options(epochs=(3, 100), learning_rate=5e-4, batch=(32, 1024))
@json_option
@click.pass_obj
def adapt(session: Session, /, events: Path, out: Path, *, as_json: bool, **recipe: Any) -> None:
    """Adapt model.base on EVENTS (JSON lines) of users who will not be served, and write it to OUT.

    Use the result with OPPU_MODEL__BASE=OUT. Adapters belong to one base: a new base starts its users afresh.
    """
    check_new(out)
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
