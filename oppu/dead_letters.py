"""Dead letters: a record set aside with its bytes unchanged, where it came from, and why.

Pure. Invariant: a dead letter fits its topic whatever the original was, and says when it had to be cut; only a
letter that is whole can be replayed. Also decides when so many records are refused that the input must be broken.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field

from oppu.errors import ConfigError, DeadLetterLimitReached, InvalidRecord, Reason
from oppu.settings import IngestSettings
from oppu.values import Headers, OutRecord, Partition, Record

ORIGIN_TOPIC = "origin-topic"
ORIGIN_PARTITION = "origin-partition"
ORIGIN_OFFSET = "origin-offset"
ORIGIN_TIMESTAMP = "origin-timestamp"
REASON = "reason"
MESSAGE = "message"
TRUNCATED = "truncated"
LENGTH = "length"
SHA256 = "sha256"
HEADERS_DROPPED = "headers-dropped"
ORIGINAL = "original."
"""Before the names of the original's own headers, so that theirs are never taken for ours."""

MAX_MESSAGE_BYTES = 2_048

FRAME_BYTES = 512
"""Room for Kafka's framing of the batch and of each of our headers."""

HEADER_FRAME_BYTES = 10
"""The lengths that Kafka writes beside one header, at most."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter, as read back.

    Attributes:
        at: Where the letter itself lies, as (partition, offset) of the dead-letters topic.
        origin: Where the original lay.
        length: Bytes of the original's key and value.
        truncated: Whether key or value were cut.
        headers_dropped: Whether headers of the original had no room.
    """

    at: tuple[Partition, int]
    origin: Partition
    origin_offset: int
    origin_timestamp_ms: int
    reason: str
    message: str
    length: int
    truncated: bool
    headers_dropped: bool
    key: bytes | None = field(repr=False)
    value: bytes | None = field(repr=False)
    headers: Headers = field(default=(), repr=False)

    def replay(self) -> OutRecord:
        """Return the original, to be produced where it came from.

        Returns:
            The record with its own headers.

        Raises:
            ConfigError: It was cut, so that what is left is not what was sent.
        """
        if self.truncated:
            raise ConfigError(
                f"{self.origin.topic}[{self.origin.index}]@{self.origin_offset}: the dead letter holds only part of"
                f" {self.length} bytes and cannot be replayed"
            )
        return OutRecord(self.origin.topic, self.key, self.value, self.headers)


