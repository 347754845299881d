"""Dead letters: nothing of the original is lost that fits, and what is cut says so."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oppu.clock import ManualClock
from oppu.dead_letters import DeadLetterShare, dead_letter, read_dead_letter
from oppu.errors import ConfigError, DeadLetterLimitReached, InvalidRecord, Reason
from oppu.kafka.memory import MemoryBroker
from oppu.kafka.port import TopicSpec
from oppu.settings import IngestSettings
from oppu.values import Headers, OutRecord, Partition, Record

ORIGIN = Partition("oppu.behavior-events", 3)
LETTERS = Partition("oppu.dead-letters", 1)


def refused(key: bytes | None = b"user", value: bytes | None = b"\xff{", headers: Headers = ()) -> Record:
    """Make a record to be set aside."""
    return Record(ORIGIN, 41, 1_700_000_000_123, key, value, headers)


def letter(record: Record, max_bytes: int = 100_000, message: str = "record: expected UTF-8") -> OutRecord:
    """Make its dead letter."""
    return dead_letter(record, Reason.INVALID_UTF8, message, topic=LETTERS.topic, max_bytes=max_bytes)


def consumed(out: OutRecord) -> Record:
    """Make what a consumer gets of it."""
    return Record(LETTERS, 7, 0, out.key, out.value, out.headers)


@pytest.mark.parametrize(("key", "value"), [(b"u", b"v"), (None, b"v"), (b"u", None), (None, None), (b"", b"\x00\xff")])
def test_the_original_comes_back_unchanged(key: bytes | None, value: bytes | None) -> None:
    headers: Headers = (("trace", b"1"), ("reason", b"theirs"), ("truncated", b"theirs"), ("trace", b"2"))
    made = letter(refused(key, value, headers))
    assert (made.topic, made.key, made.value) == (LETTERS.topic, key, value)
    read = read_dead_letter(consumed(made))
    assert (read.origin, read.origin_offset, read.origin_timestamp_ms) == (ORIGIN, 41, 1_700_000_000_123)
    assert (read.reason, read.message) == ("invalid_utf8", "record: expected UTF-8")
    assert read.at == (LETTERS, 7)
    assert (read.truncated, read.headers_dropped) == (False, False)
    assert read.length == len(key or b"") + len(value or b"")
    assert read.replay() == OutRecord(ORIGIN.topic, key, value, headers)


def test_our_headers_bear_the_contracts_names() -> None:
    names = [name for name, _ in letter(refused()).headers]
    assert names == ["origin-topic", "origin-partition", "origin-offset", "origin-timestamp", "reason", "message"]


def test_a_larger_original_is_cut_and_cannot_be_replayed() -> None:
    value = bytes(range(256)) * 100
    made = letter(refused(b"user", value), max_bytes=10_000)
    headers = dict(made.headers)
    assert headers["truncated"] == b"1"
    assert headers["length"] == b"%d" % (len(value) + 4)
    assert headers["sha256"] == hashlib.sha256(value).hexdigest().encode()
    assert made.key == b"user"
    assert made.value is not None
    assert value.startswith(made.value)
    assert len(made.value) > 8_000
    read = read_dead_letter(consumed(made))
    assert (read.truncated, read.length) == (True, len(value) + 4)
    with pytest.raises(ConfigError, match="cannot be replayed"):
        read.replay()


def test_headers_without_room_are_dropped_and_that_is_said() -> None:
    made = letter(refused(headers=(("big", b"x" * 20_000),)), max_bytes=10_000)
    read = read_dead_letter(consumed(made))
    assert (read.headers, read.headers_dropped, read.truncated) == ((), True, False)


def test_a_long_message_is_cut_at_a_character() -> None:
    read = read_dead_letter(consumed(letter(refused(), message="é" * 5_000)))
    assert read.message == "é" * 1_024


@given(
    st.none() | st.binary(max_size=6_000),
    st.none() | st.binary(max_size=6_000),
    st.lists(st.tuples(st.text(max_size=20), st.binary(max_size=3_000)), max_size=4),
    st.text(max_size=3_000),
)
def test_a_dead_letter_always_fits_its_topic(
    key: bytes | None, value: bytes | None, headers: list[tuple[str, bytes]], message: str
) -> None:
    broker = MemoryBroker(ManualClock())
    broker.admin().create_topics([TopicSpec(LETTERS.topic, 1, 1, {"max.message.bytes": "5000"})])
    record = refused(key, value, tuple(headers))
    broker.producer(client_id="t").send([letter(record, max_bytes=5_000, message=message)])
    read = read_dead_letter(broker.records(LETTERS.topic)[0])
    assert read.length == len(key or b"") + len(value or b"")
    if not read.truncated:
        assert (read.key, read.value) == (key, value)
    if not read.headers_dropped:
        assert read.headers == tuple(headers)


@pytest.mark.parametrize("missing", ["origin-topic", "origin-partition", "origin-offset", "reason", "message"])
def test_what_is_no_dead_letter_is_refused(missing: str) -> None:
    made = letter(refused())
    headers = tuple((name, content) for name, content in made.headers if name != missing)
    with pytest.raises(InvalidRecord, match=missing):
        read_dead_letter(Record(LETTERS, 0, 0, made.key, made.value, headers))


def test_a_malformed_header_is_refused() -> None:
    headers = tuple((n, b"x" if n == "origin-offset" else c) for n, c in letter(refused()).headers)
    with pytest.raises(InvalidRecord, match="malformed"):
        read_dead_letter(Record(LETTERS, 0, 0, None, None, headers))


def test_repr_hides_the_payload() -> None:
    assert "secret" not in repr(read_dead_letter(consumed(letter(refused(b"secret", b"secret")))))


def settings(share: float | None, users: int = 3) -> IngestSettings:
    """Limit over a window of ten records."""
    return IngestSettings(dead_letter_share=share, dead_letter_window_records=10, dead_letter_min_users=users)


def run(share: DeadLetterShare, pattern: str, keys: int) -> int:
    """Note records, ``x`` refused and ``.`` not, keys in turn; return how many passed before the limit."""
    for number, mark in enumerate(pattern):
        try:
            share.note(refused(b"user %d" % (number % keys)), refused=mark == "x")
        except DeadLetterLimitReached:
            return number
    return len(pattern)


@pytest.mark.parametrize(
    ("limit", "pattern", "keys", "passed"),
    [
        (None, "x" * 50, 50, 50),  # off
        (0.5, "x" * 9, 9, 9),  # the window is not full yet
        (0.5, "x" * 50, 50, 9),
        (0.5, "." * 10 + "x" * 10, 50, 14),  # five of the last ten
        (0.5, "." * 10 + ".x..x." * 10, 50, 70),  # a third stays below
        (0.5, "x" * 50, 2, 50),  # too few users
        (1.0, "x" * 9 + "." + "x" * 9, 50, 19),
        (0.1, "x........." + ".........x", 50, 20),  # one key alone is not three
    ],
)
def test_the_limit_needs_share_window_and_users(limit: float | None, pattern: str, keys: int, passed: int) -> None:
    assert run(DeadLetterShare(settings(limit)), pattern, keys) == passed


def test_records_without_a_key_count_as_one_user() -> None:
    share = DeadLetterShare(settings(0.5, users=2))
    for _ in range(30):
        share.note(refused(key=None), refused=True)
    with pytest.raises(DeadLetterLimitReached, match=r"10 of the last 10 records, under 2 keys"):
        share.note(refused(key=b"another"), refused=True)
