"""kafka-python's errors as ours: the type says whether to retry, to rejoin, to set one record aside, or to stop.

Invariant: no exception of the client library leaves the modules ``oppu.kafka.client*``. What no table names is
transient, because a broker that misbehaves for now must never stop a worker for good.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from kafka import errors as k

from oppu.errors import (
    FatalError,
    InvalidRecord,
    OffsetOutOfRange,
    OppuError,
    ProducerFenced,
    Reason,
    TransientError,
)

FENCED: tuple[type[Exception], ...] = (
    k.ProducerFencedError,
    k.InvalidProducerEpochError,
    k.InvalidProducerIdMappingError,
    k.UnknownProducerIdError,
    k.InvalidTxnStateError,
    k.TransactionCoordinatorFencedError,
    k.IllegalGenerationError,
    k.UnknownMemberIdError,
    k.FencedInstanceIdError,
    k.FencedMemberEpochError,
    k.StaleMemberEpochError,
    k.CommitFailedError,
)
"""Somebody newer took over, or the group moved on: drop the work, open a new producer, rejoin."""

FATAL: tuple[type[Exception], ...] = (
    k.AuthorizationError,
    k.SaslAuthenticationFailedError,
    k.UnsupportedSaslMechanismError,
    k.IllegalSaslStateError,
    k.SecurityDisabledError,
    k.UnsupportedVersionError,
    k.UnsupportedForMessageFormatError,
    k.UnsupportedCodecError,
    k.UnsupportedCompressionTypeError,
    k.UnrecognizedBrokerVersion,
    k.KafkaConfigurationError,
    k.InvalidConfigurationError,
    k.IllegalArgumentError,
    k.InvalidTopicError,
    k.InvalidGroupIdError,
    k.InvalidSessionTimeoutError,
    k.InvalidTransactionTimeoutError,
    k.InvalidReplicationFactorError,
    k.InvalidPartitionsError,
    k.PolicyViolationError,
    k.InconsistentGroupProtocolError,
)
"""Only an operator can change what these say; trying again cannot."""

TOO_LARGE: tuple[type[Exception], ...] = (k.MessageSizeTooLargeError, k.RecordListTooLargeError)

UNACCEPTABLE: tuple[type[Exception], ...] = (k.InvalidRecordError, k.InvalidTimestampError)
"""The broker refuses this one record whatever happens, such as one without a key on a compacted topic."""


def translate(error: Exception) -> OppuError:
    """Return our error for one of kafka-python's.

    Args:
        error: Any exception that the client library raised.

    Returns:
        Ours, to be raised ``from`` the original; an error that already is ours comes back as it is.
    """
    if isinstance(error, OppuError):
        return error
    if isinstance(error, k.OffsetOutOfRangeError):
        return OffsetOutOfRange(_positions(error))
    if isinstance(error, TOO_LARGE):
        return InvalidRecord(Reason.LIMIT_EXCEEDED, "record: larger than the topic or the producer takes")
    if isinstance(error, UNACCEPTABLE):
        return InvalidRecord(Reason.INVALID_RECORD, f"record: refused by the broker ({type(error).__name__})")
    if isinstance(error, FENCED):
        return ProducerFenced(str(error))
    if isinstance(error, FATAL):
        return FatalError(f"Kafka refuses us: {error}")
    return TransientError(f"Kafka: {error or type(error).__name__}")


@contextmanager
def translated() -> Iterator[None]:
    """Turn what leaves the block into our errors.

    ``OSError`` is a broken connection, and ``RuntimeError`` what the library raises where its network loop was
    closed under a call: both are worth another try with a new client.
    """
    try:
        yield
    except (k.KafkaError, OSError, RuntimeError) as error:
        raise translate(error) from error


def _positions(error: Exception) -> dict[tuple[str, int], int]:
    offsets = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
    return {(tp.topic, tp.partition): offset for tp, offset in offsets.items()}
