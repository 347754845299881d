"""The generated files are what the code says, and a schema accepts and refuses what the parser does."""

import json
from pathlib import Path

import jsonschema
import pytest

from oppu.cli.contracts import generate
from oppu.wire import CONTRACTS, AdapterUpdate, BehaviorEvent, encode

FOLDER = Path(__file__).parents[1] / "docs" / "contracts"
EVENT = {
    "schema_version": 1,
    "event_id": "e1",
    "user_id": "u1",
    "task": "news_categorize",
    "occurred_at": "2026-01-01T00:00:00Z",
    "input": "an article",
    "output": "politics",
}


@pytest.mark.parametrize("name", sorted(generate()))
def test_checked_in_files_are_current(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == generate()[name], "run: make schemas"


def test_event_schema_accepts_what_the_parser_accepts() -> None:
    schema = json.loads((FOLDER / "behavior-events.schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(EVENT, schema)
    BehaviorEvent.model_validate(EVENT)


@pytest.mark.parametrize("name", ["event_id", "user_id", "task", "occurred_at", "input", "output"])
def test_event_schema_requires(name: str) -> None:
    schema = json.loads((FOLDER / "behavior-events.schema.json").read_text(encoding="utf-8"))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({k: v for k, v in EVENT.items() if k != name}, schema)


@pytest.mark.parametrize("topic", sorted(CONTRACTS))
def test_each_schema_has_an_example_that_is_valid_and_parses(topic: str) -> None:
    schema = json.loads((FOLDER / f"{topic}.schema.json").read_text(encoding="utf-8"))
    [example] = schema["examples"]
    jsonschema.validate(example, schema)
    parsed = CONTRACTS[topic].model_validate_json(json.dumps(example))
    assert example.items() <= json.loads(encode(parsed)).items(), "nothing in it is ignored"


@pytest.mark.parametrize(
    "update",
    [
        AdapterUpdate(user_id="u1", base="b", version=1, parent=None, cause="published"),
        AdapterUpdate(user_id="u1", base="b", version=2, parent=1, cause="published"),
        AdapterUpdate(user_id="u1", base="b", version=None, parent=2, cause="rolled_back"),
    ],
)
def test_updates_are_sent_as_their_schema_says(update: AdapterUpdate) -> None:
    sent = encode(update)
    jsonschema.validate(json.loads(sent), json.loads((FOLDER / "adapter-updates.schema.json").read_text("utf-8")))
    assert AdapterUpdate.model_validate_json(sent) == update
