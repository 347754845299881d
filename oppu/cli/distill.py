"""``oppu distill``: a smaller embedder for queries alone, learnt from the embedder on other users' texts."""

from pathlib import Path
from typing import Any

import click

from oppu.cli import Session, emit, json_option
from oppu.cli.clients import read_events
from oppu.cli.training import check_new, finite, progress_bar, recipe_options


@click.command()
@click.argument("events", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1, 1000), default=1, show_default=True, help="Blocks that are kept.")
@click.option(
    "--neurons",
    type=click.FloatRange(0, 1, min_open=True),
    callback=finite,
    default=0.25,
    show_default=True,
    help="Share of these blocks' feed-forward neurons that is kept.",
)
@recipe_options(epochs=(8, 1000), learning_rate=2e-3, batch=(64, 4096))
@json_option
@click.pass_obj
def distill(session: Session, /, events: Path, out: Path, *, as_json: bool, **recipe: Any) -> None:
    """Learn model.embedder's vectors of the inputs of EVENTS (JSON lines), with less of it, and write OUT.

    Use the result with OPPU_MODEL__QUERY_ENCODER=OUT: it embeds what is asked, the embedder what is stored.
    """
    check_new(out)
    from oppu.lm.distillation import DistillConfig
    from oppu.lm.distillation import distill as run

    texts = [event.input for event in read_events(events)]
    with progress_bar("distilling") as progress:
        report = run(session.settings.model, texts, out, DistillConfig(**recipe), progress)
    found = {
        "neurons": report.neurons,
        "texts": report.texts,
        "steps": report.steps,
        "seconds": round(report.seconds, 1),
        "likeness": round(report.likeness, 4),
        "neighbours": round(report.neighbours, 4),
    }
    said = (f"{name} {'as they were' if value is None else value}" for name, value in found.items())
    emit(found, as_json=as_json, text=", ".join(said))
