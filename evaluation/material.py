"""All that a run of one task is made of: items with their choices, sister tasks' items, profiles, and the bounds."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from evaluation.answers import read_labels, settle
from evaluation.corpus import Found, Item, by_user, in_time, read, unique, without_instructions
from evaluation.published import read_profiles
from evaluation.roles import Bounds, reachable
from evaluation.splits import not_tested, sharing
from oppu.errors import ConfigError
from oppu.tasks import Task, Tasks

logger = logging.getLogger(__name__)

_NAMED = 8
"""Tasks that are named where the wanted one is not there."""


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
    """Items oldest first; ``others`` are the other tasks' items as read, ``sisters`` those of them whose task shares
    some input with this one; ``notes`` are to be said in the result."""

    items: tuple[Item, ...] = field(repr=False)
    others: tuple[Item, ...] = field(repr=False)
    sisters: tuple[Item, ...] = field(repr=False)
    profiles: Mapping[str, str] = field(repr=False)
    bounds: Bounds
    notes: dict[str, object]


def gather(files: Files, task: Task, bounds: Bounds, *, final: bool, bare: Collection[str] = ()) -> Material:
    """Read and settle everything.

    Args:
        files: What to read.
        task: The task.
        bounds: Who can be what; ``population`` is filled in from the file.
        final: Whether the held-back part will be opened: labels of a test part are never learnt.
        bare: Further tasks whose events may lack an output, as this one's may where it says so.

    Returns:
        The material.

    Raises:
        ConfigError: Naming the file and what does not fit.
    """
    bare = {*bare, *([task.name] if task.bare_history else [])}
    events = read(files.events, task.name, outputs=files.outputs, bare=bare)
    own = _of_task(events, task, final=final)
    population, others = _population(files, task, {item.user_id for item in own}, bare)
    every = [*events.items, *(item for file in files.sisters for item in read(file, task.name, bare=bare).items)]
    ordered, (own, others, rest) = in_time(own, others, [item for item in every if item.task != task.name])
    asking = {item.user_id for item in own if item.query}
    unasked = {item.user_id for item in own} - asking if final and asking else set[str]()
    asked = replace(bounds, population=frozenset(i.user_id for i in others), unasked=frozenset(unasked))
    labels = read_labels(files.labels) if files.labels is not None else None
    every, instruction = unique([*own, *others]), ""
    if not sharing(every, rest):  # texts that tasks have in common stay as they are in both
        every, instruction = without_instructions(every)
        rest = [item for part in _by_task(rest) for item in without_instructions(part)[0]]
    rest = sorted(rest, key=lambda item: item.day)
    sisters = sharing(every, rest)
    bounds = reachable(by_user(every), asked)
    made = settle(every, task, lambda items: not_tested(items, sisters, bounds, final=final), labels)
    fit = reachable(by_user(made.items), asked)  # what does not fit the task is nobody's history
    if fit != bounds:
        made = settle(every, task, lambda items: not_tested(items, sisters, fit, final=final), labels)
    if task.kind == "choice" and all(item.bare for item in made.items) and not all(item.bare for item in every):
        raise ConfigError(
            f"events: output: expected {' or '.join(task.labels)}, the place of a candidate such as '[1]: …' of the "
            f"input, or choices beside it, for task {task.name}; none of {len(every)} items has one"
        )
    profiles = read_profiles(files.profiles) if files.profiles is not None else {}
    users = {item.user_id for item in made.items}
    if profiles and not users & set(profiles):
        raise ConfigError(f"--profiles: no entry of {files.profiles} is of a user of the events")
    notes = made.notes | {
        "items_left_out": len(own) + len(others) - len(made.items) + events.blank + population.blank,
        "items_without_text": events.blank + population.blank,
        "queries_without_output": events.unanswered,
        "population_queries_without_output": population.unanswered,
        "users": len(users),
        "population_users": len(fit.population),
        "ordered_by": ordered,
        "sister_tasks": sorted({item.task for item in sisters}),
        "profiles": "written" if profiles else "statistics",
        "population_before_test": fit.before_test,
        "min_target": fit.target,
    }
    if instruction:
        notes["instruction_left_out"] = instruction
    return Material(made.items, tuple(rest), tuple(sisters), profiles, fit, notes)


def settled(others: Sequence[Item], tasks: Tasks, bounds: Bounds, *, final: bool) -> list[Item]:
    """Give other tasks' items their choices, as they are learnt where one adapter learns all of a user's tasks.

    Args:
        others: As read; those of unknown tasks, and of tasks whose items do not make up a task, are left out.
        tasks: The known tasks.
        bounds: Who can be a target.
        final: As for ``gather``.

    Returns:
        What can be learnt, oldest first.
    """
    found: list[Item] = []
    for name in sorted({item.task for item in others} & set(tasks)):
        own = unique(item for item in others if item.task == name)
        try:
            made = settle(own, tasks[name], lambda items: not_tested(items, [], bounds, final=final))
        except ConfigError as error:
            logger.warning("other tasks: %s is left out: %s", name, error)
            continue
        found += [item for item in made.items if item.learnable]
    return sorted(found, key=lambda item: item.day)


def _of_task(events: Found, task: Task, *, final: bool) -> list[Item]:
    """Return a file's items of the task, that must have some, and with ``final`` something to ask."""
    own = [item for item in events.items if item.task == task.name]
    if not own and events.items:
        there = ", ".join(sorted({item.task for item in events.items})[:_NAMED])
        raise ConfigError(f"events: expected some item of task {task.name}; the file has some of {there}")
    if final and events.unanswered and not any(item.query for item in own):
        raise ConfigError(
            f"events: none of its {events.unanswered} queries has an output (--outputs), and --final asks those; "
            "without it the ends of the histories are asked about"
        )
    return own


def _by_task(items: Sequence[Item]) -> list[list[Item]]:
    return [[item for item in items if item.task == name] for name in dict.fromkeys(item.task for item in items)]


def _population(files: Files, task: Task, targets: set[str], bare: Collection[str]) -> tuple[Found, list[Item]]:
    """Return what the file holds, and of it the items of users who are not ``targets``."""
    outputs = files.population_outputs
    if files.population is None:
        if outputs is not None:
            raise ConfigError(f"--population-outputs: {outputs} is of a --population, and there is none")
        return Found(()), []
    found = read(files.population, task.name, outputs=outputs, bare=bare, option="--population-outputs")
    others = [item for item in found.items if item.task == task.name and item.user_id not in targets]
    if not others:
        raise ConfigError(f"--population: expected items of task {task.name} of users who are not in --events")
    return found, others
