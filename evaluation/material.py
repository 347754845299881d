"""All that a run of one task is made of: items with their choices, sister tasks' items, profiles, and the bounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from evaluation.answers import read_labels, settle
from evaluation.corpus import Item, read, unique
from evaluation.duplicates import normal
from evaluation.published import read_profiles
from evaluation.roles import Bounds
from evaluation.splits import not_tested
from oppu.errors import ConfigError
from oppu.tasks import Task


@dataclass(frozen=True, slots=True)
class Files:
    """What is read; only ``events`` must be there.

    ``population`` holds users who adapt the base and calibrate, and are never targets; ``sisters`` other tasks'
    events, of which the same articles must lie on the same side; ``outputs`` are LaMP's gold outputs.
    """

    events: Path
    outputs: Path | None = None
    population: Path | None = None
    population_outputs: Path | None = None
    sisters: tuple[Path, ...] = ()
    profiles: Path | None = None
    labels: Path | None = None


@dataclass(frozen=True, slots=True)
class Material:
    """Items oldest first; ``notes`` are to be said in the result."""

    items: tuple[Item, ...] = field(repr=False)
    sisters: tuple[Item, ...] = field(repr=False)
    profiles: Mapping[str, str] = field(repr=False)
    bounds: Bounds
    notes: dict[str, object]


def gather(files: Files, task: Task, bounds: Bounds, *, final: bool) -> Material:
    """Read and settle everything.

    Args:
        files: What to read.
        task: The task.
        bounds: Who can be what; ``population`` is filled in from the file.
        final: Whether the held-back part will be opened: labels of a test part are never learnt.

    Returns:
        The material.

    Raises:
        ConfigError: Naming the file and what does not fit.
    """
    events = read(files.events, task.name, outputs=files.outputs)
    own = [item for item in events if item.task == task.name]
    others = _population(files, task, {item.user_id for item in own})
    bounds = replace(bounds, population=frozenset(item.user_id for item in others))
    labels = read_labels(files.labels) if files.labels is not None else None
    sisters = _sisters([*own, *others], [*events, *(i for f in files.sisters for i in read(f, task.name))], task.name)
    settled = settle(
        unique([*own, *others]), task, lambda items: not_tested(items, sisters, bounds, final=final), labels
    )
    profiles = read_profiles(files.profiles) if files.profiles is not None else {}
    users = {item.user_id for item in settled.items}
    if profiles and not users & set(profiles):
        raise ConfigError(f"--profiles: no entry of {files.profiles} is of a user of the events")
    notes = settled.notes | {
        "items_left_out": len(own) + len(others) - len(settled.items),
        "users": len(users),
        "population_users": len(bounds.population),
        "sister_tasks": sorted({item.task for item in sisters}),
        "profiles": "written" if profiles else "statistics",
        "population_before_test": bounds.before_test,
    }
    return Material(settled.items, tuple(sisters), profiles, bounds, notes)


def _population(files: Files, task: Task, targets: set[str]) -> list[Item]:
    if files.population is None:
        return []
    found = read(files.population, task.name, outputs=files.population_outputs)
    others = [item for item in found if item.task == task.name and item.user_id not in targets]
    if not others:
        raise ConfigError(f"--population: expected items of task {task.name} of users who are not in --events")
    return others


def _sisters(items: Sequence[Item], every: Sequence[Item], task: str) -> list[Item]:
    """Return all items of the other tasks that share some input with this one."""
    inputs = {normal(item.input) for item in items}
    others = [item for item in every if item.task != task]
    shared = {item.task for item in others if normal(item.input) in inputs}
    return sorted((item for item in others if item.task in shared), key=lambda item: item.day)
