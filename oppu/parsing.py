"""Records' bytes to contract values, or the reason why not.

A higher ``schema_version`` is refused. Messages name the field and what is expected, and never quote a payload.
"""

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from pydantic import ValidationError

from oppu.errors import InvalidRecord, Reason
from oppu.settings import LimitsSettings
from oppu.values import Record, UserId
from oppu.wire import SCHEMA_VERSION, BehaviorEvent, Prediction, PredictionRequest, Wire

_FIRST_TIME = datetime(1, 1, 2, tzinfo=UTC)  # a day of room for offsets
_FAULTS_SHOWN = 5  # a record can hold thousands, and the message becomes a header


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


def user_key(user_id: str) -> UserId:
    """Name a checked wire user id as the internal id."""
    return UserId(user_id)


M = TypeVar("M", bound=Wire)


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
        fields = _JSON.decode(text)
    except (ValueError, RecursionError) as error:
        where = getattr(error, "pos", None)
        at = f" at character {where}" if where is not None else ""
        raise InvalidRecord(Reason.INVALID_JSON, f"record: expected one JSON object, it does not parse{at}") from error
    if not isinstance(fields, dict):
        raise InvalidRecord(Reason.INVALID_JSON, "record: expected a JSON object")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(parse_constant=_no_constant)  # made once: json.loads would make one for every record


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
