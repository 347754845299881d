"""Logging of a process, set once in ``main``: plain lines for people, or one JSON object a line for machines.

Loggers elsewhere only say what happened; level, format and stream are decided here.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from oppu.settings import ServiceSettings

_PLAIN = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
_CHATTY = (
    "alembic",
    "apscheduler",
    "fsspec",
    "httpx",
    "kafka",
    "matplotlib",
    "sentence_transformers",
    "sqlalchemy",
    "transformers",
    "urllib3",
)
"""Libraries that log every request at INFO, or whole records and parameters at DEBUG."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, always on one line and always ASCII."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line)


def configure_logging(settings: ServiceSettings, stream: TextIO | None = None) -> None:
    """Send this process's logs to one stream; a repeated call replaces what the first one set.

    Args:
        settings: Level and format.
        stream: Where to write; standard error by default, so that standard output stays for results.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else logging.Formatter(_PLAIN))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.log_level)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(capture=True)
