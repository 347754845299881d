"""``oppu adapters``: list, show, roll back, release and export; none of it loads torch."""

from datetime import UTC, datetime
from pathlib import Path

import click

from oppu.cli import Session, compose, emit, json_option
from oppu.cli.inspection import known_user
from oppu.errors import AdapterUnreadable, ConfigError
from oppu.lm.port import AdapterRef
from oppu.store.port import HistoryStore
from oppu.store.records import AdapterStatus
from oppu.values import BaseId, Head, UserId

base_option = click.option("--base", "base_name", help="Fingerprint of the base; needed where there are several.")


@click.group()
def adapters() -> None:
    """Look after users' adapters."""


@adapters.command("list")
@base_option
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True)
@click.option("--after", help="List users after this id.")
@json_option
@click.pass_obj
def list_(session: Session, base_name: str | None, limit: int, after: str | None, *, as_json: bool) -> None:
    """List users with an adapter or an attempt at one."""
    store = compose.store(session.settings)
    for status in store.adapters(_base(store, base_name), limit=limit, after=UserId(after) if after else None):
        emit(_status(status), as_json=as_json, text=_line(status))


@adapters.command()
@click.argument("user_id")
@base_option
@click.option("--limit", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Log entries.")
@json_option
@click.pass_obj
def show(session: Session, user_id: str, base_name: str | None, limit: int, *, as_json: bool) -> None:
    """Show a user's versions and the newest entries of the audit trail."""
    store = compose.store(session.settings)
    state, base = known_user(store, user_id), _base(store, base_name)
    status = store.adapter(base, state.user_id)
    if status is not None:
        emit(_status(status), as_json=as_json, text=_line(status))
    for version in store.versions(base, state.user_id):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in sorted(version.metrics.items()))
        emit(
            {"version": version.version, "parent": version.parent, "trained_through": version.trained_through,
             "metrics": dict(version.metrics)},
            as_json=as_json,
            text=f"  version {version.version} from {version.parent}, through {version.trained_through}: {figures}",
        )  # fmt: skip
    for entry in store.adapter_log(base, state.user_id, limit=limit):
        emit(
            {"at": entry.at, "outcome": entry.outcome, "version": entry.version, "reason": entry.reason},
            as_json=as_json,
            text=f"  {entry.at:%Y-%m-%d %H:%M:%S}  {entry.outcome}  version {entry.version}  {entry.reason}",
        )


@adapters.command()
@click.argument("user_id")
@base_option
@click.option("--to", type=click.IntRange(min=1), help="The version to serve; by default the head's parent.")
@click.option("--none", "to_none", is_flag=True, help="Serve no adapter.")
@click.option("--reason", default="by an operator", show_default=True)
@json_option
@click.pass_obj
def rollback(
    session: Session, user_id: str, base_name: str | None, to: int | None, reason: str, *, to_none: bool, as_json: bool
) -> None:
    """Serve an earlier version, from the next request on; training is held until there is new evidence."""
    from updater import operations

    store = compose.store(session.settings)
    state, base = known_user(store, user_id), _base(store, base_name)
    status = store.adapter(base, state.user_id)
    before = status.head if status else None
    if to is not None and to_none:
        raise ConfigError("--to and --none: give one of them")
    if before is None and to is None and not to_none:  # --to brings back what a former rollback took away
        raise ConfigError(f"USER_ID: {user_id} has no adapter on base {base}; --to VERSION serves an earlier one")
    target = to if to is not None or to_none or before is None else before.parent
    if target is not None:
        registry = compose.registry(session.settings, base)
        operations.check_readable(registry, AdapterRef(state.user_id, state.epoch, target))
    head = operations.roll_back(
        store, base, state.user_id, to=target, reason=reason, now=datetime.now(UTC),
        topics=compose.topics(session.settings),
    )  # fmt: skip
    text = f"serving {_served(head)}, after {_served(before)}"
    emit({"version": head.version if head else None}, as_json=as_json, text=text)


@adapters.command()
@click.argument("user_id")
@base_option
@click.pass_obj
def release(session: Session, user_id: str, base_name: str | None) -> None:
    """Let a held, backing-off or quarantined user be trained again."""
    from updater import operations

    store = compose.store(session.settings)
    state, base = known_user(store, user_id), _base(store, base_name)
    operations.release(store, base, state.user_id, now=datetime.now(UTC))
    click.echo("released")


@adapters.command()
@click.argument("user_id")
@click.argument("folder", type=click.Path(path_type=Path))
@base_option
@click.option("--version", type=click.IntRange(min=1), help="By default the head.")
@click.pass_obj
def export(session: Session, user_id: str, folder: Path, base_name: str | None, version: int | None) -> None:
    """Copy a version into FOLDER, in PEFT's format: PeftModel.from_pretrained loads it."""
    store = compose.store(session.settings)
    state, base = known_user(store, user_id), _base(store, base_name)
    status = store.adapter(base, state.user_id)
    chosen = version if version is not None else (status.head.version if status and status.head else None)
    if chosen is None:
        raise ConfigError(f"USER_ID: {user_id} has no adapter on base {base}")
    try:
        compose.registry(session.settings, base).export(AdapterRef(state.user_id, state.epoch, chosen), folder)
    except AdapterUnreadable as error:
        raise ConfigError(f"--version: version {chosen} cannot be read: {error}") from error
    click.echo(f"version {chosen} written to {folder}")


def _base(store: HistoryStore, name: str | None) -> BaseId:
    known = store.bases()
    if name is not None:
        if name not in known:
            raise ConfigError(f"--base: expected one of {', '.join(known) or '(none yet)'}, got {name}")
        return BaseId(name)
    if len(known) != 1:
        raise ConfigError(f"--base: the store knows {len(known)} bases: {', '.join(known) or 'run an updater first'}")
    return known[0]


def _status(status: AdapterStatus) -> dict[str, object]:
    head = status.head
    return {
        "user_id": status.user_id,
        "version": head.version if head else None,
        "parent": head.parent if head else None,
        "trained_through": head.trained_through if head else 0,
        "earned": head.earned if head else 0.0,
        "considered_through": status.considered_through,
        "events": status.last_seq,
        "state": status.state,
        "failures": status.failures,
        "retry_at": status.retry_at,
    }


def _served(head: Head | None) -> str:
    return f"version {head.version}" if head else "no adapter"


def _line(status: AdapterStatus) -> str:
    pending = status.last_seq - status.considered_through
    return f"{status.user_id}  {_served(status.head)}, {status.last_seq} events, {pending} pending, {status.state}"
