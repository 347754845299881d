"""What the store makes of a database that is locked, full, gone, or not what it expects."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import event, insert, text

from oppu.errors import ConfigError, FatalError, StoreRefused, TransientError
from oppu.settings import StoreSettings
from oppu.store.database import Database, parse_url
from oppu.store.schema import answers
from oppu.store.sql import SqlStore, open_store
from oppu.values import OutRecord
from tests.oppu.store.conftest import Opener
from tests.oppu.store.support import ADA, BASE, EMBEDDER, NOW, Writer, new_event, some


def file_of(settings: StoreSettings) -> Path:
    """The SQLite file."""
    file = Database(settings).file
    assert file is not None
    return file


def test_a_locked_file_is_transient(migrated_sqlite: StoreSettings, opener: Opener) -> None:
    writer = Writer(opener(migrated_sqlite))
    writer.write(some("ada", 1))
    other = sqlite3.connect(file_of(migrated_sqlite), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(TransientError, match="locked"):
        writer.write(some("ada", 1, start=2))
    assert writer.store.counts()["events"] == 1
    other.execute("ROLLBACK")
    other.close()
    assert writer.write(some("ada", 1, start=2)).written == 1


def test_a_full_disk_is_transient_and_loses_nothing(migrated_sqlite: StoreSettings, opener: Opener) -> None:
    store = opener(migrated_sqlite)
    writer = Writer(store)
    writer.write(some("ada", 2))
    with store.database.read() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

    def limit(to: int) -> None:
        with store.database.read() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count={to}")

    limit(pages)
    with pytest.raises(TransientError, match="full"):
        writer.write([new_event("ada", f"big-{n}", text="x" * 5000) for n in range(50)])
    assert store.counts()["events"] == 2 and len(store.events({ADA: 0}, embedder=EMBEDDER, limit=9)[ADA]) == 2
    limit(1_000_000)
    assert writer.write(some("ada", 1, start=3)).written == 1


def test_a_folder_that_is_gone_is_transient(migrated_sqlite: StoreSettings, opener: Opener) -> None:
    store = opener(migrated_sqlite)
    file_of(migrated_sqlite).parent.rename(file_of(migrated_sqlite).parent.with_name("elsewhere"))
    with pytest.raises(TransientError):
        store.counts()


@pytest.mark.postgres
def test_an_unreachable_server_is_transient(tmp_path: Path, opener: Opener) -> None:
    settings = StoreSettings(url=f"postgresql://oppu:secret@/x?host={tmp_path}", busy_timeout_seconds=0.3)
    store = opener(settings)
    for call in (store.ping, store.counts, lambda: store.outbox(1)):
        with pytest.raises(TransientError) as caught:
            call()
        assert "secret" not in str(caught.value)


@pytest.mark.postgres
def test_a_dropped_connection_is_transient_and_replaced(migrated_postgres: StoreSettings, opener: Opener) -> None:
    store, other = opener(migrated_postgres), opener(migrated_postgres)
    writer = Writer(store)
    writer.write(some("ada", 1))
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
    with other.database.read() as connection:
        connection.execute(text(f"{kill} AND pid <> pg_backend_pid()"))
    with pytest.raises(TransientError):
        writer.write(some("ada", 1, start=2))
    assert writer.write(some("ada", 1, start=2)).written == 1


@pytest.mark.postgres
def test_a_read_only_server_is_transient(migrated_postgres: StoreSettings, opener: Opener) -> None:
    with opener(migrated_postgres).database.write() as connection:
        connection.execute(text("SELECT 1"))
        name = connection.engine.url.database
        connection.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    with pytest.raises(TransientError):
        Writer(opener(migrated_postgres)).write(some("ada", 1))


def test_faults_of_ours_are_not_called_transient(store: SqlStore) -> None:
    with pytest.raises(FatalError, match="no_such_table"), store.database.read() as connection:
        connection.execute(text("SELECT * FROM no_such_table"))
    with pytest.raises(StoreRefused), store.database.write() as connection:
        connection.execute(text("INSERT INTO bases (base, number) SELECT base, number FROM bases"))


def test_what_the_database_refuses_is_not_quoted(store: SqlStore) -> None:
    row = {"user_id": "a secret user", "request_id": "r", "task": "t", "arm": "a", "output": "x", "answered_at": NOW}
    with pytest.raises(StoreRefused) as caught, store.database.write() as connection:
        connection.execute(insert(answers), [row])
    assert "secret" not in str(caught.value) and b"secret".hex() not in str(caught.value)
    assert caught.value.__suppress_context__


def test_an_error_does_not_quote_payloads(migrated_sqlite: StoreSettings, opener: Opener) -> None:
    store = opener(migrated_sqlite)
    with store.database.write() as connection:
        connection.exec_driver_sql("DROP TABLE outbox")
    with pytest.raises(FatalError) as caught:
        Writer(store).write(dead_letters=[OutRecord("t", b"the user", b"the text")])
    assert "the user" not in str(caught.value) and "the text" not in str(caught.value)


def test_an_exhausted_pool_is_transient(migrated_sqlite: StoreSettings, opener: Opener) -> None:
    store = opener(migrated_sqlite)
    held = [store.database.engine.connect() for _ in range(15)]
    with pytest.raises(TransientError):
        store.counts()
    for connection in held:
        connection.close()
    assert store.counts()["users"] == 0


def test_an_error_inside_a_transaction_undoes_it(store: SqlStore) -> None:
    with pytest.raises(KeyError), store.database.write() as connection:
        connection.execute(text("DELETE FROM bases"))
        raise KeyError
    assert store.bases() == [BASE]


def test_few_statements_a_batch(store: SqlStore, writer: Writer) -> None:
    writer.write([new_event(f"u{n % 100}", f"warm{n}") for n in range(500)])
    sent: list[str] = []
    event.listen(store.database.engine, "before_cursor_execute", lambda *args: sent.append(args[2]))
    writer.write([new_event(f"u{n % 100}", f"e{n}") for n in range(500)])
    assert len(sent) <= 12, sent
    sent.clear()
    store.due(BASE, now=NOW, min_pending=1, limit=10)
    store.events({ADA: 0}, embedder=EMBEDDER, limit=10)
    store.users([ADA], BASE)
    assert len([statement for statement in sent if not statement.startswith("BEGIN")]) <= 4, sent


def test_sqlite_is_durable_and_checks_references(migrated_sqlite: StoreSettings, opener: Opener) -> None:
    with opener(migrated_sqlite).database.read() as connection:
        for pragma, expected in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar_one() == expected
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() == 300


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "mysql://h/d", "nonsense", ""])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="store.url"):
        open_store(StoreSettings(url=url), deployment_key="k")


def test_the_driver_is_named() -> None:
    assert parse_url("postgresql://u@h/d").drivername == "postgresql+psycopg"


def test_the_port_is_light() -> None:
    code = "import sys, oppu.store.port; sys.exit(any(m in sys.modules for m in ('sqlalchemy', 'alembic', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
