"""A file system without moves, whose writes may stop half-way or be refused, and whose calls may fail: what object
stores and full disks do."""

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
    """Has no moves, tears or refuses the writes of files whose names end as told, and fails the calls named.

    ``faults`` holds what each call raises, by its name, where the path contains ``failing``.
    """

    protocol = "brittle"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    torn: str | None = None
    full: str | None = None
    faults: dict[str, BaseException] = {}
    failing: str = ""

    @classmethod
    def mend(cls) -> None:
        """Work from now on."""
        cls.torn = cls.full = None
        cls.faults, cls.failing = {}, ""

    @classmethod
    def meet(cls, call: str, path: str) -> None:
        if call in cls.faults and cls.failing in path:
            raise cls.faults[call]

    @classmethod
    def tears(cls, path: str) -> bool:
        return cls.torn is not None and path.endswith(cls.torn)

    def ls(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self.meet("ls", path)
        return super().ls(path, *args, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        self.meet("info", path)
        return super().info(path, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self.meet("cat_file", path)
        return super().cat_file(path, *args, **kwargs)

    def modified(self, path: str) -> Any:
        self.meet("modified", path)
        return super().modified(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.meet("makedirs", path)
        super().makedirs(path, exist_ok)

    def rm(self, path: str, *args: Any, **kwargs: Any) -> None:
        self.meet("rm", path)
        super().rm(path, *args, **kwargs)

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        self.meet("open", path)
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
