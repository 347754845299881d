"""Commands that look into the store: a user's events, state and profile. None of them loads torch."""

import click

from oppu.cli import Session, compose, emit, json_option
from oppu.embedder import HashEmbedder
from oppu.errors import ConfigError
from oppu.metrics import fresh
from oppu.store.port import HistoryStore
from oppu.values import BaseId, Event, UserId, UserState


@click.command()
@click.argument("user_id")
@click.option("--limit", type=click.IntRange(1, 100_000), default=20, show_default=True, help="The newest so many.")
@click.option("--task", help="Only this task's.")
@json_option
@click.pass_obj
def history(session: Session, user_id: str, limit: int, task: str | None, *, as_json: bool) -> None:
    """Print a user's events, oldest first; with --json as `oppu produce` reads them."""
    store = compose.store(session.settings)
    state = known_user(store, user_id)
    events = store.events({state.user_id: 0}, embedder="", limit=limit if task is None else 100_000)[state.user_id]
    for event in [e for e in events if task in (None, e.task)][-limit:]:
        emit(_fields(event), as_json=as_json, text=_line(event))


@click.command()
@click.argument("user_id", required=False)
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True)
@click.option("--after", help="List users after this id.")
@json_option
@click.pass_obj
def user(session: Session, user_id: str | None, limit: int, after: str | None, *, as_json: bool) -> None:
    """Print one user's state on every base, or list users."""
    store = compose.store(session.settings)
    if user_id is None:
        for state in store.list_users(limit=limit, after=UserId(after) if after else None):
            emit(
                {"user_id": state.user_id, "events": state.last_seq, "epoch": state.epoch},
                as_json=as_json,
                text=f"{state.user_id}  {state.last_seq} events",
            )
        return
    state = known_user(store, user_id)
    hashed = compose.user_hash(session.settings)(state.user_id)
    fields = {"user_id": user_id, "hash": hashed, "events": state.last_seq, "epoch": state.epoch}
    emit(fields, as_json=as_json, text="\n".join(f"{name}: {value}" for name, value in fields.items()))
    for base in store.bases():
        adapter = store.adapter(base, state.user_id)
        if adapter is not None:
            version = adapter.head.version if adapter.head else None
            emit(
                {
                    "base": base,
                    "version": version,
                    "considered_through": adapter.considered_through,
                    "failures": adapter.failures,
                    "state": adapter.state,
                },
                as_json=as_json,
                text=f"base {base}: version {version}, {adapter.considered_through} considered, {adapter.state}",
            )


@click.command()
@click.argument("user_id")
@click.option("--task", required=True)
@json_option
@click.pass_obj
def profile(session: Session, user_id: str, task: str, *, as_json: bool) -> None:
    """Print a user's profile in a task."""
    tasks = compose.tasks(session.settings)
    if task not in tasks:
        raise ConfigError(f"--task: expected one of {', '.join(sorted(tasks))}, got {task}")
    store = compose.store(session.settings)
    state = known_user(store, user_id)
    # profiles read no vectors, so the smallest embedder will do
    retriever = compose.retriever(session.settings, store, HashEmbedder(), fresh())
    [found] = retriever.profiles([(state, task, None)])
    prior = dict(sorted(found.prior.items(), key=lambda item: -item[1]))
    shown = "\n".join(f"  {weight:8.2f}  {output}" for output, weight in list(prior.items())[:15])
    emit(
        {"version": found.version, "line": found.line, "prior": prior},
        as_json=as_json,
        text=f"{found.version}\n{found.line}\n{shown}",
    )


def known_user(store: HistoryStore, user_id: str) -> UserState:
    """Return a user's state.

    Args:
        store: The history store.
        user_id: The user's id.

    Returns:
        The user's state.

    Raises:
        ConfigError: Nobody of that id is known.
    """
    state = store.users([UserId(user_id)], BaseId("")).get(UserId(user_id))
    if state is None:
        raise ConfigError(f"USER_ID: no such user: {user_id}")
    return state


def _fields(event: Event) -> dict[str, object]:
    names = ("seq", "event_id", "user_id", "task", "occurred_at", "input", "output", "choices", "in_reply_to")
    return {name: getattr(event, name) for name in names}


def _line(event: Event) -> str:
    text = event.input if len(event.input) <= 90 else event.input[:89] + "…"
    return f"{event.seq:6}  {event.occurred_at:%Y-%m-%d}  {event.task}  {text}  →  {event.output}"
