"""A registry that is away: errors of a file system's own, an empty mount point, a sweep that cannot finish."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from oppu.errors import AdapterUnreadable, TransientError
from oppu.lm.port import AdapterRef
from oppu.registry import CONFIG, MANIFEST, WEIGHTS, AdapterRegistry
from oppu.registry_place import MARK, Place
from oppu.values import BaseId, UserId
from tests.oppu.brittle import BrittleFileSystem
from tests.oppu.registry_support import BASE, HASH, REF, SETUP, USER, assert_same, opened, tensors, write

SOON = datetime(3000, 1, 1, tzinfo=UTC)
NEXT = replace(REF, version=4)


class NoConnection(Exception):
    """An error as object stores' clients have them: derived from ``Exception`` alone."""


class Clientless(MemoryFileSystem):  # type: ignore[misc]
    """A file system whose client cannot be had."""

    protocol = "clientless"

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise NoConnection("no credentials")


fsspec.register_implementation("clientless", Clientless, clobber=True)


@pytest.fixture
def brittle() -> Iterator[AdapterRegistry]:
    """A registry with one version."""
    registry = opened(f"brittle://{uuid.uuid4().hex}")
    write(registry)
    yield registry
    BrittleFileSystem.mend()


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """Where a share is mounted."""
    folder = tmp_path / "share"
    folder.mkdir()
    return folder


@pytest.fixture
def registry(share: Path) -> AdapterRegistry:
    """A registry with one version, on the share."""
    made = opened(str(share / "adapters"))
    write(made)
    return made


def unmount(share: Path) -> None:
    share.rename(share.with_name("elsewhere"))
    share.mkdir()


def mount(share: Path) -> None:
    share.rmdir()
    share.with_name("elsewhere").rename(share)


# --- errors of the file system's own
CALLS: dict[str, tuple[str, Callable[[AdapterRegistry], object]]] = {
    "load": ("cat_file", lambda r: r.load(REF)),
    "manifest": ("cat_file", lambda r: r.manifest(REF)),
    "open": ("cat_file", lambda r: r.open(in_use=[BASE])),
    "write: look": ("ls", lambda r: write(r, NEXT)),
    "write: folder": ("makedirs", lambda r: write(r, NEXT)),
    "write: file": ("open", lambda r: write(r, NEXT)),
    "write: mark": ("cat_file", lambda r: write(r, NEXT)),
    "versions": ("ls", lambda r: r.versions(USER, 1)),
    "versions: manifest": ("info", lambda r: r.versions(USER, 1)),
    "delete": ("rm", lambda r: r.delete(REF)),
    "delete user": ("ls", lambda r: r.delete_user(USER)),
    "collect": ("ls", lambda r: r.collect(USER, 1, set(), older_than=SOON)),
    "collect: age": ("cat_file", lambda r: r.collect(USER, 1, set(), older_than=SOON)),
    "sweep": ("ls", lambda r: r.sweep({HASH(USER): 2})),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("error", [NoConnection("could not connect"), OSError(5, "Input/output error")])
def test_whatever_a_file_system_raises_may_pass(brittle: AdapterRegistry, name: str, error: Exception) -> None:
    fault, call = CALLS[name]
    BrittleFileSystem.faults = {fault: error}
    with pytest.raises(TransientError, match="could not connect|Input/output error"):
        call(brittle)


def test_the_age_of_torn_leftovers_may_be_unknown_for_now(brittle: AdapterRegistry) -> None:
    fsspec.filesystem("brittle").rm_file(f"{brittle.path(REF)}/{MANIFEST}")
    BrittleFileSystem.faults = {"modified": NoConnection("could not connect")}
    with pytest.raises(TransientError, match="could not connect"):
        brittle.collect(USER, 1, set(), older_than=SOON)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit])
def test_what_stops_the_process_is_no_error_of_the_file_system(
    brittle: AdapterRegistry, fault: type[BaseException]
) -> None:
    BrittleFileSystem.faults = {"cat_file": fault()}
    with pytest.raises(fault):
        brittle.load(REF)


def test_a_client_that_cannot_be_had_may_pass() -> None:
    with pytest.raises(TransientError, match="no credentials"):
        AdapterRegistry("clientless://bucket", base=BASE, user_hash=HASH)


# --- the mark
def test_an_unmounted_share_is_no_registry_without_adapters(registry: AdapterRegistry, share: Path) -> None:
    unmount(share)
    with pytest.raises(TransientError, match="not there"):
        registry.load(REF)
    with pytest.raises(TransientError, match="not there"):
        write(registry, NEXT)
    later = AdapterRegistry(str(share / "adapters"), base=BASE, user_hash=HASH, adapter_config=SETUP)
    with pytest.raises(TransientError, match="not there"):
        later.open(in_use=[BASE])
    assert list(share.iterdir()) == []
    mount(share)
    later.open(in_use=[BASE])
    assert_same(registry.load(REF), tensors())
    write(registry, NEXT)


