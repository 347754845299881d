"""Schema versions: a store of another version is refused, and migrations make exactly the declared tables."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from oppu.errors import ConfigError, TransientError
from oppu.settings import StoreSettings
from oppu.store.database import Database
from oppu.store.migrations import _config, expected_version, migrate, schema_version
from oppu.store.schema import metadata
from oppu.values import Head
from tests.oppu.store.conftest import Opener
from tests.oppu.store.support import ADA, BASE, Writer, publish, some


def test_an_empty_store_is_refused_then_migrated(empty: StoreSettings, opener: Opener) -> None:
    store = opener(empty)
    with pytest.raises(ConfigError, match="oppu store migrate"):
        store.ping()
    assert store.database.file is None or not store.database.file.exists()
    assert migrate(empty) == expected_version() == schema_version(store.database)
    store.ping()


def test_migrating_again_changes_nothing(settings: StoreSettings, opener: Opener) -> None:
    store = opener(settings)
    Writer(store).write(some("ada", 2))
    assert migrate(settings) == expected_version()
    assert store.counts()["events"] == 2


def test_a_store_of_the_version_before_is_brought_up_with_all_it_holds(settings: StoreSettings, opener: Opener) -> None:
    store = opener(settings)
    store.register_base(BASE)
    Writer(store).write(some("ada", 3))
    assert publish(store, ADA) == 1
    with store.database.write() as connection:
        command.downgrade(_config(connection), "0001")
    with pytest.raises(ConfigError, match="found 0001: run `oppu store migrate`"):
        opener(settings).ping()
    assert migrate(settings) == expected_version()
    assert store.users([ADA], BASE)[ADA].head == Head(1, None, 3, 1, earned=0.0)


@pytest.mark.parametrize("version", ["0000", "9999"])
def test_another_version_is_refused(settings: StoreSettings, opener: Opener, version: str) -> None:
    store = opener(settings)
    store.ping()
    with store.database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :v"), {"v": version})
    with pytest.raises(ConfigError, match=f"found {version}: run `oppu store migrate`"):
        store.ping()
    with pytest.raises(ConfigError, match="newer version"):
        migrate(settings)


def test_migrations_make_the_declared_tables(settings: StoreSettings, opener: Opener) -> None:
    with opener(settings).database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        found = inspect(connection)
        for table in metadata.sorted_tables:  # what the comparison leaves out
            assert found.get_pk_constraint(table.name)["constrained_columns"] == list(table.primary_key.columns.keys())
            cascades = {key.get("options", {}).get("ondelete") for key in found.get_foreign_keys(table.name)}
            assert cascades == {constraint.ondelete for constraint in table.foreign_key_constraints}
            declared = {index.name for index in table.indexes}
            assert declared <= {index["name"] for index in found.get_indexes(table.name)}


def test_several_at_once_migrate_once(empty: StoreSettings) -> None:
    patient = empty.model_copy(update={"busy_timeout_seconds": 20.0})
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(migrate, [patient] * 3)) == {expected_version()}


def test_several_at_once_meet_a_new_file(tmp_path: Path) -> None:
    """All want the journal's mode changed: SQLite refuses such a one without waiting, about one time in twenty."""

    def first_write(database: Database) -> None:
        together.wait()
        with database.write():
            pass

    for attempt in range(40):
        url = f"sqlite:///{tmp_path}/{attempt}.db"
        databases = [Database(StoreSettings(url=url, busy_timeout_seconds=20.0)) for _ in range(8)]
        together = Barrier(len(databases))
        with ThreadPoolExecutor(len(databases)) as pool:
            list(pool.map(first_write, databases))
        for database in databases:
            database.close()


def test_a_new_file_that_stays_locked(tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / "history.db", isolation_level=None)
    holder.execute("CREATE TABLE theirs (x INTEGER)")
    holder.execute("BEGIN EXCLUSIVE")
    database = Database(StoreSettings(url=f"sqlite:///{tmp_path}/history.db", busy_timeout_seconds=0.1))
    with pytest.raises(TransientError, match="locked"), database.write():
        pass
    holder.execute("COMMIT")
    with database.write() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
    database.close()
    holder.close()


def test_a_failed_migration_leaves_nothing(empty: StoreSettings, opener: Opener) -> None:
    store = opener(empty)
    if store.database.file is not None:
        store.database.file.parent.mkdir()
    with store.database.write() as connection:
        connection.execute(text("CREATE TABLE lifts (x INTEGER)"))  # the migration stumbles over it half-way
    with pytest.raises(Exception, match="already exists"):
        migrate(empty)
    with store.database.read() as connection:
        assert inspect(connection).get_table_names() == ["lifts"]
    assert schema_version(store.database) is None


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        migrate(StoreSettings(url=f"sqlite:///{tmp_path}/file/history.db"))
    with pytest.raises((ConfigError, TransientError)):
        migrate(StoreSettings(url=f"sqlite:///{tmp_path}/file/deeper/history.db"))


def test_a_percent_sign_in_the_path(tmp_path: Path) -> None:
    settings = StoreSettings(url=f"sqlite:///{tmp_path}/a %25 b/history.db")
    assert migrate(settings) == expected_version()
    database = Database(settings)
    assert database.file is not None and database.file.exists()
    database.close()
