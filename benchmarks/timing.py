"""Time things that must be compared: interleaved, so that what slows the machine slows all of them alike.

A figure is a ratio of medians within one run; the spread beside it is half the distance of its quartiles, relative.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from oppu.lm.hardware import matrix_units

REPEATS = 7
Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one case over the repeats."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.seconds)

    def each(self, count: int) -> "Timing":
        """Return the timing of one of so many equal parts."""
        return Timing(tuple(seconds / count for seconds in self.seconds))

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles over the median; 0 with fewer than two repeats."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    *,
    repeats: int = REPEATS,
    warm_up: int = 1,
) -> dict[str, Timing]:
    """Run every case once a round, in turning order.

    Args:
        cases: What to time, by name.
        repeats: Rounds that count.
        warm_up: Rounds before them.

    Returns:
        Each case's timing.
    """
    names = list(cases)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, repeats):
        turn = (number + warm_up) % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = timed(cases[name])
            if number >= 0:
                found[name].append(seconds)
    return {name: Timing(tuple(seconds)) for name, seconds in found.items()}


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes, a GPU's queue included."""
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def machine() -> dict[str, object]:
    """Say where it ran."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "not measured"
    return {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matrix_units": matrix_units(),
        "openmp_waits": os.environ.get("OMP_WAIT_POLICY", "as torch has it"),
        "gpu": gpu,
    }


def show(title: str, rows: Sequence[Mapping[str, Cell]]) -> None:
    """Print rows of equal fields as a table."""
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console(width=None if os.isatty(1) else 160).print(table)


def write(out: Path | None, result: Mapping[str, object]) -> None:
    """Write the JSON file that ``--json`` names, if any."""
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        click.echo(f"written to {out}")


def rounded(value: float) -> float:
    """Round to three significant digits."""
    return float(f"{value:.3g}")


def type_name(dtype: torch.dtype) -> str:
    """Return a type's name as settings have it."""
    return str(dtype).removeprefix("torch.")


def _text(value: Cell) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
