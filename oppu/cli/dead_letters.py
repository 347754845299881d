"""``oppu dead-letters``: list, show, replay refused records. They hold users' text; only ``show`` prints it."""

import heapq
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import click

from oppu.cli import Session, compose, emit, json_option
from oppu.cli.operation import partition_count
from oppu.dead_letters import DeadLetter, read_dead_letter
from oppu.errors import ConfigError, Reason, TransientError
from oppu.settings import Settings
from oppu.values import Partition, Record

IDLE_POLLS = 20
"""Empty polls in a row, 50 ms each, after which the end counts as reached although the offsets say otherwise."""
JOIN_SECONDS = 30.0


def _reason_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--reason", type=click.Choice([reason.value for reason in Reason]), help=text)


@click.group("dead-letters")
def dead_letters() -> None:
    """Look after refused records."""


@dead_letters.command("list")
@_reason_option("Only these.")
@click.option("--limit", type=click.IntRange(1, 1_000_000), default=100, show_default=True, help="The newest so many.")
@json_option
@click.pass_obj
def list_(session: Session, reason: str | None, limit: int, *, as_json: bool) -> None:
    """List dead letters without their content."""
    found = ((r, d) for r, d in _read(session.settings) if reason in (None, d.reason))
    newest = heapq.nlargest(limit, found, key=lambda one: _age(one[0]))  # the topic may hold more than the memory
    for record, letter in reversed(newest):
        emit(_fields(record, letter), as_json=as_json, text=_line(record, letter))


@dead_letters.command()
@click.argument("at")
@click.pass_obj
def show(session: Session, at: str) -> None:
    """Print the original bytes of the dead letter AT (PARTITION:OFFSET)."""
    record, letter = _find(session.settings, at)
    click.echo(_line(record, letter), err=True)
    click.echo(letter.value if letter.value is not None else b"", nl=False)


@dead_letters.command()
@click.argument("at", nargs=-1)
@_reason_option("Replay all of this reason.")
@json_option
@click.pass_obj
def replay(session: Session, at: tuple[str, ...], reason: str | None, *, as_json: bool) -> None:
    """Send the originals to the topics they came from, unchanged, each once however many letters tell of it.

    Events that were stored meanwhile count once.
    """
    if bool(at) == bool(reason):
        raise ConfigError("AT or --reason: give one of them")
    letters = (
        [_find(session.settings, one)[1] for one in at]
        if at
        else [letter for _, letter in _read(session.settings) if letter.reason == reason]
    )
    originals = [letter.replay() for letter in letters if not letter.truncated]
    cut = len(letters) - len(originals)
    # an original that was replayed and refused again has several letters: all of them would double the topic each time
    distinct = list({(one.topic, one.key, one.value): one for one in originals}.values())
    producer = compose.broker(session.settings).producer(client_id="oppu-dead-letters")
    try:
        producer.send(distinct)
    finally:
        producer.close()
    emit(
        {"replayed": len(distinct), "repeated": len(originals) - len(distinct), "truncated": cut},
        as_json=as_json,
        text=f"{len(distinct)} replayed"
        + (f", {len(originals) - len(distinct)} more told of the same" if len(originals) > len(distinct) else "")
        + (f", {cut} were cut and cannot be" if cut else ""),
    )


def _find(settings: Settings, at: str) -> tuple[Record, DeadLetter]:
    partition, _, offset = at.partition(":")
    if not (partition.isdecimal() and offset.isdecimal()):
        raise ConfigError(f"AT: expected PARTITION:OFFSET, got {at}")
    for record, letter in _read(settings):
        if (record.partition.index, record.offset) == (int(partition), int(offset)):
            return record, letter
    raise ConfigError(f"AT: no dead letter at {at} (it may have expired)")


def _read(settings: Settings) -> Iterator[tuple[Record, DeadLetter]]:
    """Read the topic from its beginning to its present end."""
    topic, broker = compose.topics(settings).dead_letters, compose.broker(settings)
    partition_count(settings, topic)  # nobody is ever assigned a topic that is not there

    def start(assigned: frozenset[Partition], committed: Mapping[Partition, int | None]) -> Mapping[Partition, int]:
        return reader.beginning_offsets(assigned)

    name = f"oppu-dead-letters-{datetime.now(UTC).timestamp()}"
    reader = broker.consumer(name, [topic], start, client_id=name)
    try:
        idle, deadline = 0, time.monotonic() + JOIN_SECONDS
        ends: dict[Partition, int] = {}
        reached: dict[Partition, int] = {}
        while idle < IDLE_POLLS and (not ends or any(reached.get(p, 0) < end for p, end in ends.items())):
            records = reader.poll(0.05, 500)
            if reader.assignment() and not ends:
                ends = reader.end_offsets(reader.assignment())
                reached = dict(reader.beginning_offsets(reader.assignment()))
            if not ends and time.monotonic() > deadline:
                raise TransientError(f"no partition of {topic} was assigned in {JOIN_SECONDS:g} s")
            idle = 0 if records or not ends else idle + 1
            for record in records:
                reached[record.partition] = record.offset + 1
                yield record, read_dead_letter(record)
    finally:
        reader.close()


def _age(record: Record) -> tuple[int, Partition, int]:
    return (record.timestamp_ms, record.partition, record.offset)


def _fields(record: Record, letter: DeadLetter) -> dict[str, object]:
    return {
        "at": f"{record.partition.index}:{record.offset}",
        "reason": letter.reason,
        "message": letter.message,
        "origin": f"{letter.origin.topic}-{letter.origin.index}@{letter.origin_offset}",
        "truncated": letter.truncated,
    }


def _line(record: Record, letter: DeadLetter) -> str:
    fields = _fields(record, letter)
    return f"{fields['at']}  {fields['reason']}  {fields['origin']}  {fields['message']}"
