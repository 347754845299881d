"""The settings of a stack: what ties its commands and workers to its own folder, broker and store.

Invariant: nothing of that can be said otherwise, neither by the session's settings file nor by the environment.
"""

import json
import logging
import os
import secrets
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from oppu.cli import Session

logger = logging.getLogger(__name__)

_Sections = Mapping[str, Mapping[str, object]]
"""Values of settings by section and name; ``None``: the default."""
_CREDENTIALS = ("sasl_mechanism", "sasl_username", "sasl_password", "ssl_cafile", "ssl_certfile", "ssl_keyfile")
"""For another cluster; the embedded broker asks for none."""


def _fixed(folder: Path, bootstrap_servers: str, deployment_key: str, overrides: str) -> _Sections:
    """Return what nobody may set otherwise: what ties workers to this folder's broker and store, and the overrides."""
    ours: _Sections = {
        "kafka": {
            **dict.fromkeys(_CREDENTIALS),
            "bootstrap_servers": bootstrap_servers,
            "security_protocol": "PLAINTEXT",
            "replication": 1,
            "min_insync_replicas": 1,
        },
        "store": {"url": f"sqlite:///{folder / 'history.db'}"},
        "registry": {"url": str(folder / "adapters")},
        "service": {"state_dir": str(folder / "state"), "deployment_key": deployment_key},
    }
    return _merged(ours, tomllib.loads(overrides))


def write_config(session: Session, folder: Path, bootstrap_servers: str, overrides: str = "") -> Path:
    """Write the settings file that ties commands and workers to this folder's broker and store.

    Args:
        session: Its settings file, if any, gives what is not fixed.
        folder: The stack's, where the file is written.
        bootstrap_servers: Its broker's address.
        overrides: TOML text, as fixed as the broker is.

    Returns:
        The file.
    """
    fixed = _fixed(folder, bootstrap_servers, _deployment_key(folder), overrides)
    base = tomllib.loads(session.config.read_text(encoding="utf-8")) if session.config else {}
    path = folder / "oppu.toml"
    path.touch(mode=0o600)  # it holds the deployment key
    path.write_text("".join(_section(name, values) for name, values in _merged(base, fixed).items()), encoding="utf-8")
    return path


def _merged(base: _Sections, over: _Sections) -> _Sections:
    return {name: {**base.get(name, {}), **over.get(name, {})} for name in sorted({*base, *over})}


@contextmanager
def apart(overrides: str = "", *, tell: bool = True) -> Iterator[None]:
    """Hide what the environment says of fixed settings: it would win over the file, and tie us to another cluster.

    Args:
        overrides: As for :func:`write_config`.
        tell: Whether to warn of each variable.

    Yields:
        With the environment as the stack's settings and workers are to see it.
    """
    fixed = _fixed(Path(), "", "", overrides)
    before = {name: value for name, value in os.environ.items() if _without(name, value, fixed) != value}
    for name, value in sorted(before.items()):
        if tell:
            logger.warning("%s: a stack decides this by its own file; unset it where you run its other commands", name)
        rest = _without(name, value, fixed)
        if rest is None:
            del os.environ[name]
        else:
            os.environ[name] = rest
    try:
        yield
    finally:
        os.environ.update(before)


def _without(variable: str, value: str, fixed: _Sections) -> str | None:
    """Return what is left of a variable's value; ``None`` where, in any case of letters, it names a fixed setting."""
    prefix, _, rest = variable.lower().partition("_")
    section, *fields = rest.split("__")
    if prefix != "oppu" or section not in fixed:
        return value
    if fields:
        return None if fields[0] in fixed[section] else value
    try:
        given = json.loads(value)
    except ValueError:
        return value  # for whoever loads it to refuse
    if not isinstance(given, dict):
        return value
    left = {name: own for name, own in given.items() if name.lower() not in fixed[section]}
    return value if len(left) == len(given) else json.dumps(left)


def _deployment_key(folder: Path) -> str:
    """Return this folder's key, made on the first start: paths and erasures depend on it."""
    path = folder / "deployment.key"
    if not path.exists():
        part = path.with_suffix(".part")  # a kill between the two must not leave an empty key for ever
        part.touch(mode=0o600)
        part.write_text(secrets.token_hex(32), encoding="utf-8")
        part.replace(path)
    return path.read_text(encoding="utf-8").strip()


def _section(name: str, values: Mapping[str, object]) -> str:
    # TOML writes a string, number, boolean or array of them as JSON does, but knows no surrogate pairs and no null
    given = {key: value for key, value in values.items() if value is not None}
    lines = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in given.items())
    return f"[{name}]\n{lines}\n"
