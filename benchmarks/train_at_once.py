"""Training on a GPU: updates a second and the memory that they take, by how many users train at once.

The bank trains as many in one call (of which so many share a forward as fill it), PEFT one after another. Elsewhere
nothing is measured: a CPU's memory is not the training's alone.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.peft_training import Job
from benchmarks.timing import Cell, interleaved, rounded

USERS = (1, 16, 256)
LOOP_USERS = USERS[:2]
"""Of PEFT: more would take as many times as long at the same rate."""
NOT_MEASURED = "not measured"
Train = Callable[[Sequence[Job]], object]


@dataclass(frozen=True, slots=True)
class Device:
    """Tells of a device's memory."""

    device: torch.device

    def held(self) -> int:
        """Return the bytes in use now."""
        return torch.cuda.memory_allocated(self.device)

    def peak(self, work: Callable[[], object]) -> int:
        """Return the most bytes in use while some work was done."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


def on_gpu(name: str) -> Device | None:
    """Return the memory of the device so named, ``None`` if that is no GPU."""
    return Device(torch.device(name)) if name.startswith("cuda") else None


def at_once(
    device: Device | None,
    subjects: Mapping[str, tuple[Callable[[], Train], Sequence[int]]],
    jobs: Sequence[Job],
    *,
    repeats: int,
) -> dict[str, object]:
    """Measure.

    Args:
        device: Where the subjects are; ``None``: no GPU.
        subjects: By name, what loads one, with its base, and returns its way to train; and how many users it trains.
        jobs: An update of each user; as many as are trained at most.
        repeats: Rounds.

    Returns:
        ``updates_per_second`` and ``memory_bytes`` (the subject's own peak, with its base), by users and subject, or
        that they are not measured.
    """
    if device is None:
        return {"updates_per_second": NOT_MEASURED, "memory_bytes": NOT_MEASURED}
    counts = sorted({count for _, own in subjects.values() for count in own})
    memory: dict[str, dict[str, Cell]] = {str(count): dict.fromkeys(subjects, NOT_MEASURED) for count in counts}
    speed = {count: dict(row) for count, row in memory.items()}
    cases: dict[tuple[str, int], Callable[[], object]] = {}
    for name, (load, own) in subjects.items():
        before = device.held()
        train = load()
        for count in own:
            cases[name, count] = functools.partial(train, jobs[:count])
            memory[str(count)][name] = device.peak(cases[name, count]) - before
    times = interleaved({f"{count} {name}": case for (name, count), case in cases.items()}, repeats=repeats)
    for name, count in cases:
        speed[str(count)][name] = rounded(count / times[f"{count} {name}"].median)
    return {"updates_per_second": speed, "memory_bytes": memory}
