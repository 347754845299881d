"""A file system without moves, whose writes may stop half-way or be refused: what object stores and full disks do."""

from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class BrittleFile(MemoryFile):  # type: ignore[misc]
    """A file that keeps only the first half of what was written, where the file system says so."""

    def write(self, data: bytes) -> int:
        torn = BrittleFileSystem.tears(self.path)
        super().write(data[: len(data) // 2] if torn else data)
        return len(data)


class BrittleFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Has no moves, and tears or refuses the writes of files whose names end as told."""

    protocol = "brittle"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    torn: str | None = None
    full: str | None = None

    @classmethod
    def tears(cls, path: str) -> bool:
        return cls.torn is not None and path.endswith(cls.torn)

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb" and self.full is not None and path.endswith(self.full):
            raise OSError(28, "No space left on device")
        if mode != "wb":
            return super()._open(path, mode, *args, **kwargs)
        file = BrittleFile(self, path, kwargs.get("data"))
        if not self._intrans:
            file.commit()
        return file

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("no moves here")

    move = rename = mv_file = cp_file = copy = mv


fsspec.register_implementation("brittle", BrittleFileSystem, clobber=True)
