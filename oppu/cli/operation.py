"""The operator's commands: topics, store, erase, doctor, shell completion."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import click

from oppu.cli import Session, compose, emit, json_option
from oppu.errors import ConfigError, OppuError, TransientError
from oppu.kafka.port import Admin, TopicSpec
from oppu.kafka.topics import topic_specs
from oppu.settings import Settings
from oppu.values import OutRecord, Partition, UserId

CREATE_SECONDS = 30.0
_KAFKA_CONFIG = {
    "cleanup.policy": "delete",
    "compression.type": "producer",
    "max.message.bytes": "1048588",
    "min.insync.replicas": "1",
}
"""Kafka's own values, where neither topic nor broker says otherwise."""
_EXACT, _LEAST = ("cleanup.policy", "compression.type"), ("max.message.bytes", "min.insync.replicas")


@click.group()
def topics() -> None:
    """Look after the topics."""


@topics.command("create")
@json_option
@click.pass_obj
def create(session: Session, *, as_json: bool) -> None:
    """Create the missing topics, with their size limits and retention."""
    made = create_topics(session.settings)
    emit({"created": made}, as_json=as_json, text="\n".join(f"created {name}" for name in made) or "all there")


@topics.command("list")
@json_option
@click.pass_obj
def list_(session: Session, *, as_json: bool) -> None:
    """List the topics as the cluster has them."""
    with _admin(session.settings) as admin:
        found = admin.describe_topics([spec.name for spec in topic_specs(session.settings)])
    for spec in topic_specs(session.settings):
        there = found.get(spec.name)
        text = f"{there.partitions} partitions, replication {there.replication}" if there else "missing"
        emit(
            {"topic": spec.name, "exists": there is not None, "partitions": there.partitions if there else 0},
            as_json=as_json,
            text=f"{spec.name}: {text}",
        )


@topics.command("adopt")
@click.argument("topic")
@click.argument("partition", type=click.IntRange(min=0))
@click.option("--offset", type=click.IntRange(min=0), required=True, help="Where ingest goes on.")
@click.pass_obj
def adopt(session: Session, topic: str, partition: int, offset: int) -> None:
    """Tell ingest where to go on in a topic that was recreated or restored. Stop the ingest workers first."""
    allowed = [compose.topics(session.settings).events, compose.topics(session.settings).predictions]
    if topic not in allowed:
        raise ConfigError(f"TOPIC: expected one of {', '.join(allowed)}, got {topic}")
    count = partition_count(session.settings, topic)
    if partition >= count:
        raise ConfigError(f"PARTITION: {topic} has {count} partitions, from 0; got {partition}")
    with _admin(session.settings) as admin:
        cluster, ids = admin.cluster_id(), admin.topic_ids([topic])
    compose.store(session.settings).adopt_offset(cluster, Partition(topic, partition), offset, ids.get(topic))
    click.echo(f"{topic}-{partition}: ingest goes on at {offset}")


@click.group()
def store() -> None:
    """Look after the history store."""


@store.command()
@click.pass_obj
def migrate(session: Session) -> None:
    """Bring the store's schema to this version; repeating it does nothing."""
    from oppu.store.sql import migrate as run

    click.echo(f"schema version {run(session.settings.store)}")


@store.command()
@json_option
@click.pass_obj
def info(session: Session, *, as_json: bool) -> None:
    """Print how much the store holds."""
    counts = compose.store(session.settings).counts()
    emit(counts, as_json=as_json, text="\n".join(f"{name}: {value}" for name, value in counts.items()))


@click.command()
@click.argument("user_id")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def erase(session: Session, user_id: str, *, yes: bool) -> None:
    """Delete a user's events, answers, adapters and files; records sent before now are refused from now on."""
    settings = session.settings
    history = compose.store(settings)
    if not yes and not _agreed(f"Delete everything about {user_id}?"):
        raise OppuError("not erased (use --yes)")
    names = compose.topics(settings)
    with _admin(settings) as admin:
        cluster = admin.cluster_id()
        ends = admin.high_watermarks(_partitions(admin, [names.events, names.requests, names.predictions]))
    tombstone = OutRecord(names.updates, user_id.encode(), None)
    bases = history.bases()
    if history.counts()["adapters"]:
        compose.registry(settings, bases[0]).check()  # else rows would go, and files stay where nobody looks
    known = history.erase(
        UserId(user_id), cluster_id=cluster, end_offsets=ends, now=datetime.now(UTC), announce=tombstone
    )
    for base in bases:
        compose.registry(settings, base).delete_user(UserId(user_id))
    if not known:
        raise ConfigError(f"USER_ID: no such user: {user_id} (files under that name, if any, were deleted)")
    click.echo("erased")


def _agreed(question: str) -> bool:
    try:
        return click.confirm(question)
    except click.Abort:  # nobody is there to ask, or went away
        click.echo()
        return False


