"""Connections, transactions and errors: all that differs between SQLite and PostgreSQL is here.

Invariants: a write transaction on SQLite begins IMMEDIATE, so it never fails half-way for a lock it could not take;
PostgreSQL runs READ COMMITTED, so a statement after a row lock sees what the former holder wrote. Database errors
that may pass become ``TransientError``; what the data is refused for is ``StoreRefused``, all else (missing rights or
tables, a damaged file) ``FatalError``: no record is at fault. None of them quotes what was to be stored.
"""

import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import CTE, URL, Connection, Engine, Table, column, create_engine, event, exc, make_url, text, values
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.types import TypeEngine

from oppu.clock import Clock, SystemClock
from oppu.errors import ConfigError, FatalError, StoreRefused, TransientError
from oppu.settings import StoreSettings
from oppu.store.schema import to_micros

logger = logging.getLogger(__name__)
T = TypeVar("T")

CHUNK = 400
"""Rows of one IN list or VALUES: far below SQLite's 32,766 variables, and quick to plan on PostgreSQL."""

_IDLE_TRANSACTION_SECONDS = 60  # a stopped worker must not hold its row locks for ever
_NOTICED_GONE = {
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}
"""libpq's: a host that vanished without a word ends its connections within half a minute; else it takes hours."""
_BETWEEN_TRIES_SECONDS = 0.01
_READ_ONLY = "25006"  # PostgreSQL's state of a server that is being failed over
_WRITE = "oppu_write"
_REGISTER_LOCK = 0x6F707075  # "oppu"


def chunks(items: Sequence[T], size: int = CHUNK) -> Iterator[Sequence[T]]:
    """Cut a sequence into pieces of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


class Database:
    """An engine with the two kinds of transaction the store has."""

    def __init__(self, settings: StoreSettings, clock: Clock | None = None) -> None:
        """Make the engine; no connection is opened.

        Args:
            settings: URL and lock timeout.
            clock: The machine's clock on SQLite (``None``: the system's); PostgreSQL uses the server's.

        Raises:
            ConfigError: The URL is not one of a database we support, or its driver is not installed.
        """
        self.url = parse_url(settings.url)
        self._clock = clock or SystemClock()
        self.engine = _engine(self.url, settings.busy_timeout_seconds)

    @property
    def file(self) -> Path | None:
        """The SQLite file; ``None`` on PostgreSQL."""
        return Path(self.url.database or "") if self.url.get_backend_name() == "sqlite" else None

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Run one write transaction: committed at the end, rolled back on any error."""
        with translated(), self.engine.connect() as connection:
            connection = connection.execution_options(**{_WRITE: True})
            with connection.begin():
                yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Run statements that write nothing."""
        with translated(), self.engine.connect() as connection, connection.begin():
            yield connection

    def now(self, connection: Connection) -> int:
        """Return the store's own clock in microseconds: the server's on PostgreSQL, else the machine's."""
        if connection.dialect.name == "sqlite":
            return to_micros(self._clock.now())
        moment = text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)")
        return int(connection.execute(moment).scalar_one())

    def clear_log(self) -> None:
        """Empty SQLite's write-ahead log, which holds deleted rows too, unless readers keep it from that now."""
        if self.file is None:
            return
        try:
            with translated(), closing(self.engine.raw_connection()) as connection:
                busy, *_ = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except (TransientError, sqlite3.OperationalError):
            busy = True
        if busy:
            logger.warning("%s-wal is in use: deleted rows stay in it until a later checkpoint", self.file)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def parse_url(url: str) -> URL:
    """Check a store URL.

    Args:
        url: ``sqlite:///file`` or ``postgresql+psycopg://…``.

    Returns:
        The URL with its driver named.

    Raises:
        ConfigError: Any other.
    """
    expected = "store.url: expected sqlite:///FILE or postgresql+psycopg://…"
    try:
        parsed = make_url(url)
    except exc.ArgumentError as error:
        raise ConfigError(f"{expected}, it does not parse") from error
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend != "sqlite":
        raise ConfigError(f"{expected}, got {backend}")
    if not parsed.database or ":memory:" in parsed.database:
        raise ConfigError(f"{expected}; a store in memory would be lost with its connection")
    return parsed


