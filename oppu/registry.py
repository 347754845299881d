"""Where adapter versions lie: PEFT's directory format plus a sealed manifest, on any fsspec file system.

``<root>/<base>/<user hash>/<epoch>/<version>/``. A version's folder has one writer ever, since the store gives
every claim a version number of its own; the manifest is written last and everything is read back, so that a
folder without a true manifest is no version. Nothing is ever moved or overwritten. The root holds a mark: where that
is missing the registry is away, not empty, so no version counts as lost and none is written. Which version is served
is the store's business. The only module that imports safetensors; never pickle, and no torch.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as format_safetensors

from oppu.clock import Clock, SystemClock
from oppu.errors import AdapterUnreadable, ConfigError, TransientError
from oppu.lm.port import AdapterRef, AdapterSource, Tensors
from oppu.lora_config import alpha_of, fitted
from oppu.privacy import UserHash
from oppu.registry_place import Place, Spoilt, plain_name
from oppu.values import BaseId, UserId

logger = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "manifest.json"
_FORMAT = 1
_MANIFEST_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Written:
    """A version that lies complete in the registry. ``digest`` is the manifest's SHA-256, in hex."""

    path: str
    digest: str


class AdapterRegistry(AdapterSource):
    """Writes, reads, collects and erases adapter versions of one base."""

    def __init__(
        self,
        url: str,
        *,
        base: BaseId,
        user_hash: UserHash,
        adapter_config: Mapping[str, object] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Open the registry; nothing is read or written yet.

        Args:
            url: A folder or any fsspec URL.
            base: Fingerprint of the base that the adapters fit.
            user_hash: Names users in paths and seals manifests.
            adapter_config: Content of ``adapter_config.json``; needed to write; its ``lora_alpha`` is the base's.
            clock: Dates the manifests; the machine's where absent.

        Raises:
            ConfigError: The URL names no known file system, or the configuration has no usable ``lora_alpha``.
            TransientError: The file system's client cannot be had now.
        """
        self._place = Place(url)
        self._base = base
        self._hash = user_hash
        self._config, self._alpha = adapter_config, alpha_of(adapter_config)
        self._clock = clock or SystemClock()

    def open(self, *, in_use: Collection[BaseId]) -> None:
        """Make sure, before the first write, that the registry is there; an empty place becomes a new one.

        Args:
            in_use: The known bases, if anybody has an adapter by the store; then an empty place is not the registry.

        Raises:
            TransientError: The place is empty and should not be: a share is not mounted, or the URL is another's.
        """
        self._place.open([plain_name(base) for base in in_use])

    def path(self, ref: AdapterRef) -> str:
        """Return the folder of a version."""
        return f"{self._epoch_folder(ref.user_id, ref.epoch)}/{ref.version}"

    def write(
        self,
        ref: AdapterRef,
        tensors: Tensors,
        *,
        parent: int | None,
        trained_through: int,
        metrics: Mapping[str, float],
        token: int,
    ) -> Written:
        """Write a version: the files, then the manifest, then read all of it back.

        Args:
            ref: Its name, never used before.
            tensors: The weights.
            parent: The version that it was trained from or succeeds.
            trained_through: Sequence of the last event it may have learned from.
            metrics: Validation figures.
            token: Of the claim that it was trained under.

        Returns:
            Where it lies.

        Raises:
            AdapterUnreadable: The version exists already, or the weights are not finite.
            TransientError: The registry is not there, the file system failed, or does not return what was written.
            ConfigError: The registry was opened without an ``adapter_config``.
        """
        if self._config is None:
            raise ConfigError("registry: opened without an adapter configuration, so it cannot write")
        folder = self.path(ref)
        files = {CONFIG: _json(self._config), WEIGHTS: _format(tensors)}
        manifest = self._manifest(ref, files) | {
            "parent": parent,
            "token": token,
            "trained_through": trained_through,
            "metrics": {name: float(value) for name, value in metrics.items()},
            "written_at": self._clock.now().isoformat(),
        }
        files[MANIFEST] = self._seal(manifest)
        self._place.check()
        self._place.refresh()
        if self._place.entries(folder):
            raise AdapterUnreadable(f"version {ref.version}: its folder is taken, it is never written twice")
        self._place.make(folder)
        for name, content in files.items():
            self._place.write(f"{folder}/{name}", content)
        self._read_back(ref, files)
        return Written(folder, hashlib.sha256(files[MANIFEST]).hexdigest())

    def load(self, ref: AdapterRef) -> Tensors:
        """Read a version's weights and check them.

        Args:
            ref: The version.

        Returns:
            The weights, each float32 and finite; made under another ``lora_alpha``, scaled to mean the same here.

        Raises:
            AdapterUnreadable: Missing, truncated, tampered with, at odds with itself, or made for another base.
            TransientError: The registry cannot be reached, or is not there.
        """
        files = self._checked(ref)
        try:
            return fitted(files[CONFIG], _parse(ref, files[WEIGHTS]), self._alpha)
        except ConfigError as error:
            raise _unreadable(ref, f"{CONFIG}: {error}") from error

    def export(self, ref: AdapterRef, folder: Path) -> list[Path]:
        """Copy a version's checked files into a local folder, loadable by ``PeftModel.from_pretrained``.

        Args:
            ref: The version.
            folder: Made where missing; must be empty.

        Returns:
            The files written.

        Raises:
            ConfigError: The folder is not empty or cannot be written.
            AdapterUnreadable: As for :meth:`load`.
        """
        files = self._checked(ref)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError(f"folder: expected an empty one, {folder} is not")
            for name, content in files.items():
                (folder / name).write_bytes(content)
        except OSError as error:
            raise ConfigError(f"folder: cannot write {folder}: {error}") from error
        return [folder / name for name in files]

    def versions(self, user_id: UserId, epoch: int) -> list[int]:
        """Return the versions that have a manifest, in order; whether each is sound is for :meth:`load`."""
        folder = self._epoch_folder(user_id, epoch)
        self._place.refresh()
        return [v for v in self._numbers(folder) if self._place.exists(f"{folder}/{v}/{MANIFEST}")]

    def manifest(self, ref: AdapterRef) -> Mapping[str, object]:
        """Return a version's checked manifest; raises as :meth:`load` does."""
        return self._read_manifest(ref)[0]

    def delete(self, ref: AdapterRef) -> None:
        """Remove one version; one that is gone already is no error."""
        self._remove(self.path(ref))

    def collect(self, user_id: UserId, epoch: int, keep: Collection[int], *, older_than: datetime) -> list[int]:
        """Delete versions and torn leftovers that nobody can need any more, and all earlier epochs.

        Args:
            user_id: Whose.
            epoch: The user's current epoch.
            keep: Versions to spare whatever their age.
            older_than: Younger ones are spared: a reader or a publisher may be about to use them.

        Returns:
            The versions deleted in this epoch.
        """
        user_folder = self._user_folder(self._base, user_id)
        folder = self._epoch_folder(user_id, epoch)
        self._place.refresh()
        earlier = self._earlier(user_folder, epoch)
        candidates = [v for v in self._numbers(folder) if v not in keep]
        gone = [v for v in candidates if self._age_mark(f"{folder}/{v}") < older_than]
        for past in earlier:
            self._remove(past)
        for version in gone:
            self._remove(f"{folder}/{version}")
        return gone

    def check(self) -> None:
        """Raise ``TransientError`` where the registry is not there, or cannot be reached."""
        self._place.check()

    def delete_user(self, user_id: UserId) -> None:
        """Erase every version of a user, in all epochs and on all bases."""
        self._place.refresh()
        for base in self._place.bases():
            self._remove(f"{self._place.root}/{base}/{self._hash(user_id)}")

    def sweep(self, erased: Mapping[str, int]) -> int:
        """Remove, on all bases, what was written for erased users after their files were deleted.

        Args:
            erased: By the user's keyed hash, the epoch that began with the erasure; earlier ones go.

        Returns:
            How many epochs' folders were removed.

        Raises:
            TransientError: The registry is not there, or some folder could not be removed; all others were tried.
        """
        self._place.check()
        self._place.refresh()
        root, removed = self._place.root, 0
        fault: TransientError | None = None
        for base in self._place.bases():
            for user, epoch in erased.items():
                try:
                    for past in self._earlier(f"{root}/{base}/{user}", epoch):
                        self._remove(past)
                        removed += 1
                except TransientError as error:
                    fault = error
        if fault is not None:
            raise fault
        return removed

    # --- names
    def _user_folder(self, base: str, user_id: UserId) -> str:
        return f"{self._place.root}/{plain_name(base)}/{self._hash(user_id)}"

    def _epoch_folder(self, user_id: UserId, epoch: int) -> str:
        return f"{self._user_folder(self._base, user_id)}/{epoch}"

    def _numbers(self, folder: str) -> list[int]:
        names = self._place.entries(folder)
        return sorted(int(name) for name in names if name.isdecimal() and name.isascii())

    def _earlier(self, user_folder: str, epoch: int) -> list[str]:
        return [f"{user_folder}/{past}" for past in self._numbers(user_folder) if past < epoch]

    # --- manifests
    def _manifest(self, ref: AdapterRef, files: Mapping[str, bytes]) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "user": self._hash(ref.user_id),
            "epoch": ref.epoch,
            "version": ref.version,
            "base": self._base,
            "files": {n: {"bytes": len(c), "sha256": _sha256(c)} for n, c in files.items()},
        }

    def _seal(self, manifest: Mapping[str, Any]) -> bytes:
        return _json({**manifest, "seal": self._hash.seal(_json(manifest))})

    def _read_manifest(self, ref: AdapterRef) -> tuple[dict[str, Any], bytes]:
        raw = self._get(ref, MANIFEST, _MANIFEST_BYTES)
        try:
            manifest = json.loads(raw)
            if not isinstance(manifest, dict) or not isinstance(seal := manifest.pop("seal", None), str):
                raise _unreadable(ref, "the manifest has no seal")
            sealed = self._hash.sealed(_json(manifest), seal)
        except (ValueError, RecursionError) as error:  # what is read too deep for writing, or is no Unicode, as well
            raise _unreadable(ref, "the manifest is not JSON") from error
        if not sealed:
            raise _unreadable(ref, "the manifest's seal is broken, or made under another deployment key")
        expected = self._manifest(ref, {})
        for name in ("format", "user", "epoch", "version", "base"):
            if manifest.get(name) != expected[name]:
                raise _unreadable(ref, f"the manifest is of another {name}")
        return manifest, raw

    def _checked(self, ref: AdapterRef) -> dict[str, bytes]:
        manifest, raw = self._read_manifest(ref)
        # what has grown is not read to its end: it may be larger than memory
        files = {name: self._get(ref, name, manifest["files"][name]["bytes"]) for name in (CONFIG, WEIGHTS)}
        for name, content in files.items():
            noted = manifest["files"][name]
            if len(content) != (size := noted["bytes"]):
                raise _unreadable(ref, f"{name} has {_counted(content, size)} bytes, expected {size}")
            if _sha256(content) != noted["sha256"]:
                raise _unreadable(ref, f"{name} has another SHA-256 than its manifest says")
        return {**files, MANIFEST: raw}

    def _read_back(self, ref: AdapterRef, files: Mapping[str, bytes]) -> None:
        try:
            found = self._checked(ref)
        except AdapterUnreadable as error:
            raise TransientError(f"registry: written, but not found so when read back: {error}") from error
        if found != files:
            raise TransientError(f"registry: version {ref.version} reads back otherwise than it was written")

    # --- files
    def _get(self, ref: AdapterRef, name: str, most: int) -> bytes:
        try:
            content = self._place.read(f"{self.path(ref)}/{name}", most + 1)
        except Spoilt as error:
            self._place.check()
            raise _unreadable(ref, f"{name} cannot be read: {error}") from error
        if content is None:
            self._place.check()  # asked for only now, so that a look-up that finds its version costs nothing more
            raise _unreadable(ref, f"{name} is missing")
        return content

    def _age_mark(self, folder: str) -> datetime:
        """Return when a version was written; of one that is torn or spoilt, when its newest file was."""
        try:
            manifest = json.loads(self._place.read(f"{folder}/{MANIFEST}", _MANIFEST_BYTES) or b"")
            if (written_at := datetime.fromisoformat(manifest["written_at"])).tzinfo is not None:
                return written_at
        except (Spoilt, ValueError, KeyError, TypeError, RecursionError):
            pass
        times = [self._place.modified(f"{folder}/{name}") for name in self._place.entries(folder)]
        return max(times, default=datetime.min.replace(tzinfo=UTC))

    def _remove(self, folder: str) -> None:
        # the manifest first: what is half deleted must not look like a version
        if not self._place.remove(folder, first=MANIFEST):
            logger.debug("registry: nothing left to delete")


def _format(tensors: Tensors) -> bytes:
    arrays = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in tensors.items()}
    if not arrays or not all(np.isfinite(value).all() for value in arrays.values()):
        raise AdapterUnreadable("weights: expected finite values, nothing was written")
    content: bytes = format_safetensors(arrays, metadata={"format": "pt"})
    return content


def _parse(ref: AdapterRef, content: bytes) -> Tensors:
    try:
        tensors: dict[str, Any] = parse_safetensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(ref, f"{WEIGHTS} is no safetensors file") from error
    for value in tensors.values():
        if value.dtype != np.float32:
            raise _unreadable(ref, f"{WEIGHTS} holds {value.dtype}, expected float32")
        if not np.isfinite(value).all():
            raise _unreadable(ref, f"{WEIGHTS} holds values that are not finite")
    return tensors


def _unreadable(ref: AdapterRef, cause: str) -> AdapterUnreadable:
    return AdapterUnreadable(f"version {ref.version} (epoch {ref.epoch}): {cause}")


def _json(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True, default=_plain).encode()


def _plain(value: object) -> object:
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value)
    raise TypeError(f"not JSON: {type(value).__name__}")


def _counted(content: bytes, expected: int) -> str:
    return str(len(content)) if len(content) <= expected else "more"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
