"""The wire contracts: what applications send and receive, as JSON objects, one a record.

Pydantic lives here and in the settings only: bytes become values at this edge. Unknown fields are ignored; a
higher ``schema_version`` is refused. Messages name the field and what is expected, and never quote a payload.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from oppu.errors import InvalidRecord, Reason
from oppu.settings import LimitsSettings
from oppu.values import OutRecord, Record, UserId

SCHEMA_VERSION = 1

_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_FIRST_TIME = datetime(1, 1, 2, tzinfo=UTC)  # a day of room for offsets
_FAULTS_SHOWN = 5  # a record can hold thousands, and the message becomes a header


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


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class BehaviorEvent(_Wire):
    """Something a user did: for this input, this output."""

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    event_id: Identifier
    user_id: Identifier
    task: Identifier
    occurred_at: Time
    input: Text
    output: MaybeBlank = Field(description="Blank only where the task's bare_history lets a text stand alone.")
    choices: Annotated[tuple[Text, ...], Field(min_length=2, strict=False)] | None = None
    in_reply_to: Identifier | None = Field(None, description="request_id of the prediction this answers.")


class RequestOptions(_Wire):
    """What to combine in the answer."""

    retrieve: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="Items to retrieve; 0 = none.")
    profile: bool = True
    adapter: bool = True
    max_new_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class After(_Wire):
    """Coordinates that the producer of an event got acknowledged: answer only with that event in view."""

    partition: Annotated[int, Field(ge=0, lt=2**31)]
    offset: Annotated[int, Field(ge=0, lt=2**63)]


class PredictionRequest(_Wire):
    """A question: what will this user make of this input?"""

    schema_version: Annotated[int, Field(ge=1)] = SCHEMA_VERSION
    request_id: Identifier
    user_id: Identifier
    task: Identifier
    input: Text
    choices: Annotated[tuple[Text, ...], Field(min_length=2, strict=False)] | None = None
    options: RequestOptions = RequestOptions()
    deadline: Time | None = None
    after: After | None = None


class ErrorBody(_Wire):
    """Why there is no answer."""

    code: str
    message: str


class Degraded(_Wire):
    """Something that was asked for and could not be used."""

    part: Literal["history", "retrieval", "profile", "adapter"]
    reason: str


class Provenance(_Wire):
    """What the answer was made of."""

    base: str
    adapter_version: int | None = None
    profile_version: str | None = None
    retrieved: Annotated[tuple[str, ...], Field(strict=False, description="Events that had a say in it.")] = ()
    history_sequence: int = 0
    used: Annotated[tuple[Literal["retrieval", "profile", "adapter"], ...], Field(strict=False)] = ()
    degraded: Annotated[tuple[Degraded, ...], Field(strict=False)] = ()


class Prediction(_Wire):
    """The answer to one request; exactly one of ``output`` and ``error`` is set."""

    schema_version: int = SCHEMA_VERSION
    request_id: str
    user_id: str
    task: str | None = None
    status: Literal["ok", "error"]
    output: str | None = None
    scores: dict[str, float] | None = Field(None, description="Probability of each choice.")
    error: ErrorBody | None = None
    provenance: Provenance | None = None
    timings: dict[str, float] = Field(default_factory=dict, description="Milliseconds by stage.")


class AdapterUpdate(_Wire):
    """A user's current head, for others to follow; a tombstone follows an erasure."""

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


def parse_event(record: Record, *, limits: LimitsSettings, now: datetime) -> BehaviorEvent:
    """Parse and check a behaviour event, its task aside, and so whether its output may be blank.

    Args:
        record: The record as read.
        limits: Maxima.
        now: Current time, for absurd times.

    Returns:
        The event, ``occurred_at`` in UTC.

    Raises:
        InvalidRecord: With the reason and the field.
    """
    event = _parse(BehaviorEvent, record, limits)
    _check_time("occurred_at", event.occurred_at, limits, now)
    _check_limits({"input": event.input, "output": event.output}, event.choices, limits, blank={"output"})
    return event.model_copy(update={"occurred_at": event.occurred_at.astimezone(UTC)})


def parse_request(record: Record, *, limits: LimitsSettings) -> PredictionRequest:
    """Parse and check a prediction request, its task aside.

    Args:
        record: The record as read.
        limits: Maxima.

    Returns:
        The request.

    Raises:
        InvalidRecord: With the reason and the field.
    """
    request = _parse(PredictionRequest, record, limits)
    _check_limits({"input": request.input}, request.choices, limits)
    for name, maximum in (("retrieve", limits.retrieve), ("max_new_tokens", limits.max_new_tokens)):
        value = getattr(request.options, name)
        if value is not None and value > maximum:
            raise InvalidRecord(Reason.LIMIT_EXCEEDED, f"options.{name}: at most {maximum} allowed, got {value}")
    return request


def parse_prediction(record: Record) -> Prediction:
    """Parse one of our own predictions.

    Args:
        record: The record as read.

    Returns:
        The prediction.

    Raises:
        InvalidRecord: Where it is not one.
    """
    return _validate(Prediction, _json_object(record))


