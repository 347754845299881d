"""Schema versions of the history store: read them, bring a store to the newest.

One migration runs in one transaction under an exclusive lock, so two at once do the work once. Workers never
migrate by themselves; they refuse a store of another version and name the command.
"""

import logging
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text

from oppu.errors import ConfigError, TransientError
from oppu.settings import StoreSettings
from oppu.store.database import Database

logger = logging.getLogger(__name__)

_MIGRATION_LOCK = 0x6F707076  # next to the store's own advisory lock


def migrate(settings: StoreSettings) -> str:
    """Bring a store to the newest schema, creating it where there is none.

    Args:
        settings: Where it lies.

    Returns:
        The revision it now has.

    Raises:
        ConfigError: The store was written by a newer version of this program, or its folder cannot be made.
        TransientError: The database cannot be reached or is locked.
    """
    database = Database(settings)
    try:
        _make_folder(database)
        with database.write() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            command.upgrade(_config(connection), "head")
    except CommandError as error:
        raise ConfigError(f"store.url: its schema is of a newer version of oppu ({error})") from error
    finally:
        database.close()
    logger.info("history store has schema %s", expected_version())
    return expected_version()


def schema_version(database: Database) -> str | None:
    """Read which revision a store has.

    Args:
        database: The store's.

    Returns:
        The revision; ``None`` for an empty or missing store.

    Raises:
        TransientError: The database cannot be reached or is locked.
    """
    if database.file is not None and not database.file.exists():
        return None  # connecting would create an empty file
    with database.read() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def check_version(database: Database) -> None:
    """Check that a store can be read and has the schema of this program.

    Args:
        database: The store's.

    Raises:
        ConfigError: It has another, or none; names the command.
        TransientError: The database cannot be reached or is locked.
    """
    found = schema_version(database)
    if found != expected_version():
        raise ConfigError(
            f"store.url: expected schema {expected_version()}, found {found or 'none'}: run `oppu store migrate`"
        )


@cache
def expected_version() -> str:
    """Return the newest revision this program knows."""
    head = ScriptDirectory.from_config(_config(None)).get_current_head()
    if head is None:
        raise RuntimeError("no migrations are installed")
    return head


def _config(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def _make_folder(database: Database) -> None:
    if database.file is None:
        return
    try:
        database.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # the file holds users' text
    except FileExistsError as error:
        raise ConfigError(f"store.url: {database.file.parent} is not a folder") from error
    except OSError as error:
        raise TransientError(f"history store: {error}") from error
