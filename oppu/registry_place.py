"""The place where a registry lies: its file system, whose errors become ours, and the mark that says it is there.

Invariants: nothing that a file system or its client raises leaves here as it is. What is missing is no error, one
file that cannot be read is ``Spoilt``, and all else may pass: clients of object stores let errors through that derive
from ``Exception`` alone. A root without the mark is no registry: an empty mount point looks like one with no adapters.
"""

import errno
import hashlib
import io
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import fsspec

from oppu.errors import ConfigError, OppuError, TransientError

MARK = ".oppu-registry"
"""No base's folder has this name: none begins with a dot."""
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_MARK_TEXT = b"A registry of adapters lies here. Without this file it counts as away.\n"
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_RACES = 5
"""Attempts at deleting a folder of which others delete parts."""
_SPOILT = frozenset({errno.EACCES, errno.EPERM, errno.ELOOP})
"""What says that this one file cannot be read; waiting for it would hold up all other users."""


def plain_name(base: str) -> str:
    """Return a base's folder."""
    return base if _PLAIN.fullmatch(base) else hashlib.sha256(base.encode()).hexdigest()


class Spoilt(OppuError):
    """One file is there and cannot be read."""


class Place:
    """A folder on any fsspec file system. Every method raises ``TransientError`` where that cannot be reached."""

    def __init__(self, url: str) -> None:
        """Open the file system; nothing is read or written yet.

        Args:
            url: A folder or any fsspec URL.

        Raises:
            ConfigError: It names no known file system.
            TransientError: The file system's client cannot be had now.
        """
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(f"registry.url: cannot open {url!r}: {error}") from error
        except Exception as error:  # a client's own
            raise _away("open", url, error) from error
        self.root = str(root).rstrip("/")
        self._mark = f"{self.root}/{MARK}"

    def open(self, in_use: Collection[str]) -> None:
        """Set the mark where it is missing and this is no empty place in the registry's stead.

        Args:
            in_use: Folders of which the registry must have one, if it has any adapter; empty: it may be new.

        Raises:
            TransientError: There should be adapters, and there are none; or the file system failed.
        """
        if self._marked():
            return
        self.refresh()
        if in_use and not set(in_use) & set(self.entries(self.root)):
            raise _not_there(self._mark)
        self.make(self.root)
        self.write(self._mark, _MARK_TEXT)

    def check(self) -> None:
        """Check that the registry is there.

        Raises:
            TransientError: It is not, or cannot be reached.
        """
        if not self._marked():
            raise _not_there(self._mark)

    def _marked(self) -> bool:
        try:
            return self.read(self._mark) is not None
        except Spoilt:
            return False

    # --- reading
    def refresh(self) -> None:
        """Forget listings that were kept: others write here too."""
        with _mapped("list", self.root):
            self._fs.invalidate_cache()

    def read(self, path: str, most: int | None = None) -> bytes | None:
        """Return a file's content.

        Args:
            path: The file.
            most: Bytes to read at most; ``None``: all.

        Returns:
            The content; ``None`` where there is no such file.

        Raises:
            Spoilt: This one file cannot be read.
            TransientError: The file system cannot be reached.
        """
        reach = {} if most is None else {"start": 0, "end": most}
        try:
            return bytes(self._fs.cat_file(path, **reach))
        except _MISSING:
            return None
        except Exception as error:  # a client's own
            if isinstance(error, OSError) and error.errno in _SPOILT:
                raise Spoilt(error.strerror or str(error)) from error
            raise _away("read", path, error) from error

    def entries(self, folder: str) -> list[str]:
        """Return the names in a folder, the mark excepted; none where it is missing."""
        try:
            with _mapped("list", folder, *_MISSING):
                found = [str(path) for path in self._fs.ls(folder, detail=False)]
        except _MISSING:
            return []
        return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in found} - {MARK})

    def bases(self) -> list[str]:
        """Return the folders of bases; others may lie beside them, as a volume's ``lost+found``."""
        return [name for name in self.entries(self.root) if _PLAIN.fullmatch(name)]

    def exists(self, path: str) -> bool:
        """Say whether a file is there; unlike fsspec's own, not in doubt."""
        try:
            with _mapped("find", path, *_MISSING):
                self._fs.info(path)
        except _MISSING:
            return False
        return True

    def modified(self, path: str) -> datetime:
        """Return when a file was last written."""
        with _mapped("read", path):
            time: datetime = self._fs.modified(path)
        return time if time.tzinfo else time.replace(tzinfo=UTC)

    # --- writing
    def make(self, folder: str) -> None:
        """Make a folder and those above it, where they are missing."""
        with _mapped("write", folder):
            self._fs.makedirs(folder, exist_ok=True)

    def write(self, path: str, content: bytes) -> None:
        """Write a file whole; durable when this returns."""
        with _mapped("write", path), self._fs.open(path, "wb") as file:
            file.write(content)
            file.flush()
            try:
                os.fsync(file.fileno())
            except (AttributeError, io.UnsupportedOperation):
                return  # not a local file: durable when closed

    def remove(self, folder: str, *, first: str) -> bool:
        """Remove a folder with all in it, the file ``first`` before the others; false where it is missing."""
        try:
            with _mapped("delete", folder, *_MISSING):
                self._fs.rm_file(f"{folder}/{first}")
        except _MISSING:
            pass
        for _ in range(_RACES):
            try:
                with _mapped("delete", folder, *_MISSING):
                    self._fs.rm(folder, recursive=True)
            except _MISSING:  # all of it, or a part that somebody else deletes at the same time
                self.refresh()
                if not self.exists(folder):
                    return False
            else:
                return True
        raise _away("delete", folder, TimeoutError("others delete there as well"))


@contextmanager
def _mapped(verb: str, path: str, *passing: type[Exception]) -> Iterator[None]:
    """Around calls of a file system and nothing else."""
    try:
        yield
    except passing:
        raise
    except Exception as error:  # a client's own
        raise _away(verb, path, error) from error


def _away(verb: str, path: str, error: Exception) -> TransientError:
    return TransientError(f"registry: cannot {verb} {path}: {error}")


def _not_there(mark: str) -> TransientError:
    return TransientError(f"registry: not there: no {mark}; is the share mounted, is registry.url right?")