def addressee(record: Record) -> tuple[str, str] | None:
    """Return (request_id, user_id) of a request record that may otherwise be invalid, or ``None``.

    The key is not looked at: a request with a missing or different key is answered with ``key_mismatch``.
    """
    try:
        fields = _json_object(record)
    except InvalidRecord:
        return None
    request_id, user_id = fields.get("request_id"), fields.get("user_id")
    if not (isinstance(request_id, str) and isinstance(user_id, str) and 0 < len(request_id) <= 256):
        return None
    if not 0 < len(user_id) <= 256 or not _encodable(request_id) or not _encodable(user_id):
        return None
    return (request_id, user_id)


def content_digest(event: BehaviorEvent) -> bytes:
    """SHA-256 of what the event says, so that a resend with the same content is told from a clash of ids."""
    content = event.model_dump(mode="json", exclude={"schema_version"})
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).digest()


def user_key(user_id: str) -> UserId:
    """Name a checked wire user id as the internal id."""
    return UserId(user_id)


M = TypeVar("M", bound=_Wire)


def _parse(contract: type[M], record: Record, limits: LimitsSettings) -> M:
    size = len(record.value or b"")
    if size > limits.record_bytes:
        raise InvalidRecord(Reason.LIMIT_EXCEEDED, f"record: at most {limits.record_bytes} bytes allowed, got {size}")
    fields = _json_object(record)
    check_version(fields)
    value = _validate(contract, fields)
    _check_key(record, value.user_id, limits)  # type: ignore[attr-defined]
    return value


def check_version(fields: Mapping[str, Any]) -> None:
    """Raise ``InvalidRecord`` where a record's ``schema_version`` is higher than what is understood."""
    version = fields.get("schema_version", SCHEMA_VERSION)
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise InvalidRecord(
            Reason.UNSUPPORTED_VERSION,
            f"schema_version: at most {SCHEMA_VERSION} is understood, got a higher one",
        )


def _json_object(record: Record) -> dict[str, Any]:
    try:
        text = (record.value or b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRecord(Reason.INVALID_UTF8, f"record: expected UTF-8, byte {error.start} is not") from error
    try:
        fields = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        where = getattr(error, "pos", None)
        at = f" at character {where}" if where is not None else ""
        raise InvalidRecord(Reason.INVALID_JSON, f"record: expected one JSON object, it does not parse{at}") from error
    if not isinstance(fields, dict):
        raise InvalidRecord(Reason.INVALID_JSON, "record: expected a JSON object")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _validate(contract: type[M], fields: dict[str, Any]) -> M:
    try:
        return contract.model_validate(fields)
    except ValidationError as error:
        raise refusal(error) from error


def refusal(error: ValidationError) -> InvalidRecord:
    """Say what is wrong with a record, field by field, and nothing of what stands in it."""
    faults = error.errors(include_input=False, include_context=False, include_url=False)
    time_only = all(f["loc"][:1] in (("occurred_at",), ("deadline",)) and f["type"] != "missing" for f in faults)
    shown = [f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in faults[:_FAULTS_SHOWN]]
    if len(faults) > _FAULTS_SHOWN:
        shown.append(f"and {len(faults) - _FAULTS_SHOWN} more")
    return InvalidRecord(Reason.INVALID_TIME if time_only else Reason.INVALID_RECORD, "; ".join(shown))


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_key(record: Record, user_id: str, limits: LimitsSettings) -> None:
    expected = user_id.encode()
    if len(expected) > limits.user_id_bytes:
        raise InvalidRecord(
            Reason.LIMIT_EXCEEDED, f"user_id: at most {limits.user_id_bytes} bytes allowed, got {len(expected)}"
        )
    if record.key is None:
        raise InvalidRecord(Reason.KEY_MISMATCH, "key: expected the user_id's UTF-8 bytes, got no key")
    if record.key != expected:
        raise InvalidRecord(Reason.KEY_MISMATCH, "key: expected the user_id's UTF-8 bytes, got other bytes")


def _check_time(name: str, time: datetime, limits: LimitsSettings, now: datetime) -> None:
    try:
        oldest = now - timedelta(days=min(366 * limits.past_years, (now - _FIRST_TIME).days))
        fits = oldest <= time <= now + timedelta(seconds=limits.future_seconds)
    except OverflowError:
        fits = False
    if not fits:
        raise InvalidRecord(
            Reason.INVALID_TIME,
            f"{name}: expected at most {limits.past_years} years ago and {limits.future_seconds:g} s ahead",
        )


def _check_limits(
    texts: dict[str, str], choices: Collection[str] | None, limits: LimitsSettings, blank: Collection[str] = ()
) -> None:
    for name, text in {**texts, **{f"choices.{i}": c for i, c in enumerate(choices or ())}}.items():
        if not text.strip() and name not in blank:
            raise InvalidRecord(Reason.INVALID_RECORD, f"{name}: expected text that is not blank")
        if len(text) > limits.text_characters:
            raise InvalidRecord(
                Reason.LIMIT_EXCEEDED, f"{name}: at most {limits.text_characters} characters allowed, got {len(text)}"
            )
    if choices is not None and len(choices) > limits.choices:
        raise InvalidRecord(Reason.LIMIT_EXCEEDED, f"choices: at most {limits.choices} allowed, got {len(choices)}")
    if choices is not None and len(set(choices)) < len(choices):
        raise InvalidRecord(Reason.INVALID_RECORD, "choices: expected distinct texts")
