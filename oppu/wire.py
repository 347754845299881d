"""The wire contracts: what applications send and receive, as JSON objects, one a record.

How bytes become these values, and what is refused on the way, stands in ``parsing``. Unknown fields are ignored.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
)

from oppu.values import OutRecord

SCHEMA_VERSION = 1

_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def _rfc_3339(value: object) -> object:
    # pydantic would take numbers, and texts of digits, as seconds or milliseconds since 1970
    if isinstance(value, datetime):  # ours, not from JSON
        return value
    if not isinstance(value, str) or not _RFC_3339.fullmatch(value):
        raise ValueError("expected an RFC 3339 time with an offset, such as 2026-01-31T12:00:00Z")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:  # PostgreSQL's text cannot hold it
        raise ValueError("expected text without U+0000")
    return value


Identifier = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_no_nul)]
Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_no_nul)]
MaybeBlank = Annotated[str, StringConstraints(min_length=0), AfterValidator(_no_nul)]
Time = Annotated[AwareDatetime, Field(strict=False, description="RFC 3339 with an offset."), BeforeValidator(_rfc_3339)]


class Wire(BaseModel):
    """What all contracts have in common: frozen, strict, unknown fields ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


def _example(**fields: JsonValue) -> ConfigDict:
    """Put one record's value into a contract's JSON Schema."""
    return ConfigDict(json_schema_extra={"examples": [fields]})


class BehaviorEvent(Wire):
    """Something a user did: for this input, this output."""

    model_config = _example(
        schema_version=1,
        event_id="e-1",
        user_id="u-1",
        task="news_categorize",
        occurred_at="2026-01-31T12:00:00Z",
        input="The Senate passed the budget on Tuesday.",
        output="politics",
    )

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    event_id: Identifier
    user_id: Identifier
    task: Identifier
    occurred_at: Time
    input: Text
    output: MaybeBlank = Field(description="Blank only where the task's bare_history lets a text stand alone.")
    choices: Annotated[tuple[Text, ...], Field(min_length=2, strict=False)] | None = None
    in_reply_to: Identifier | None = Field(None, description="request_id of the prediction this answers.")


class RequestOptions(Wire):
    """What to combine in the answer."""

    retrieve: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="Items to retrieve; 0 = none.")
    profile: bool = True
    adapter: bool = True
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class Coordinates(Wire):
    """Where a record lies in its topic."""

    partition: Annotated[int, Field(ge=0, lt=2**31)]
    offset: Annotated[int, Field(ge=0, lt=2**63)]


class PredictionRequest(Wire):
    """A question: what will this user make of this input?"""

    model_config = _example(
        schema_version=1,
        request_id="r-1",
        user_id="u-1",
        task="news_categorize",
        input="The House votes on Friday.",
        options={"retrieve": 4, "profile": True, "adapter": True},
        deadline="2026-01-31T12:00:30Z",
        after={"partition": 0, "offset": 41},
    )

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    request_id: Identifier
    user_id: Identifier
    task: Identifier
    input: Text
    choices: Annotated[tuple[Text, ...], Field(min_length=2, strict=False)] | None = None
    options: RequestOptions = RequestOptions()
    deadline: Time | None = None
    after: Coordinates | None = Field(None, description="An event's, as acknowledged: answer with it in view.")


class ErrorBody(Wire):
    """Why there is no answer."""

    code: str
    message: str


class Degraded(Wire):
    """Something that was asked for and could not be used."""

    part: Literal["history", "retrieval", "profile", "adapter"]
    reason: str


class Provenance(Wire):
    """What the answer was made of."""

    base: str
    epoch: Annotated[int, Field(ge=1)] | None = Field(None, description="The user's: each erasure begins a new one.")
    adapter_version: int | None = None
    profile_version: str | None = None
    retrieved: Annotated[tuple[str, ...], Field(strict=False, description="Events that had a say in it.")] = ()
    history_sequence: int = 0
    used: Annotated[tuple[Literal["retrieval", "profile", "adapter"], ...], Field(strict=False)] = ()
    degraded: Annotated[tuple[Degraded, ...], Field(strict=False)] = ()


class Prediction(Wire):
    """The answer to one request; exactly one of ``output`` and ``error`` is set."""

    model_config = _example(
        schema_version=1,
        request_id="r-1",
        user_id="u-1",
        request={"partition": 0, "offset": 7},
        task="news_categorize",
        status="ok",
        output="politics",
        scores={"politics": 0.75, "u.s. news": 0.25},
        provenance={
            "base": "3f9c0a7be2d14856",
            "epoch": 1,
            "adapter_version": 3,
            "retrieved": ["e-1"],
            "history_sequence": 23,
            "used": ["retrieval", "adapter"],
            "degraded": [{"part": "profile", "reason": "history_behind"}],
        },
        timings={"model": 6.5},
    )

    schema_version: int = SCHEMA_VERSION
    request_id: str
    user_id: str
    request: Coordinates | None = Field(None, description="Where the request lies that this answers.")
    task: str | None = None
    status: Literal["ok", "error"]
    output: str | None = None
    scores: dict[str, float] | None = Field(None, description="Probability of each choice.")
    error: ErrorBody | None = None
    provenance: Provenance | None = None
    timings: dict[str, float] = Field(default_factory=dict, description="Milliseconds by stage.")


class AdapterUpdate(Wire):
    """A user's current head, for others to follow; a tombstone follows an erasure."""

    model_config = _example(
        schema_version=1, user_id="u-1", base="3f9c0a7be2d14856", version=3, parent=2, cause="published"
    )

    schema_version: int = SCHEMA_VERSION
    user_id: str
    base: str
    version: int | None = Field(None, description="Left out: the base alone.")
    parent: int | None = Field(None, description="Left out: trained afresh.")
    cause: Literal["published", "rolled_back"]


CONTRACTS: dict[str, type[BaseModel]] = {
    "behavior-events": BehaviorEvent,
    "prediction-requests": PredictionRequest,
    "predictions": Prediction,
    "adapter-updates": AdapterUpdate,
}
"""Topic (without prefix) to contract; ``dead-letters`` carries original bytes and headers only."""


@dataclass(frozen=True, slots=True)
class Topics:
    """Full topic names under one prefix."""

    prefix: str

    @property
    def events(self) -> str:
        """Topic of behaviour events."""
        return f"{self.prefix}behavior-events"

    @property
    def requests(self) -> str:
        """Topic of prediction requests."""
        return f"{self.prefix}prediction-requests"

    @property
    def predictions(self) -> str:
        """Topic of predictions."""
        return f"{self.prefix}predictions"

    @property
    def dead_letters(self) -> str:
        """Topic of dead letters."""
        return f"{self.prefix}dead-letters"

    @property
    def updates(self) -> str:
        """Topic of adapter updates (compacted)."""
        return f"{self.prefix}adapter-updates"


def encode(message: BaseModel) -> bytes:
    """Serialise a contract value as compact UTF-8 JSON."""
    return message.model_dump_json(exclude_none=True).encode()


def record_for(topic: str, user_id: str, message: BaseModel, **headers: bytes) -> OutRecord:
    """Make the record of a contract value, keyed by the user id's UTF-8 bytes."""
    return OutRecord(topic, user_id.encode(), encode(message), tuple(headers.items()))


def content_digest(event: BehaviorEvent) -> bytes:
    """SHA-256 of what the event says, so that a resend with the same content is told from a clash of ids."""
    content = event.model_dump(mode="json", exclude={"schema_version"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).digest()
