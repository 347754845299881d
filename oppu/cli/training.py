"""What the commands that train a whole model have in common: options, the folder they write, progress."""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from oppu.errors import ConfigError


def finite(_context: click.Context, option: click.Parameter, value: float) -> float:
    """Refuse ``nan``, which lies in every range, and infinities."""
    if not math.isfinite(value):
        raise click.BadParameter(f"expected a finite number, got {value}", param=option)
    return value


def recipe_options(
    *, epochs: tuple[int, int], learning_rate: float, batch: tuple[int, int]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a training's options to a command.

    Args:
        epochs: The default, and the most.
        learning_rate: The default.
        batch: The default, and the most.

    Returns:
        A decorator.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--seed", type=int, default=0, show_default=True),
            click.option("--batch", type=click.IntRange(1, batch[1]), default=batch[0], show_default=True),
            click.option(
                "--learning-rate",
                type=click.FloatRange(min=0, min_open=True),
                callback=finite,
                default=learning_rate,
                show_default=True,
            ),
            click.option("--epochs", type=click.IntRange(1, epochs[1]), default=epochs[0], show_default=True),
        ):
            command = option(command)
        return command

    return add


def check_new(out: Path) -> None:
    """Raise ``ConfigError`` where a folder to write has files already."""
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"OUT: expected a new or empty folder, {out} has files")


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
