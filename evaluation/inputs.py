"""What a work folder's results were made from, so that no run goes on with another's stages, nor beside another."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from evaluation.corpus import Item
from evaluation.roles import Bounds
from oppu.errors import ConfigError
from oppu.settings import Settings

_FILE, _LOCK, _OPENINGS = "inputs.json", "lock", "final.log"
_OF_THE_MACHINE = {"device", "dtype", "threads"}


def keep(
    folder: Path, items: Sequence[Item], bounds: Bounds, settings: Settings, more: Mapping[str, object] | None = None
) -> None:
    """Write down what a folder's results are made from, or compare it with what is written there.

    Args:
        folder: The run's.
        items: With their choices.
        bounds: Who can be what.
        settings: Base and retriever.
        more: Anything else that decides results.

    Raises:
        ConfigError: The folder holds results of something else; names what differs.
    """
    left_out = {*_OF_THE_MACHINE, "query_encoder"}  # of that the content counts, which is among ``more``
    model = {name: value for name, value in settings.model.model_dump().items() if name not in left_out}
    parts = {
        "events": [(i.item_id, i.user_id, str(i.day), i.input, i.output, i.choices, i.query) for i in items],
        "bounds": [bounds.target, bounds.calibrate, bounds.folds_below, sorted(bounds.population), bounds.before_test],
        "model and retriever settings": [model, settings.retriever.model_dump()],
        **(more or {}),
    }
    now = {name: _digest(part) for name, part in parts.items()}
    path = folder / _FILE
    if path.exists():
        try:
            then = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"--out: cannot read {path}: {error}: name another folder") from error
        other = [name for name, digest in now.items() if then.get(name, digest) != digest]
        if other:
            raise ConfigError(f"--out: {folder} holds results of other {', '.join(other)}: name another folder")
    else:
        write_whole(path, json.dumps(now, indent=1) + "\n")


def opened(folder: Path, what: Mapping[str, object]) -> None:
    """Write down that the held-back part was opened, when, and by what.

    Args:
        folder: The run's.
        what: Task and recipe.
    """
    line = {"at": datetime.now(UTC).isoformat(), **what}
    with (folder / _OPENINGS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, sort_keys=True) + os.linesep)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep a folder to one run: two would write the same stages. The lock ends with the process, however it ends.

    Args:
        folder: The run's; made where it is not there.

    Raises:
        ConfigError: It cannot be made, or another run is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("w")
    except OSError as error:
        raise ConfigError(f"--out: cannot write in the folder {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"--out: another run is at work in {folder}: wait for it or name another folder"
            ) from error
        yield


def write_whole(path: Path, text: str) -> None:
    """Write beside and rename: what is there is whole."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
