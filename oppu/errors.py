"""The error tree: the type of an error tells the worker loop what to do with it.

Every third-party error becomes one of these in the module that wraps its library, with ``raise … from``.
"""

from enum import StrEnum


class OppuError(Exception):
    """Root of every error that this project raises on purpose."""


class ConfigError(OppuError):
    """The configuration or a command's input is wrong: exit 2 before any connection is made.

    Args:
        *problems: Every fault found, each naming the setting and what is expected.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


class Reason(StrEnum):
    """Why a record was refused: a dead letter's ``reason`` header and an error answer's code."""

    INVALID_UTF8 = "invalid_utf8"
    INVALID_JSON = "invalid_json"
    INVALID_RECORD = "invalid_record"
    UNSUPPORTED_VERSION = "unsupported_version"
    KEY_MISMATCH = "key_mismatch"
    UNKNOWN_TASK = "unknown_task"
    UNKNOWN_LABEL = "unknown_label"
    INVALID_TIME = "invalid_time"
    LIMIT_EXCEEDED = "limit_exceeded"
    DUPLICATE_CONFLICT = "duplicate_conflict"
    WORKER_CRASHED = "worker_crashed"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    INTERNAL_ERROR = "internal_error"


class InvalidRecord(OppuError):
    """One record cannot be accepted: it is dead-lettered or answered with an error, and the loop moves on.

    Args:
        reason: The machine-readable cause.
        message: Names the field and what is expected; never quotes the payload.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        self.reason = reason
        self.message = message
        super().__init__(f"{reason}: {message}")


class TransientError(OppuError):
    """Broker, store or registry is unavailable for now: retried for ever with capped backoff."""


class OffsetConflict(TransientError):
    """Another worker moved this partition's ``next_offset``: drop the records, reread, seek."""


class ProducerFenced(TransientError):
    """A newer producer holds this ``transactional.id``, or the group generation is stale: rejoin afresh."""


class OffsetOutOfRange(TransientError):
    """The position lies outside what the broker still holds.

    Args:
        offsets: The offending position of each partition, as ``{(topic, index): offset}``.
    """

    def __init__(self, offsets: dict[tuple[str, int], int]) -> None:
        self.offsets = offsets
        super().__init__(f"offset out of range: {offsets}")


class StoreRefused(OppuError):
    """The store refuses what was to be written, and would again: what it is about has to be found and set aside."""


class Backpressure(OppuError):
    """Not now: pause the partitions and keep the records.

    Args:
        retry_after_seconds: When to try again.
    """

    def __init__(self, retry_after_seconds: float) -> None:
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"retry after {retry_after_seconds:g} s")


class AdapterUnreadable(OppuError):
    """An adapter version's files are missing, truncated, tampered with, or made for another base."""


class AdapterNotReady(OppuError):
    """An adapter version is being read and has not arrived yet."""


class FatalError(OppuError):
    """The worker must stop without committing and exit 1."""


class ModelLost(FatalError):
    """The model computes nothing any more in this process, as after a device's fault: maybe a record did it, so that
    to stop here counts as a death."""


class DeadLetterLimitReached(FatalError):
    """The share of refused records over many users passed the configured limit: the input is broken."""


class OffsetIdentityChanged(FatalError):
    """The stored offset belongs to another topic or lies beyond its end; the message names the command."""


class IllegalTransition(FatalError):
    """A state machine was asked to take an edge that its table does not have."""
