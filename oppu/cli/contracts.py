"""``oppu contracts``: generate the JSON Schemas, the AsyncAPI page and the settings table, or check them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from oppu.errors import ConfigError
from oppu.settings import Settings
from oppu.wire import CONTRACTS, SCHEMA_VERSION

_KEYED = "Key: the user_id's UTF-8 bytes."


@click.group()
def contracts() -> None:
    """Generate what documents the wire and the settings."""


@contracts.command()
@click.argument("folder", type=click.Path(path_type=Path))
def write(folder: Path) -> None:
    """Write all files into FOLDER."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in generate().items():
            (folder / name).write_text(text, encoding="utf-8")
            click.echo(f"wrote {folder / name}")
    except OSError as error:
        raise ConfigError(f"FOLDER: cannot write {error.filename or folder}: {error.strerror}") from error


@contracts.command()
@click.argument("folder", type=click.Path(path_type=Path))
def check(folder: Path) -> None:
    """Check that FOLDER holds what the code says."""
    stale = [name for name, text in generate().items() if _read(folder / name) != text]
    if stale:
        raise ConfigError(*(f"{folder / name}: not what the code says; run oppu contracts write" for name in stale))
    click.echo("all current")


def generate() -> dict[str, str]:
    """Return every generated file's text by name."""
    files = {f"{topic}.schema.json": _schema(topic, contract) for topic, contract in CONTRACTS.items()}
    files["asyncapi.json"] = _json(_asyncapi())
    files["settings.md"] = "\n".join(_settings_table()) + "\n"
    return files


def _schema(topic: str, contract: type[BaseModel]) -> str:
    schema = contract.model_json_schema()
    return _json({"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"oppu:{topic}:1", **schema})


def _asyncapi() -> dict[str, Any]:
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "oppu",
            "version": f"{SCHEMA_VERSION}.0.0",
            "description": f"Topic names carry a prefix, 'oppu.' by default. {_KEYED} Read with read_committed.",
        },
        "defaultContentType": "application/json",
        "channels": {topic: _channel(topic, contract) for topic, contract in CONTRACTS.items()}
        | {"dead-letters": _dead_letters()},
        "operations": {
            f"{action}-{topic}": {"action": action, "channel": {"$ref": f"#/channels/{topic}"}}
            for topic, action in (
                ("behavior-events", "receive"),
                ("prediction-requests", "receive"),
                ("predictions", "send"),
                ("adapter-updates", "send"),
                ("dead-letters", "send"),
            )
        },
    }


def _channel(topic: str, contract: type[BaseModel]) -> dict[str, Any]:
    payload = {"schemaFormat": "application/schema+json;version=draft-2020-12"}
    return {
        "address": topic,
        "description": f"{(contract.__doc__ or '').strip().splitlines()[0]} {_KEYED}",
        "messages": {
            contract.__name__: {"payload": {**payload, "schema": {"$ref": f"./{topic}.schema.json"}}},
        },
    }


def _dead_letters() -> dict[str, Any]:
    headers = ("origin-topic", "origin-partition", "origin-offset", "origin-timestamp", "reason", "message")
    properties = {name: {"type": "string"} for name in (*headers, "truncated", "length", "sha256", "headers-dropped")}
    return {
        "address": "dead-letters",
        "description": "A refused record: key and value are the original bytes, or their beginning (truncated); the "
        "headers say whence and why, the original's own come as original.NAME, or not at all (headers-dropped).",
        "messages": {
            "DeadLetter": {
                "contentType": "application/octet-stream",
                "headers": {"type": "object", "properties": properties, "required": list(headers)},
            }
        },
    }


def _settings_table() -> Iterator[str]:
    yield "| variable | default | meaning |"
    yield "|---|---|---|"
    for section, field in Settings.model_fields.items():
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            continue
        defaults = field.default.model_dump(mode="json")
        for name, setting in kind.model_fields.items():
            default = "" if defaults[name] is None else f"`{defaults[name]}`"
            text = (setting.description or "").replace("|", "\\|")
            yield f"| `OPPU_{section.upper()}__{name.upper()}` | {default} | {text} |"


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