def lock_bases(connection: Connection, *, exclusive: bool = False) -> None:
    """Keep the list of bases as it is until the transaction ends, or (exclusive) wait to change it."""
    if connection.dialect.name == "postgresql":
        kind = "" if exclusive else "_shared"
        connection.execute(text(f"SELECT pg_advisory_xact_lock{kind}(:key)"), {"key": _REGISTER_LOCK})


def upsert(connection: Connection, table: Table) -> Any:
    """Return the dialect's INSERT, which knows ``ON CONFLICT``."""
    return (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(table)


def insert_missing(connection: Connection, table: Table, rows: Iterable[dict[str, Any]]) -> None:
    """Insert the rows whose key is not there yet."""
    listed = list(rows)
    if listed:
        connection.execute(upsert(connection, table).on_conflict_do_nothing(), listed)


def asked(rows: Sequence[tuple[Any, ...]], **columns: type[TypeEngine[Any]]) -> CTE:
    """Return values as a table to join from.

    A join keeps SQLite on the index of what is joined, where a row-wise IN list makes it scan the table.

    Args:
        rows: At most ``CHUNK``.
        **columns: Name and type of each column.

    Returns:
        A table expression named ``asked``.
    """
    named = [column(name, kind) for name, kind in columns.items()]
    return values(*named, name="asked").data(list(rows)).cte("asked")


@contextmanager
def translated() -> Iterator[None]:
    """Turn database errors into ours, without their statements' parameters."""
    try:
        yield
    except exc.SQLAlchemyError as error:
        if _may_pass(error):
            cause = error.orig if isinstance(error, exc.DBAPIError) else error
            raise TransientError(f"history store: {cause}") from error
        if not isinstance(error, exc.DBAPIError):
            raise
        kind = StoreRefused if isinstance(error, exc.DataError | exc.IntegrityError) else FatalError
        raise kind(f"history store: {_said(error)}") from None  # a server's details quote keys


def _said(error: exc.DBAPIError) -> str:
    primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
    return f"{type(error.orig).__name__}: {primary or str(error.orig).partition(chr(10))[0]}"


def _may_pass(error: exc.SQLAlchemyError) -> bool:
    if isinstance(error, exc.TimeoutError):
        return True
    if not isinstance(error, exc.DBAPIError):
        return False
    if error.connection_invalidated or getattr(error.orig, "sqlstate", None) == _READ_ONLY:
        return True
    # SQLite calls bad SQL and missing tables operational errors too
    bad_sql = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
    return isinstance(error, exc.OperationalError) and not bad_sql


def _engine(url: URL, busy_timeout_seconds: float) -> Engine:
    common: dict[str, Any] = {"hide_parameters": True, "pool_timeout": busy_timeout_seconds}
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": busy_timeout_seconds}, **common)
        event.listen(engine, "connect", partial(_prepare_sqlite, patience=busy_timeout_seconds))
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    options = (
        f"{url.query.get('options', '')} -c lock_timeout={max(1, round(busy_timeout_seconds * 1000))}"
        f" -c idle_in_transaction_session_timeout={_IDLE_TRANSACTION_SECONDS * 1000}"
    )
    arguments = {
        "connect_timeout": max(2, round(busy_timeout_seconds)),
        "options": options.strip(),
        **{name: value for name, value in _NOTICED_GONE.items() if name not in url.query},
    }
    try:
        return create_engine(url, connect_args=arguments, isolation_level="READ COMMITTED", **common)
    except ModuleNotFoundError as error:
        raise ConfigError("store.url: PostgreSQL needs psycopg: pip install 'oppu[postgres]'") from error


def _prepare_sqlite(connection: sqlite3.Connection, _record: Any, *, patience: float) -> None:
    connection.isolation_level = None  # transactions begin in _begin_sqlite, not behind our back
    _write_ahead(connection, patience)
    for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: sqlite3.Connection, patience: float) -> None:
    """Set the file's journal mode, waiting for others: SQLite's own busy timeout does not hold for this change.

    Two who find a new file at once both read it and both want it alone: SQLite refuses one of them at once.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY  # the low byte of an extended code
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(_BETWEEN_TRIES_SECONDS)


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
