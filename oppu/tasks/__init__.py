"""Tasks: what is predicted for a user, how it is phrased, and which answers are allowed. Read from TOML files.

A task file has ``name``, ``kind`` (``choice``, ``rating`` or ``text``), ``prompt`` (with ``{input}``), ``answer``
(the text before the answer), optional ``labels`` (the allowed outputs of a choice or rating task; absent: the
request's ``choices``), ``max_new_tokens`` for texts, and ``bare_history`` (whether a user's history may hold texts
without an answer: events with a blank output, which are learnt by next-token loss on their input).
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, cast

from oppu.errors import ConfigError, InvalidRecord, Reason

Kind = Literal["choice", "rating", "text"]
_KINDS = ("choice", "rating", "text")
_FIELDS = {"name", "kind", "prompt", "answer", "labels", "max_new_tokens", "description", "bare_history"}


@dataclass(frozen=True, slots=True)
class Task:
    """One task. ``labels`` empty with kind ``choice`` means that every record brings its own ``choices``."""

    name: str
    kind: Kind
    prompt: str
    answer: str
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 32
    description: str = ""
    bare_history: bool = False

    def allowed(self, choices: tuple[str, ...] | None) -> tuple[str, ...]:
        """Return the outputs that may be given to an item with these ``choices``; empty for texts.

        Args:
            choices: The record's own choices, if any.

        Returns:
            The allowed outputs.

        Raises:
            InvalidRecord: A choice task without labels, and the record brings no choices.
        """
        if self.kind == "text":
            return ()
        if choices:
            return choices
        if not self.labels:
            raise InvalidRecord(Reason.INVALID_RECORD, f"choices: task {self.name} expects them in every record")
        return self.labels

    def check_output(self, output: str, choices: tuple[str, ...] | None) -> None:
        """Check that a user's output is one of the allowed ones.

        Args:
            output: What the user did; may be blank where the task's history may be bare.
            choices: The record's own choices, if any.

        Raises:
            InvalidRecord: With ``unknown_label``; blank where it may not be, with ``invalid_record``.
        """
        allowed = self.allowed(choices)
        if not output.strip() and output not in allowed:
            if self.bare_history:
                return
            raise InvalidRecord(Reason.INVALID_RECORD, "output: expected text that is not blank")
        if allowed and output not in allowed:
            shown = "the record's choices"  # they are the user's text, and a message quotes none
            if allowed is self.labels:
                shown = ", ".join(allowed[:8]) + (", …" if len(allowed) > 8 else "")
            raise InvalidRecord(Reason.UNKNOWN_LABEL, f"output: expected one of {shown} for task {self.name}")


class Tasks(Mapping[str, Task]):
    """The known tasks by name."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self._tasks = dict(tasks)

    def __getitem__(self, name: str) -> Task:
        return self._tasks[name]

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def require(self, name: str) -> Task:
        """Return a task named by a record.

        Args:
            name: The task's name.

        Returns:
            The task.

        Raises:
            InvalidRecord: With ``unknown_task``.
        """
        try:
            return self._tasks[name]
        except KeyError as error:
            known = ", ".join(sorted(self._tasks))
            raise InvalidRecord(Reason.UNKNOWN_TASK, f"task: expected one of {known}") from error


def load_tasks(folder: Path | None = None) -> Tasks:
    """Read the packaged tasks and those of a folder, which may replace packaged ones.

    Args:
        folder: Further task files; ``None`` = the packaged ones only.

    Returns:
        The tasks by name.

    Raises:
        ConfigError: Listing every fault of every file.
    """
    tasks: dict[str, Task] = {}
    problems: list[str] = []
    packaged = [p for p in resources.files(__package__).iterdir() if p.name.endswith(".toml")]
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"service.tasks_dir: no such folder: {folder}")
    own = sorted(folder.glob("*.toml")) if folder is not None else []
    for file in [*sorted(packaged, key=lambda p: p.name), *own]:
        try:
            task = _task(file.name, tomllib.loads(file.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            problems.append(f"{file.name}: {error}")
        except ConfigError as error:
            problems.extend(error.problems)
        else:
            tasks[task.name] = task
    if problems:
        raise ConfigError(*problems)
    return Tasks(tasks)


def _task(file: str, content: dict[str, object]) -> Task:
    problems = [f"{file}: unknown field {name}" for name in sorted(set(content) - _FIELDS)]
    for name in ("name", "kind", "prompt", "answer"):
        if not isinstance(content.get(name), str) or not content[name]:
            problems.append(f"{file}: {name}: expected a text")
    if content.get("kind") not in _KINDS:
        problems.append(f"{file}: kind: expected one of {', '.join(_KINDS)}")
    if isinstance(content.get("prompt"), str) and "{input}" not in str(content["prompt"]):
        problems.append(f"{file}: prompt: expected a text that has {{input}}")
    labels = content.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(x, str) and x for x in labels):
        problems.append(f"{file}: labels: expected a list of texts")
        labels = []
    if content.get("kind") == "rating" and not all(_is_number(x) for x in labels or [""]):
        problems.append(f"{file}: labels: a rating task expects numbers")
    if len(set(labels)) < len(labels) or len(labels) == 1:
        problems.append(f"{file}: labels: expected at least two, all different")
    problems += _optional(file, content)
    if problems:
        raise ConfigError(*problems)
    return Task(
        name=str(content["name"]),
        kind=cast(Kind, content["kind"]),
        prompt=str(content["prompt"]),
        answer=str(content["answer"]),
        labels=tuple(labels),
        max_new_tokens=cast(int, content.get("max_new_tokens", 32)),
        description=str(content.get("description", "")),
        bare_history=bool(content.get("bare_history", False)),
    )


def _optional(file: str, content: dict[str, object]) -> list[str]:
    """Return the faults of the fields that may be absent."""
    problems = []
    tokens = content.get("max_new_tokens", 32)
    if not isinstance(tokens, int) or tokens < 1:
        problems.append(f"{file}: max_new_tokens: expected a whole number from 1")
    if not isinstance(content.get("bare_history", False), bool):
        problems.append(f"{file}: bare_history: expected true or false")
    return problems


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