def test_a_share_that_drops_amid_a_write_leaves_no_version(
    registry: AdapterRegistry, share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_back = registry._read_back

    def dropped(ref: AdapterRef, files: dict[str, bytes]) -> None:
        unmount(share)
        read_back(ref, files)

    monkeypatch.setattr(registry, "_read_back", dropped)
    with pytest.raises(TransientError, match="not there"):
        write(registry, NEXT)


def test_a_missing_version_of_a_registry_that_is_there_is_lost(registry: AdapterRegistry) -> None:
    with pytest.raises(AdapterUnreadable, match="missing"):
        registry.load(NEXT)


def test_a_file_that_cannot_be_read_is_no_single_one_where_the_mark_cannot_be_either(
    registry: AdapterRegistry, share: Path
) -> None:
    for file in (Path(registry.path(REF), WEIGHTS), share / "adapters" / MARK):
        file.unlink()
        file.symlink_to(file.name)
    with pytest.raises(TransientError, match="not there"):
        registry.load(REF)


def test_an_empty_place_becomes_a_registry_while_nobody_has_an_adapter(share: Path) -> None:
    made = opened(str(share / "deep" / "adapters"))
    made.open(in_use=[BASE])
    assert [path.name for path in (share / "deep" / "adapters").iterdir()] == [MARK]
    write(made)


def test_a_registry_of_before_the_mark_gets_it(registry: AdapterRegistry, share: Path) -> None:
    (share / "adapters" / MARK).unlink()
    assert_same(registry.load(REF), tensors())
    registry.open(in_use=[BaseId("another"), BASE])
    write(registry, NEXT)


def test_another_place_is_not_taken_for_the_registry(share: Path) -> None:
    (share / "photos").mkdir()
    with pytest.raises(TransientError, match="not there"):
        AdapterRegistry(str(share), base=BASE, user_hash=HASH).open(in_use=[BASE])
    assert [path.name for path in share.iterdir()] == ["photos"]


def test_a_mark_made_by_hand_begins_a_new_registry(share: Path) -> None:
    (share / MARK).touch()
    made = AdapterRegistry(str(share), base=BASE, user_hash=HASH, adapter_config=SETUP)
    made.open(in_use=[BASE])
    write(made)


def test_a_look_up_that_finds_its_version_reads_its_files_and_nothing_else(
    brittle: AdapterRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[tuple[str, str]] = []
    monkeypatch.setattr(BrittleFileSystem, "meet", lambda _, call, path: met.append((call, path.rsplit("/", 1)[-1])))
    brittle.load(REF)
    assert sorted(met) == [("cat_file", name) for name in sorted((CONFIG, WEIGHTS, MANIFEST))]


# --- sweeping
def test_a_sweep_takes_earlier_epochs_on_all_bases_and_nothing_else(registry: AdapterRegistry, share: Path) -> None:
    other = AdapterRegistry(str(share / "adapters"), base=BaseId("base-2"), user_hash=HASH, adapter_config=SETUP)
    now, neighbour = replace(REF, epoch=3), replace(REF, user_id=UserId("neighbour"))
    for where, ref in ((registry, replace(REF, epoch=2)), (registry, now), (other, REF), (registry, neighbour)):
        write(where, ref)
    erased = {HASH(USER): 3, HASH("nobody"): 9}
    assert registry.sweep(erased) == 3
    assert registry.sweep(erased) == 0
    assert [registry.versions(USER, epoch) for epoch in (1, 2, 3)] == [[], [], [3]]
    assert other.versions(USER, 1) == []
    assert_same(registry.load(now), tensors())
    assert_same(registry.load(neighbour), tensors())


def test_what_is_no_bases_folder_is_not_looked_into(registry: AdapterRegistry, share: Path) -> None:
    (share / "adapters" / "lost+found" / str(HASH(USER)) / "1").mkdir(parents=True)
    assert registry.sweep({HASH(USER): 2}) == 1
    registry.delete_user(USER)
    assert (share / "adapters" / "lost+found" / str(HASH(USER)) / "1").exists()


def test_a_folder_that_cannot_be_swept_keeps_no_other(brittle: AdapterRegistry) -> None:
    users = [UserId(f"user{n}") for n in range(3)]
    for user in users:
        write(brittle, AdapterRef(user, 1, 1))
    erased = {HASH(user): 2 for user in users}
    BrittleFileSystem.faults, BrittleFileSystem.failing = {"rm": NoConnection("reset")}, HASH(users[0])
    with pytest.raises(TransientError, match="reset"):
        brittle.sweep(erased)
    assert [brittle.versions(user, 1) for user in users[1:]] == [[], []]
    BrittleFileSystem.mend()
    assert brittle.sweep(erased) == 1


def test_nothing_is_swept_where_there_is_no_registry(registry: AdapterRegistry, share: Path) -> None:
    unmount(share)
    with pytest.raises(TransientError, match="not there"):
        registry.sweep({HASH(USER): 2})


def test_a_folder_of_which_others_delete_parts_is_deleted_all_the_same(
    share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, place = share / "adapters" / "base" / "user", Place(str(share / "adapters"))
    races = 2

    def raced(path: str, **_: object) -> None:
        nonlocal races
        if races:
            races -= 1
            raise FileNotFoundError(f"{path}/1")  # which somebody else has just deleted
        shutil.rmtree(path)

    monkeypatch.setattr(place._fs, "rm", raced)
    folder.mkdir(parents=True)
    assert place.remove(str(folder), first="manifest.json") and not folder.exists()
    races = 1
    assert not place.remove(str(folder), first="manifest.json")
    folder.mkdir()
    races = 99
    with pytest.raises(TransientError, match="others delete there as well"):
        place.remove(str(folder), first="manifest.json")