@click.command()
@json_option
@click.pass_obj
def doctor(session: Session, *, as_json: bool) -> None:
    """Check everything a worker needs; exit 1 where something is wrong."""
    settings = session.settings
    checks: dict[str, Callable[[], str]] = {
        "settings": lambda: "read" + (f" from {session.config}" if session.config else ""),
        "tasks": lambda: f"{len(compose.tasks(settings))} tasks",
        "broker": lambda: f"cluster {compose.cluster_id(settings)}",
        "topics": lambda: _check_topics(settings),
        "store": lambda: ", ".join(f"{n} {name}" for name, n in compose.store(settings).counts().items()),
        "registry": lambda: _check_registry(settings),
        "state folder": lambda: str(compose.state_dir(settings)),
        "embedder": lambda: compose.embedder(settings).fingerprint,
        "query encoder": lambda: _check_query_encoder(settings),
        "model": lambda: f"base {compose.model(settings, slots=1).base}",
        "fusion": lambda: _check_fusion(settings),
    }
    well = True
    for name, check in checks.items():
        try:
            found, ok = check(), True
        except OppuError as error:
            found, ok = str(error), False
        well = well and ok
        emit(
            {"check": name, "ok": ok, "found": found}, as_json=as_json, text=f"{'ok ' if ok else 'BAD'} {name}: {found}"
        )
    if not well:
        raise click.exceptions.Exit(1)


def _check_query_encoder(settings: Settings) -> str:
    if not settings.model.query_encoder:
        return "the embedder"
    return f"{compose.query_encoder(settings).own_fingerprint}, for the embedder's"


def _check_registry(settings: Settings) -> str:
    """Say whether the registry is there; while nobody has an adapter it may be new."""
    adapters = compose.store(settings).counts()["adapters"]
    try:
        compose.registry(settings, "doctor").check()
    except TransientError:
        if adapters:
            raise
        return f"{settings.registry.url}: new, the first updater makes it"
    return f"{settings.registry.url}: there, {adapters} adapters"


def _check_fusion(settings: Settings) -> str:
    """Read what weighs base, evidence and adapter, as the workers will."""
    compose.fusion(settings)
    compose.text_fusion(settings)
    named = {"model.fusion": settings.model.fusion, "model.text_fusion": settings.model.text_fusion}
    return ", ".join(f"{name}: {file or 'beside the base, or built in'}" for name, file in named.items())


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script: eval "$(oppu completion bash)"."""
    from click.shell_completion import get_completion_class

    from oppu.cli import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise ConfigError(f"SHELL: no completion for {shell}")
    click.echo(kind(cli, {}, "oppu", "_OPPU_COMPLETE").source())


def create_topics(settings: Settings) -> list[str]:
    """Create the missing topics and wait until the cluster shows all of them.

    Args:
        settings: The settings.

    Returns:
        The names of those created.

    Raises:
        TransientError: They did not appear in time.
    """
    specs = topic_specs(settings)
    names = [spec.name for spec in specs]
    with _admin(settings) as admin:
        made = admin.create_topics(specs)
        deadline = time.monotonic() + CREATE_SECONDS
        while len(admin.describe_topics(names)) < len(names):
            if time.monotonic() > deadline:
                raise TransientError(f"topics did not appear within {CREATE_SECONDS:g} s")
            time.sleep(0.1)
    return made


def partition_count(settings: Settings, topic: str) -> int:
    """Return how many partitions a topic has.

    Args:
        settings: The settings.
        topic: Its full name.

    Returns:
        The number of its partitions.

    Raises:
        ConfigError: It does not exist; names the command.
        TransientError: The cluster cannot be reached.
    """
    with _admin(settings) as admin:
        return len(_partitions(admin, [topic]))


def _partitions(admin: Admin, topics: list[str]) -> list[Partition]:
    """Return all partitions of some topics, which have to exist."""
    found = admin.describe_topics(topics)
    for topic in topics:
        if topic not in found:
            raise ConfigError(f"kafka.topic_prefix: there is no topic {topic}: run `oppu topics create`")
    return [Partition(topic, index) for topic in topics for index in range(found[topic].partitions)]


def _check_topics(settings: Settings) -> str:
    specs = {spec.name: spec for spec in topic_specs(settings)}
    with _admin(settings) as admin:
        found = admin.describe_topics(list(specs))
    problems = [f"{name} is missing (oppu topics create)" for name in specs if name not in found]
    problems += [problem for name, spec in specs.items() if name in found for problem in _weaker(spec, found[name])]
    if problems:
        raise ConfigError(*problems)
    return f"{len(found)} topics"


def _weaker(wanted: TopicSpec, found: TopicSpec) -> list[str]:
    """Say where a topic promises less than ours do; its partitions and how long it keeps records are its owner's."""
    has, needs = ({**_KAFKA_CONFIG, **spec.config} for spec in (found, wanted))
    problems = [f"{name} {has[name]}, expected {needs[name]}" for name in _EXACT if has[name] != needs[name]]
    problems += [
        f"{name} {has[name]}, expected {needs[name]} at least" for name in _LEAST if int(has[name]) < int(needs[name])
    ]
    if found.replication < wanted.replication:
        problems.append(f"replication {found.replication}, expected {wanted.replication} at least")
    return [f"{wanted.name}: {problem}" for problem in problems]


@contextmanager
def _admin(settings: Settings) -> Iterator[Admin]:
    opened = compose.broker(settings).admin()
    try:
        yield opened
    finally:
        opened.close()
