"""The databases that the store's contract suite runs on: a fresh SQLite file, and Debian's PostgreSQL."""

import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psycopg
import pytest
from sqlalchemy import make_url

from oppu.clock import ManualClock
from oppu.settings import StoreSettings
from oppu.store.sql import SqlStore, migrate, open_store
from tests.oppu.store.support import BASE, Writer

Opener = Callable[..., SqlStore]

_INSTALL_SECONDS = 240
_START_SECONDS = 60
_UNPRIVILEGED = "postgres"
_PR_SET_PDEATHSIG = 1  # Linux


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    return found[-1].parent if found else None


def _install() -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("no PostgreSQL on this machine, and not root to install Debian's")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "-q", "update"], ["apt-get", "-q", "install", "-y", "postgresql"]):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_INSTALL_SECONDS, env=environment)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"PostgreSQL could not be installed: {error}")


def _run(command: list[str], folder: Path) -> None:
    user = _UNPRIVILEGED if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    done = subprocess.run(
        command,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_START_SECONDS,
        env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]}: {done.stdout.decode(errors='replace')[-2000:]}")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A private PostgreSQL on a Unix socket, stopped and deleted at the end; yields its folder."""
    if _binaries() is None:
        _install()
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL on this machine")
    folder = Path(tempfile.mkdtemp(prefix="oppu-pg-", dir="/tmp"))  # a socket's path must be short
    if os.geteuid() == 0:
        shutil.chown(folder, _UNPRIVILEGED, _UNPRIVILEGED)
    try:
        setup = ["-A", "trust", "-U", "oppu", "-E", "UTF8", "--no-sync", "-D", str(folder / "data")]
        _run([str(binaries / "initdb"), *setup], folder)
        options = ["listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "max_connections=60"]
        flags = [word for option in options for word in ("-c", option)]
        with (folder / "log").open("wb") as log:
            server = _spawn([str(binaries / "postgres"), "-D", str(folder / "data"), *flags], folder, log)
        try:
            _await(server, folder)
            yield str(folder)
        finally:
            server.send_signal(signal.SIGQUIT)  # nothing in it is worth a checkpoint
            server.wait(_START_SECONDS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _spawn(command: list[str], folder: Path, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    user = _UNPRIVILEGED if os.geteuid() == 0 else None
    return subprocess.Popen(
        command,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C.UTF-8"},
        preexec_fn=_die_with_parent,
    )


def _die_with_parent() -> None:
    """Have the kernel stop the server when the test process ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


def _await(server: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            psycopg.connect(host=str(folder), user="oppu", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text(errors="replace")[-2000:]) from None
            time.sleep(0.05)


@pytest.fixture
def sqlite_settings(tmp_path: Path) -> StoreSettings:
    """A SQLite store that does not exist yet."""
    return StoreSettings(url=f"sqlite:///{tmp_path}/store/history.db", busy_timeout_seconds=0.3)


@contextmanager
def _database(server: str, source: str) -> Iterator[StoreSettings]:
    name = f"t{uuid.uuid4().hex[:12]}"
    with psycopg.connect(host=server, user="oppu", dbname="postgres", autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {source}".encode())
        url = f"postgresql+psycopg://oppu@/{name}?host={server}"
        yield StoreSettings(url=url, busy_timeout_seconds=0.5)
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(scope="session")
def postgres_template(postgres_server: str) -> Iterator[str]:
    """A migrated database to copy, which is faster than to migrate for each test."""
    with _database(postgres_server, "template0") as settings:
        migrate(settings)
        yield str(make_url(settings.url).database)


@pytest.fixture
def postgres_settings(postgres_server: str) -> Iterator[StoreSettings]:
    """An empty PostgreSQL database of this test alone."""
    with _database(postgres_server, "template0") as settings:
        yield settings


@pytest.fixture
def migrated_postgres(postgres_server: str, postgres_template: str) -> Iterator[StoreSettings]:
    """A migrated PostgreSQL database of this test alone."""
    with _database(postgres_server, postgres_template) as settings:
        yield settings


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file to copy."""
    file = tmp_path_factory.mktemp("template") / "history.db"
    migrate(StoreSettings(url=f"sqlite:///{file}"))
    return file


@pytest.fixture
def migrated_sqlite(sqlite_settings: StoreSettings, sqlite_template: Path) -> StoreSettings:
    """A migrated SQLite store of this test alone."""
    file = Path(make_url(sqlite_settings.url).database or "")
    file.parent.mkdir()
    shutil.copy(sqlite_template, file)
    return sqlite_settings


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def settings(request: pytest.FixtureRequest) -> StoreSettings:
    """A migrated store on each database."""
    prepared: StoreSettings = request.getfixturevalue(f"migrated_{request.param}")
    return prepared


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty(request: pytest.FixtureRequest) -> StoreSettings:
    """A store that was never migrated, on each database."""
    prepared: StoreSettings = request.getfixturevalue(f"{request.param}_settings")
    return prepared


@pytest.fixture
def clock() -> ManualClock:
    """The machine's clock for SQLite; PostgreSQL has its own."""
    return ManualClock()


@pytest.fixture
def opener() -> Iterator[Opener]:
    """Opens stores and closes them at the end."""
    opened: list[SqlStore] = []

    def open_one(settings: StoreSettings, clock: ManualClock | None = None) -> SqlStore:
        opened.append(open_store(settings, deployment_key="test key", clock=clock))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(settings: StoreSettings, opener: Opener) -> SqlStore:
    """An open store with one base registered."""
    opened = opener(settings)
    opened.ping()
    opened.register_base(BASE)
    return opened


@pytest.fixture
def writer(store: SqlStore) -> Writer:
    """Writes to ``store``."""
    return Writer(store)
