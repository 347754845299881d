"""The application's commands: produce events, ask, watch predictions."""

import gzip
import logging
import sys
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError
from rich.progress import Progress

from oppu.cli import Session, compose, emit, json_option
from oppu.cli.operation import partition_count
from oppu.client import Client
from oppu.errors import ConfigError, InvalidRecord, OppuError
from oppu.parsing import parse_event, refusal
from oppu.settings import Settings
from oppu.values import Partition, Record
from oppu.wire import BehaviorEvent, Coordinates, Prediction, PredictionRequest, RequestOptions, record_for

logger = logging.getLogger(__name__)

CHUNK = 500


@contextmanager
def client(session: Session, *, listen: bool) -> Iterator[Client]:
    """Open a client of the configured cluster and close it afterwards."""
    names = compose.topics(session.settings)
    partition_count(session.settings, names.predictions if listen else names.events)
    opened = Client(compose.broker(session.settings), compose.topics(session.settings), listen=listen)
    try:
        yield opened
    finally:
        opened.close()


@click.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@json_option
@click.pass_obj
def produce(session: Session, file: Path, *, as_json: bool) -> None:
    """Send the events of FILE (JSON lines, .gz allowed, - for standard input), oldest first.

    Every line is checked as `oppu ingest` will check it before the first one is sent.
    """
    events = read_events(file, check=_ingest_check(session.settings))
    with client(session, listen=False) as opened, Progress(disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("events", total=len(events))
        for start in range(0, len(events), CHUNK):
            opened.send_events(events[start : start + CHUNK])
            progress.advance(bar, len(events[start : start + CHUNK]))
    emit({"sent": len(events)}, as_json=as_json, text=f"{len(events)} events sent and acknowledged")


@click.command()
@click.option("--user", "user_id", required=True, help="The user's id.")
@click.option("--task", required=True)
@click.option("--choice", "choices", multiple=True, help="An allowed answer, for tasks whose choices vary.")
@click.option("--retrieve", type=click.IntRange(min=0), help="Items to retrieve; 0 = none.")
@click.option("--profile/--no-profile", default=True)
@click.option("--adapter/--no-adapter", default=True)
@click.option("--after", help="PARTITION:OFFSET of an acknowledged event that must be in view.")
@click.option("--timeout", "timeout_seconds", type=click.FloatRange(min=0.1), default=30.0, show_default=True)
@json_option
@click.argument("text")
@click.pass_obj
def ask(session: Session, /, text: str, user_id: str, task: str, timeout_seconds: float, **options: Any) -> None:
    """Ask what the user will make of TEXT."""
    as_json = options.pop("as_json")
    request = _request(text, user_id, task, options)
    with client(session, listen=True) as opened:
        answers = opened.ask([request], timeout_seconds=timeout_seconds)
    if not answers:
        raise OppuError(f"no answer within {timeout_seconds:g} s; is an inference worker running?")
    answer = answers[request.request_id]
    emit(answer.model_dump(mode="json", exclude_none=True), as_json=as_json, text=_shown(answer))
    if answer.status == "error":
        raise click.exceptions.Exit(1)


@click.command()
@click.option("--user", "user_id", help="Only this user's.")
@json_option
@click.pass_obj
def watch(session: Session, user_id: str | None, *, as_json: bool) -> None:
    """Print predictions as they are made, until interrupted."""
    with client(session, listen=True) as opened:
        while True:
            for answer in opened.poll():
                if user_id in (None, answer.user_id):
                    emit(answer.model_dump(mode="json", exclude_none=True), as_json=as_json, text=_shown(answer))


def read_events(file: Path, *, check: Callable[[BehaviorEvent], None] | None = None) -> list[BehaviorEvent]:
    """Read and check a file of events.

    Args:
        file: JSON lines, gzip by its name's ending, ``-`` for standard input.
        check: Raises ``InvalidRecord`` for an event that keeps the contract and is wrong all the same.

    Returns:
        The events in file order.

    Raises:
        ConfigError: Naming each faulty line (the first ten) and what is expected.
    """
    events: list[BehaviorEvent] = []
    problems: list[str] = []
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            event = _event(line)
            if check is not None:
                check(event)
        except InvalidRecord as error:
            problems.append(f"{file}:{number}: {error.message}")
        else:
            events.append(event)
    if problems:
        raise ConfigError(*problems[:10], *([f"… and {len(problems) - 10} more"] if len(problems) > 10 else []))
    return events


def _event(line: bytes) -> BehaviorEvent:
    try:
        # not json.loads, which a deeply nested line takes to the limit of Python's stack
        return BehaviorEvent.model_validate_json(line)
    except ValidationError as error:
        refused = refusal(error)
        if any(not fault["loc"] for fault in error.errors()):  # no field is to blame
            raise InvalidRecord(refused.reason, f"expected one JSON object in UTF-8{refused.message}") from error
        raise refused from error


def _ingest_check(settings: Settings) -> Callable[[BehaviorEvent], None]:
    """Return what raises ``InvalidRecord`` for an event whose record would become a dead letter.

    A task that is not known here may be where events are stored, so that one is passed with a warning.
    """
    tasks, topic, now = compose.tasks(settings), compose.topics(settings).events, datetime.now(UTC)
    unknown: set[str] = set()

    def check(event: BehaviorEvent) -> None:
        sent = record_for(topic, event.user_id, event)
        parse_event(Record(Partition(topic, 0), 0, 0, sent.key, sent.value), limits=settings.limits, now=now)
        if event.task in tasks:
            tasks.require(event.task).check_output(event.output, event.choices)
        elif event.task not in unknown:
            unknown.add(event.task)
            logger.warning("task %s is not known here: whether its events are right is for oppu ingest", event.task)

    return check


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with _opened(file) as lines:
            yield from lines
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error


def _opened(file: Path) -> AbstractContextManager[Iterable[bytes]]:
    if str(file) == "-":
        return nullcontext(sys.stdin.buffer)  # sys.stdin decodes as the terminal's locale says
    if file.suffix == ".gz":
        return gzip.open(file, "rb")
    return file.open("rb")


def _request(text: str, user_id: str, task: str, options: dict[str, Any]) -> PredictionRequest:
    try:
        return PredictionRequest(
            request_id=f"ask-{uuid.uuid4().hex}",
            user_id=user_id,
            task=task,
            input=text,
            choices=tuple(options["choices"]) or None,
            options=RequestOptions(
                retrieve=options["retrieve"], profile=options["profile"], adapter=options["adapter"]
            ),
            after=_after(options["after"]),
        )
    except ValidationError as error:
        raise ConfigError(*(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors())) from error


def _after(text: str | None) -> Coordinates | None:
    if text is None:
        return None
    partition, _, offset = text.partition(":")
    if not (partition.isdecimal() and offset.isdecimal()):
        raise ConfigError(f"--after: expected PARTITION:OFFSET, got {text}")
    return Coordinates(partition=int(partition), offset=int(offset))


def _shown(answer: Prediction) -> str:
    if answer.error is not None:
        return f"{answer.request_id}  error {answer.error.code}: {answer.error.message}"
    made = answer.provenance
    parts = "+".join(made.used) if made and made.used else "no personalization"
    version = f", adapter version {made.adapter_version}" if made and made.adapter_version is not None else ""
    lost = "".join(f"; {d.part} degraded: {d.reason}" for d in made.degraded) if made else ""
    best = sorted((answer.scores or {}).items(), key=lambda item: -item[1])[:3]
    scores = "  " + ", ".join(f"{label} {share:.2f}" for label, share in best) if best else ""
    return f"{answer.output}{scores}\n  ({parts}{version}{lost})"
