"""Nothing that a user wrote, and no user's id, gets into logs, metrics or the messages of dead letters."""

import json
import logging
from collections.abc import Callable

import pytest
from prometheus_client import generate_latest

from oppu.errors import TransientError
from tests.ingest.world import World, event_fields

USER, TEXT = "user-Zanzibar", "text-Quetzal"
SAID = event_fields("e-Okapi", USER, input=TEXT, output=f"{TEXT} too", choices=[TEXT, f"{TEXT} not"], task="quote")

RECORDS: list[dict[str, object] | bytes] = [
    {**SAID, "output": TEXT},
    {**SAID, "output": f"{TEXT} again"},  # the same id with other content, and a label that is none
    {**SAID, "event_id": "e2", "output": TEXT, "input": 7},
    {**SAID, "occurred_at": TEXT},
    {**SAID, "schema_version": TEXT},
    {**SAID, "choices": TEXT},
    {**SAID, "choices": {TEXT: TEXT}},
    {**SAID, "task": TEXT},
    {**SAID, "task": "news"},
    {**SAID, "input": TEXT * 1000},
    {**SAID, "user_id": f"{USER}\0"},
    {**SAID, "event_id": TEXT * 100},
    {**SAID, "in_reply_to": [TEXT]},
    {TEXT: {TEXT: TEXT}},
    f'{{"user_id": "{USER}", "input": {TEXT}}}'.encode(),
    TEXT.encode() + b"\xff",
    json.dumps(TEXT).encode(),
]


def test_logs_metrics_and_messages_quote_nothing(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for record in RECORDS:
        value = record if isinstance(record, bytes) else json.dumps(record).encode()
        for key in (USER.encode(), TEXT.encode(), None):
            world.send(value, key)
    world.send(json.dumps({**SAID, "output": f"{TEXT} not"}).encode(), USER.encode())
    world.turn(2)
    world.broker.on_call(_away_once())
    world.turn(8, seconds=1.0)
    letters = world.letters()
    assert len(letters) == 3 * len(RECORDS) and world.ids(USER) == ["e-Okapi"]
    shown = [*caplog.messages, *(letter.message for letter in letters), *map(repr, letters)]
    shown += [generate_latest(world.metrics.registry).decode(), *map(repr, world.stored(USER))]
    shown += map(repr, world.store.outbox(10))
    for secret in ("Zanzibar", "Quetzal"):
        assert not [line for line in shown if secret in line]


def _away_once() -> Callable[[str], None]:
    failures = iter([True])

    def fault(operation: str) -> None:
        if operation == "consumer.poll" and next(failures, False):
            raise TransientError("away")

    return fault
