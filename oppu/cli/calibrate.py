"""``oppu calibrate``: fit how base, evidence and adapter are weighed, on users the base has not seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from oppu.cli import Session, compose, emit, json_option
from oppu.errors import ConfigError
from oppu.settings import Settings

if TYPE_CHECKING:
    from evaluation.corpus import Item


@click.command()
@click.argument("events", type=click.Path(path_type=Path))
@click.option("--task", required=True, help="Whose events to fit on.")
@click.option("--out", type=click.Path(path_type=Path), help="File to write; else beside model.base.")
@json_option
@click.pass_obj
def calibrate(session: Session, /, events: Path, task: str, out: Path | None, *, as_json: bool) -> None:
    """Fit on EVENTS (JSON lines) of users the base was not adapted on; inference workers read it when they start."""
    settings = session.settings
    if task not in compose.tasks(settings):
        raise ConfigError(f"--task: expected one of {', '.join(sorted(compose.tasks(settings)))}")
    if out is None and not Path(settings.model.base).is_dir():
        raise ConfigError("--out: expected a file to write, for model.base is no folder")
    from evaluation.corpus import load

    report = calibrate_base(settings, load(events, task, compose.tasks(settings)), out)
    emit(report, as_json=as_json, text=", ".join(f"{name} {value}" for name, value in report.items()))


def calibrate_base(settings: Settings, items: "Sequence[Item]", out: Path | None = None) -> dict[str, object]:
    """Fit and write.

    Args:
        settings: Base, updater and retriever as they will be served.
        items: One task's, of users the base was not adapted on.
        out: The file; ``None``: beside the base.

    Returns:
        What was done, for display.

    Raises:
        ConfigError: Items that do not fit, or too few.
    """
    from evaluation.calibration import calibrate as fit
    from inference import blending
    from oppu import fusion

    def say(text: str) -> None:
        click.echo(f"calibrating: {text}", err=True)

    embedder = compose.embedder(settings)
    queries = compose.queries_apart(settings, embedder)
    done = fit(items, settings, compose.tasks(settings), embedder, say, queries=queries)
    found = done.fusion
    is_text = isinstance(found, blending.TextFusion)
    found.save(out or Path(settings.model.base) / (blending.FILE if is_text else fusion.FILE))
    evidence = found.alone if isinstance(found, blending.TextFusion) else found.alone.coefficients
    return {
        "items": done.items,
        "users": done.users,
        "evidence": {name: [round(x, 3) for x in pair] for name, pair in evidence.items()},
        "adapter_share": {n: round(found.adapter_share(n), 3) for n in (16, 64, 256)},
    }
