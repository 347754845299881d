"""The wire contracts at the edge: what is accepted, and the reason for everything that is not."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oppu.errors import InvalidRecord, Reason
from oppu.parsing import addressee, parse_event, parse_prediction, parse_request
from oppu.settings import LimitsSettings
from oppu.values import Partition, Record
from oppu.wire import BehaviorEvent, Prediction, PredictionRequest, Provenance, content_digest, encode, record_for

NOW = datetime(2026, 6, 1, tzinfo=UTC)
LIMITS = LimitsSettings()
EVENT = {
    "schema_version": 1,
    "event_id": "e1",
    "user_id": "u1",
    "task": "news_categorize",
    "occurred_at": "2026-05-31T12:00:00Z",
    "input": "an article",
    "output": "politics",
}
REQUEST = {"request_id": "r1", "user_id": "u1", "task": "news_categorize", "input": "an article"}


def record(value: Mapping[str, object] | bytes | None, key: bytes | None = b"u1") -> Record:
    raw = json.dumps(value).encode() if isinstance(value, Mapping) else value
    return Record(Partition("events", 0), 0, 0, key, raw)


def event(limits: LimitsSettings = LIMITS, *, key: bytes | None = b"u1", **changes: object) -> BehaviorEvent:
    return parse_event(record({**EVENT, **changes}, key), limits=limits, now=NOW)


def refusal(value: Mapping[str, object] | bytes | None, key: bytes | None = b"u1") -> InvalidRecord:
    with pytest.raises(InvalidRecord) as caught:
        parse_event(record(value, key), limits=LIMITS, now=NOW)
    assert len(caught.value.message) < 1000, "it becomes a header"
    return caught.value


def reason(**changes: object) -> Reason:
    return refusal({**EVENT, **changes}).reason


def test_a_valid_event_is_read_in_full() -> None:
    parsed = event(choices=["politics", "sports"], in_reply_to="r1")
    assert parsed.occurred_at == datetime(2026, 5, 31, 12, tzinfo=UTC)
    assert parsed.choices == ("politics", "sports")
    assert (parsed.event_id, parsed.user_id, parsed.in_reply_to) == ("e1", "u1", "r1")


def test_unknown_fields_are_ignored_whatever_they_hold() -> None:
    assert event(extra={"a": [1, None]}, bad="\ud800") == event()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, Reason.INVALID_JSON),
        (b"", Reason.INVALID_JSON),
        (b"{", Reason.INVALID_JSON),
        (b"[]", Reason.INVALID_JSON),
        (b"null", Reason.INVALID_JSON),
        (b'"text"', Reason.INVALID_JSON),
        (b"\xef\xbb\xbf{}", Reason.INVALID_JSON),
        (b"\xff\xfe{\x00}\x00", Reason.INVALID_UTF8),
        (b'{"user_id": "\xc3\x28"}', Reason.INVALID_UTF8),
        (b'{"user_id": "\xed\xa0\x80"}', Reason.INVALID_UTF8),
        (b'{"x": NaN}', Reason.INVALID_JSON),
        (b'{"x": -Infinity}', Reason.INVALID_JSON),
        (b'{"x": ' + b"9" * 5000 + b"}", Reason.INVALID_JSON),
        (b"{}", Reason.INVALID_RECORD),
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes | None, expected: Reason) -> None:
    assert refusal(raw).reason is expected


@pytest.mark.parametrize("depth", [500, *range(900, 1100, 3), 100_000])
def test_no_depth_of_nesting_gets_through_as_anything_but_json_or_a_refusal(depth: int) -> None:
    body = json.dumps(EVENT)[:-1].encode() + b', "deep": ' + b"[" * depth + b"]" * depth + b"}"
    try:
        parse_event(record(body), limits=LIMITS, now=NOW)
    except InvalidRecord as error:
        assert error.reason is Reason.INVALID_JSON


@pytest.mark.parametrize("name", sorted(EVENT.keys() - {"schema_version"}))
def test_a_missing_field_is_named(name: str) -> None:
    error = refusal({k: v for k, v in EVENT.items() if k != name})
    assert error.reason is Reason.INVALID_RECORD
    assert error.message.startswith(f"{name}:")


@pytest.mark.parametrize(
    "changes",
    [
        {"event_id": 7},
        {"event_id": ""},
        {"event_id": "e" * 257},
        {"user_id": None},
        {"user_id": ["u1"]},
        {"task": True},
        {"input": {"text": "x"}},
        {"input": ""},
        {"input": " \n\t "},
        {"output": 3},
        {"choices": "ab"},
        {"choices": ["one"]},
        {"choices": ["a", 1]},
        {"choices": ["a", "a"]},
        {"choices": ["a", " "]},
        {"choices": {"a": 1, "b": 2}},
        {"in_reply_to": 5},
        {"schema_version": True},
        {"schema_version": 1.0},
        {"schema_version": 1.5},
        {"schema_version": "1"},
        {"schema_version": 0},
        {"schema_version": -(10**30)},
        {"schema_version": None},
        {"input": "a\0b"},
        {"event_id": "\0"},
        {"choices": ["a", "\0"]},
    ],
    ids=str,
)
def test_wrong_types_and_values_are_invalid_records(changes: dict[str, object]) -> None:
    assert reason(**changes) is Reason.INVALID_RECORD


@pytest.mark.parametrize("version", [2, 99, 10**4000])
def test_a_future_schema_version_is_told_apart(version: int) -> None:
    assert reason(schema_version=version) is Reason.UNSUPPORTED_VERSION


def test_a_future_version_is_told_apart_whatever_else_it_changed() -> None:
    assert refusal({"schema_version": 2, "who": "u1"}).reason is Reason.UNSUPPORTED_VERSION


@pytest.mark.parametrize(
    "time",
    [
        "2026-05-31T12:00:00",
        "2026-05-31",
        "2026-05-31 12:00:00Z",
        "2026-05-31T12:00Z",
        "2026-05-31T12:00:00+0200",
        "2026-05-31T12:00:00 Z",
        "2026-02-30T12:00:00Z",
        "2026-05-31T25:00:00Z",
        "yesterday",
        "",
        "1780228800",
        "٢٠٢٦-05-31T12:00:00Z",
        1_780_228_800,
        1_780_228_800.5,
        -1,
        True,
        None,
        "0001-01-01T00:00:00+14:00",
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59-14:00",
        "1925-01-01T00:00:00Z",
        "2026-06-03T00:00:00Z",
    ],
    ids=str,
)
def test_naive_absurd_and_numeric_times_are_refused(time: object) -> None:
    assert reason(occurred_at=time) is Reason.INVALID_TIME


@pytest.mark.parametrize(
    "time", ["2026-05-31T14:00:00+02:00", "2026-05-31t12:00:00z", "2026-05-31T12:00:00.000000000Z"]
)
def test_times_are_read_into_utc(time: str) -> None:
    parsed = event(occurred_at=time).occurred_at
    assert parsed == datetime(2026, 5, 31, 12, tzinfo=UTC)
    assert parsed.tzinfo is UTC


def test_how_old_a_time_may_be_is_configurable_without_bounds() -> None:
    limits = LimitsSettings(past_years=100_000)
    assert event(limits, occurred_at="0050-01-01T00:00:00Z").occurred_at.year == 50


def test_a_wrong_time_beside_another_fault_is_an_invalid_record() -> None:
    assert reason(occurred_at=7, input=7) is Reason.INVALID_RECORD


def test_an_oversized_record_is_refused_before_it_is_parsed() -> None:
    limits = LimitsSettings(record_bytes=1024)
    with pytest.raises(InvalidRecord) as caught:
        parse_event(record(b"\xff" * 1025), limits=limits, now=NOW)
    assert caught.value.reason is Reason.LIMIT_EXCEEDED


def test_a_text_of_one_megabyte_is_over_the_limit() -> None:
    assert reason(input="x" * 1_000_000) is Reason.LIMIT_EXCEEDED
    limits = LimitsSettings(record_bytes=2_000_000)
    with pytest.raises(InvalidRecord) as caught:
        event(limits, input="x" * 1_000_000)
    assert caught.value.reason is Reason.LIMIT_EXCEEDED
    assert caught.value.message.startswith("input:")


def test_choices_have_limits() -> None:
    with pytest.raises(InvalidRecord) as caught:
        event(LimitsSettings(choices=2), choices=["a", "b", "c"])
    assert caught.value.reason is Reason.LIMIT_EXCEEDED
    with pytest.raises(InvalidRecord) as caught:
        event(LimitsSettings(text_characters=20), choices=["a", "b" * 21])
    assert caught.value.message.startswith("choices.1:")


def test_a_record_with_thousands_of_faults_has_a_short_message() -> None:
    error = refusal({**EVENT, "choices": list(range(20_000))})
    assert "more" in error.message


def test_messages_do_not_quote_the_payload() -> None:
    secret = "a very private text"
    for changes in ({"occurred_at": secret}, {"choices": secret}, {"schema_version": secret}, {"input": secret * 2000}):
        assert secret not in refusal({**EVENT, **changes}).message


@pytest.mark.parametrize("key", [None, b"", b"u2", b"u1 ", b"U1", b"\xff"])
def test_the_key_must_be_the_user_id(key: bytes | None) -> None:
    assert refusal(EVENT, key).reason is Reason.KEY_MISMATCH


@pytest.mark.parametrize(
    "user_id",
    [
        "é",
        "e\u0301",
        "用户",
        "👩‍👩‍👧",
        " spaced ",
        "a/b\\c?#%00",
        "..",
        "\u202eabc",
        "\x01\x7f\u0080",
        "\U0010ffff",
        "'; --",
        "\ufeffx",
    ],
    ids=ascii,
)
def test_user_ids_may_hold_any_unicode(user_id: str) -> None:
    assert event(user_id=user_id, key=user_id.encode()).user_id == user_id


def test_user_ids_are_compared_as_bytes() -> None:
    with pytest.raises(InvalidRecord) as caught:
        event(user_id="é", key="e\u0301".encode())
    assert caught.value.reason is Reason.KEY_MISMATCH


@pytest.mark.parametrize("user_id", ["\0", "u\0", "\ud800", "u\udfff"], ids=ascii)
def test_user_ids_that_no_database_can_hold_are_refused(user_id: str) -> None:
    error = refusal({**EVENT, "user_id": user_id}, user_id.encode("utf-8", "surrogatepass"))
    assert error.reason is Reason.INVALID_RECORD
    assert error.message.startswith("user_id:")


@pytest.mark.parametrize("field", ["input", "output", "event_id", "task"])
def test_lone_surrogates_are_refused_everywhere(field: str) -> None:
    assert reason(**{field: "\ud800"}) is Reason.INVALID_RECORD


def test_the_length_of_a_user_id_is_counted_in_bytes() -> None:
    fits, over = "用" * 170, "用" * 171
    assert len(over.encode()) == 513
    assert event(user_id=fits, key=fits.encode()).user_id == fits
    assert refusal({**EVENT, "user_id": over}, over.encode()).reason is Reason.LIMIT_EXCEEDED


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=100).filter(lambda s: "\0" not in s))
def test_every_user_id_that_is_accepted_survives_the_round_trip(user_id: str) -> None:
    sent = BehaviorEvent.model_validate({**EVENT, "user_id": user_id})
    out = record_for("events", user_id, sent)
    back = parse_event(Record(Partition("events", 0), 0, 0, out.key, out.value), limits=LIMITS, now=NOW)
    assert back == sent


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_parse_or_be_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRecord):
        parse_event(record(raw), limits=LIMITS, now=NOW)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("a\ud800\0é9", max_size=5)
JSON = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.just("a"), SCALARS)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from([*EVENT, "choices", "in_reply_to"]), JSON, max_size=3))
def test_no_json_in_any_field_does_anything_but_parse_or_be_refused(changes: dict[str, object]) -> None:
    try:
        parsed = parse_event(record({**EVENT, **changes}), limits=LIMITS, now=NOW)
    except InvalidRecord:
        return
    assert parsed.user_id == "u1"


def test_the_digest_is_of_the_content() -> None:
    same = event(occurred_at="2026-05-31T14:00:00+02:00", extra=1)
    assert content_digest(event()) == content_digest(same)
    others = (
        event(output="sports"),
        event(input="x"),
        event(occurred_at="2026-05-31T12:00:01Z"),
        event(in_reply_to="r"),
    )
    assert len({content_digest(one) for one in (event(), *others)}) == 5


def test_a_request_is_read_in_full() -> None:
    options = {"retrieve": 3, "profile": False, "adapter": False, "max_new_tokens": 9}
    after = {"partition": 2, "offset": 40}
    request = parse_request(
        record({**REQUEST, "options": options, "deadline": "2026-06-01T00:00:10Z", "after": after}), limits=LIMITS
    )
    assert (request.options.retrieve, request.options.profile, request.options.adapter) == (3, False, False)
    assert request.deadline == NOW + timedelta(seconds=10)
    assert request.after is not None
    assert (request.after.partition, request.after.offset) == (2, 40)
    assert parse_request(record(REQUEST), limits=LIMITS).options.adapter


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"options": {"retrieve": 65}}, Reason.LIMIT_EXCEEDED),
        ({"options": {"max_new_tokens": 257}}, Reason.LIMIT_EXCEEDED),
        ({"options": {"retrieve": -1}}, Reason.INVALID_RECORD),
        ({"options": {"retrieve": True}}, Reason.INVALID_RECORD),
        ({"options": {"retrieve": 10**4000}}, Reason.INVALID_RECORD),
        ({"options": {"profile": 1}}, Reason.INVALID_RECORD),
        ({"options": None}, Reason.INVALID_RECORD),
        ({"after": {"partition": 0}}, Reason.INVALID_RECORD),
        ({"after": {"partition": 0, "offset": 2**63}}, Reason.INVALID_RECORD),
        ({"after": {"partition": 2**31, "offset": 0}}, Reason.INVALID_RECORD),
        ({"after": {"partition": 0.0, "offset": 0}}, Reason.INVALID_RECORD),
        ({"deadline": 1_780_228_800}, Reason.INVALID_TIME),
        ({"deadline": "2026-06-01T00:00:10"}, Reason.INVALID_TIME),
        ({"request_id": ""}, Reason.INVALID_RECORD),
        ({"input": "x" * 20_001}, Reason.LIMIT_EXCEEDED),
        ({"schema_version": 2}, Reason.UNSUPPORTED_VERSION),
    ],
    ids=str,
)
def test_bad_requests_are_refused(changes: dict[str, object], expected: Reason) -> None:
    with pytest.raises(InvalidRecord) as caught:
        parse_request(record({**REQUEST, **changes}), limits=LIMITS)
    assert caught.value.reason is expected
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({**REQUEST, "input": 7}, ("r1", "u1")),
        ({**REQUEST, "schema_version": 9}, ("r1", "u1")),
        ({"request_id": "r1"}, None),
        ({"request_id": 1, "user_id": "u1"}, None),
        ({"request_id": "", "user_id": "u1"}, None),
        ({"request_id": "r" * 257, "user_id": "u1"}, None),
        ({"request_id": "\ud800", "user_id": "u1"}, None),
        ({"request_id": "r1", "user_id": "\ud800"}, None),
        (b"\xff", None),
        (b"[]", None),
    ],
    ids=str,
)
def test_who_asked_is_read_from_bad_requests(value: Mapping[str, object] | bytes, expected: object) -> None:
    assert addressee(record(value)) == expected


def test_predictions_survive_the_round_trip() -> None:
    sent = Prediction(
        request_id="r",
        user_id="u",
        task="t",
        status="ok",
        output="o",
        scores={"o": 0.75, "p": 0.25},
        provenance=Provenance(base="b", used=("retrieval", "adapter")),
    )
    assert parse_prediction(record(encode(sent))) == sent


def test_a_request_survives_the_round_trip() -> None:
    sent = PredictionRequest(request_id="r1", user_id="u1", task="t", input="i", deadline=NOW)
    out = record_for("requests", "u1", sent, request_id=b"r1")
    assert out.headers == (("request_id", b"r1"),)
    assert parse_request(record(out.value), limits=LIMITS) == sent