def dead_letter(record: Record, reason: Reason, message: str, *, topic: str, max_bytes: int) -> OutRecord:
    """Make the dead letter of a record.

    Args:
        record: The refused record.
        reason: Why, for machines.
        message: Why, for people; never quotes the payload. Cut where it is very long.
        topic: The dead-letters topic.
        max_bytes: What that topic accepts as ``max.message.bytes``.

    Returns:
        A record with the original's key and value, cut only where they do not fit, and with the original's headers
        after ours, dropped only where they do not fit.
    """
    headers: Headers = (
        (ORIGIN_TOPIC, record.partition.topic.encode()),
        (ORIGIN_PARTITION, b"%d" % record.partition.index),
        (ORIGIN_OFFSET, b"%d" % record.offset),
        (ORIGIN_TIMESTAMP, b"%d" % record.timestamp_ms),
        (REASON, reason.value.encode()),
        (MESSAGE, _cut_text(message, MAX_MESSAGE_BYTES)),
    )
    key, value = record.key, record.value
    room = max_bytes - FRAME_BYTES - _size(headers)
    if len(key or b"") + len(value or b"") > room:
        headers += _cut_marks(key, value)
        room = max(0, max_bytes - FRAME_BYTES - _size(headers))
        key = None if key is None else key[: room // 2]
        value = None if value is None else value[: room - len(key or b"")]
    room -= len(key or b"") + len(value or b"")
    originals = tuple((ORIGINAL + name, content) for name, content in record.headers)
    if _size(originals) <= room:
        headers += originals
    else:
        headers += ((HEADERS_DROPPED, b"1"),)
    return OutRecord(topic, key, value, headers)


def read_dead_letter(record: Record) -> DeadLetter:
    """Read a record of the dead-letters topic.

    Args:
        record: As consumed.

    Returns:
        The letter.

    Raises:
        InvalidRecord: It is not one of ours: a header is missing or malformed.
    """
    ours = {name: content for name, content in record.headers if not name.startswith(ORIGINAL)}
    try:
        origin = Partition(ours[ORIGIN_TOPIC].decode(), int(ours[ORIGIN_PARTITION]))
        return DeadLetter(
            at=(record.partition, record.offset),
            origin=origin,
            origin_offset=int(ours[ORIGIN_OFFSET]),
            origin_timestamp_ms=int(ours[ORIGIN_TIMESTAMP]),
            reason=ours[REASON].decode(),
            message=ours[MESSAGE].decode(),
            length=int(ours.get(LENGTH, len(record.key or b"") + len(record.value or b""))),
            truncated=TRUNCATED in ours,
            headers_dropped=HEADERS_DROPPED in ours,
            key=record.key,
            value=record.value,
            headers=tuple((n.removeprefix(ORIGINAL), c) for n, c in record.headers if n.startswith(ORIGINAL)),
        )
    except KeyError as error:
        raise InvalidRecord(Reason.INVALID_RECORD, f"dead letter: header {error.args[0]} is missing") from error
    except ValueError as error:
        raise InvalidRecord(Reason.INVALID_RECORD, "dead letter: a header is malformed") from error


class DeadLetterShare:
    """Watches the share of refused records in a window of the latest ones, where a limit is set.

    One user who sends rubbish must not stop the service: the refused records must also bear enough distinct keys.
    """

    def __init__(self, settings: IngestSettings) -> None:
        """Begin with an empty window.

        Args:
            settings: ``dead_letter_share`` (none = never), ``dead_letter_window_records``,
                ``dead_letter_min_users``.
        """
        self._settings = settings
        self._window: deque[tuple[bool, bytes | None]] = deque(maxlen=settings.dead_letter_window_records)

    def note(self, record: Record, *, refused: bool) -> None:
        """Count one record.

        Args:
            record: Any record that was handled.
            refused: Whether it became a dead letter.

        Raises:
            DeadLetterLimitReached: With this record the window is full and its share of refused records, over
                enough keys, has reached the limit.
        """
        limit = self._settings.dead_letter_share
        if limit is None:
            return
        self._window.append((refused, _fingerprint(record.key) if refused else None))
        if not refused or len(self._window) < self._settings.dead_letter_window_records:
            return
        keys = [key for was_refused, key in self._window if was_refused]
        share, users = len(keys) / len(self._window), len(set(keys))
        if share >= limit and users >= self._settings.dead_letter_min_users:
            raise DeadLetterLimitReached(
                f"{len(keys)} of the last {len(self._window)} records, under {users} keys, were refused: the limit"
                f" ingest.dead_letter_share is {limit:g}"
            )


def _fingerprint(key: bytes | None) -> bytes | None:
    """Bound what the window keeps of a key that may be of any length."""
    return None if key is None else hashlib.sha256(key).digest()[:8]


def _cut_marks(key: bytes | None, value: bytes | None) -> Headers:
    digest = hashlib.sha256(value or b"").hexdigest().encode()
    length = len(key or b"") + len(value or b"")
    return ((TRUNCATED, b"1"), (LENGTH, b"%d" % length), (SHA256, digest))


def _cut_text(text: str, limit: int) -> bytes:
    encoded = text.encode("utf-8", "replace")
    return encoded if len(encoded) <= limit else encoded[:limit].decode("utf-8", "ignore").encode()


def _size(headers: Headers) -> int:
    return sum(HEADER_FRAME_BYTES + len(name.encode()) + len(content) for name, content in headers)
