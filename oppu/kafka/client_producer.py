"""Producers on kafka-python: a plain idempotent one, and a transactional one.

Invariant: a client in doubt is never used again. After a failure the plain producer throws its client away, so
that no record of a send that was reported as failed is written later; the transactional one refuses to begin.
No call waits for longer than the request timeout, which the library's own transaction calls may do for ever.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError
from kafka.serializer import Serializer
from kafka.structs import OffsetAndMetadata

from oppu.errors import InvalidRecord, OppuError, ProducerFenced
from oppu.kafka.client_consumer import theirs
from oppu.kafka.client_errors import translate, translated
from oppu.kafka.port import GroupMetadata, Produced
from oppu.values import OutRecord, Partition

logger = logging.getLogger(__name__)

Open = Callable[[], KafkaProducer]

CLOSE_SECONDS = 3.0


class NullableBytes(Serializer):  # type: ignore[misc]  # kafka-python has no types
    """Lets a record have neither key nor value, as other clients may write: the library's own check forbids it."""

    def serialize(self, topic: str, headers: list[tuple[str, bytes]], data: Any) -> bytes | None:
        """Return the bytes, ``None`` for the stand-in of a missing value."""
        return None if data is _NOTHING else data


_NOTHING = object()


class KafkaPlainProducer:
    """Sends records and waits for their acknowledgement (the port's ``Producer``)."""

    def __init__(self, open_client: Open, timeout_seconds: float) -> None:
        self._open = open_client
        self._timeout = timeout_seconds
        self._client: KafkaProducer | None = open_client()

    def send(self, records: Sequence[OutRecord]) -> list[Produced]:
        """Send and wait until all are acknowledged."""
        if not records:
            return []
        if self._client is None:
            self._client = self._open()
        futures, refused = _enqueue(self._client, records)
        failed = _settle(self._client, futures, self._timeout)
        if failed is not None or (refused is not None and not isinstance(refused, InvalidRecord)):
            # whatever the broker's reason, the library's idempotent state may be beyond use after it
            discard(self._client)
            self._client = None
        error = failed or refused
        if error is not None:
            raise error
        return [_produced(future.value) for future in futures]

    def close(self) -> None:
        """Release the connection."""
        if self._client is not None:
            discard(self._client, CLOSE_SECONDS)
            self._client = None


class KafkaTransactions:
    """One transaction at a time under a stable ``transactional.id`` (the port's ``TransactionalProducer``)."""

    def __init__(self, open_client: Open, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self._futures: list[Any] = []
        self._open = False
        self._error: OppuError | None = None
        self._dead: OppuError | None = None
        self._tainted = False
        self._client = open_client()
        # The library answers "your epoch is stale" by taking a new one on its own account. A zombie would fence its
        # successor with that; without the ability it stops, as it must.
        self._client._transaction_manager._supports_epoch_bump = _never  # noqa: SLF001
        try:
            with translated():
                self._client.init_transactions()
        except OppuError:
            discard(self._client)
            raise

    def begin(self) -> None:
        """Open a transaction; raises ``ProducerFenced`` where this producer cannot be used again."""
        if self._dead is not None:
            raise ProducerFenced(f"this producer is spent, open another: {self._dead}") from self._dead
        self._run(self._client.begin_transaction)
        self._open, self._futures, self._error = True, [], None

    def send(self, records: Sequence[OutRecord]) -> None:
        """Add records to the transaction; acknowledged at the latest by :meth:`commit`."""
        self._require_sound()
        futures, error = _enqueue(self._client, records)
        self._futures += futures
        if error is not None:
            raise self._failed(error)

    def send_offsets(self, offsets: Mapping[Partition, int], group: GroupMetadata) -> None:
        """Add the group's next offsets to the transaction."""
        self._require_sound()
        if group.raw is None:
            # Kafka takes offsets under generation -1 from anybody, without any fencing
            raise self._failed(ProducerFenced(f"not a member of group {group.group_id} yet"))
        if not offsets:
            return
        moved = {theirs(partition): OffsetAndMetadata(n, "") for partition, n in offsets.items()}
        manager = self._client._transaction_manager  # noqa: SLF001 - see _await
        self._await(lambda: manager.send_offsets_to_transaction(moved, group.raw))

    def commit(self) -> None:
        """Make records and offsets visible together."""
        self._require_sound()
        error = _settle(self._client, self._futures, self._timeout)
        if error is not None:
            self._tainted = True
            raise self._failed(self._cause(error))
        self._await(self._client._transaction_manager.begin_commit)  # noqa: SLF001 - see _await
        self._open, self._futures = False, []

    def abort(self) -> None:
        """Drop the transaction; where that cannot be done cleanly, this producer is spent."""
        if not self._open:
            return
        self._open, self._futures = False, []
        if self._dead is not None or isinstance(self._error, ProducerFenced) and not self._abortable():
            self._spend(self._dead or self._error)
            return
        try:
            self._await(self._client._transaction_manager.begin_abort)  # noqa: SLF001 - see _await
        except OppuError as error:
            # the broker aborts it when a successor opens, or after the transaction timeout
            logger.warning("transaction could not be aborted, giving up this producer: %s", error)
            self._spend(error)
            return
        if self._tainted:
            # the client does not rewind its sequence numbers past a batch that the broker refused
            self._spend(self._error)

    def close(self) -> None:
        """Abort what is open and release the connection."""
        self.abort()
        if self._dead is None:
            discard(self._client, CLOSE_SECONDS)
            self._dead = ProducerFenced("closed")

    def _abortable(self) -> bool:
        """A stale generation leaves the producer itself sound."""
        return bool(self._client._transaction_manager.has_abortable_error())  # noqa: SLF001 - not public

    def _require_sound(self) -> None:
        if not self._open:
            raise ProducerFenced("no transaction is open")
        if self._error is not None:
            raise self._error

    def _run(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (KafkaError, OSError, RuntimeError) as error:
            raise self._failed(self._cause(translate(error))) from error

    def _await(self, begin: Callable[[], Any]) -> None:
        """Start a step of the transaction and wait for its result.

        The library's public calls do just this, but without a limit: they would hang as long as the broker does.
        """

        def wait() -> None:
            result = begin()
            self._client._sender.wakeup()  # noqa: SLF001
            if not result.wait(timeout_ms=self._timeout * 1000):
                self._dead = translate(KafkaTimeoutError(f"no answer in {self._timeout:g} s"))
                raise self._dead

        self._run(wait)

    def _cause(self, error: OppuError) -> OppuError:
        """Prefer what broke the transaction over the library's "cannot execute, we are in an error state"."""
        last = self._client._transaction_manager.last_error  # noqa: SLF001
        return error if last is None else translate(last)

    def _failed(self, error: OppuError) -> OppuError:
        self._error = error
        return error

    def _spend(self, error: OppuError | None) -> None:
        self._dead = error or ProducerFenced("closed")
        discard(self._client)


def _never() -> bool:
    return False


def discard(client: KafkaProducer, timeout_seconds: float = 0.0) -> None:
    """Close a client within a time, giving up what it has not sent."""
    try:
        client.close(timeout=timeout_seconds)
    except KafkaError:
        # close() gives up half-way where its flush does not finish; its thread and sockets must go nevertheless
        client._sender.force_close()  # noqa: SLF001
        client._sender.join(CLOSE_SECONDS)  # noqa: SLF001
    else:
        client._sender.join(CLOSE_SECONDS)  # noqa: SLF001


def _enqueue(client: KafkaProducer, records: Sequence[OutRecord]) -> tuple[list[Any], OppuError | None]:
    """Hand the records to the client, up to the first that it refuses."""
    futures: list[Any] = []
    try:
        with translated():
            for record in records:
                value = _NOTHING if record.value is None else record.value
                headers = list(record.headers)
                futures.append(client.send(record.topic, value=value, key=record.key, headers=headers))
    except OppuError as error:
        return futures, error
    return futures, None


def _settle(client: KafkaProducer, futures: Sequence[Any], timeout_seconds: float) -> OppuError | None:
    """Wait for the acknowledgements; return the first error."""
    if not futures:
        return None
    deadline = time.monotonic() + timeout_seconds
    try:
        with translated():
            client.flush(timeout=timeout_seconds)
            for future in futures:
                future.get(timeout=max(0.0, deadline - time.monotonic()))
    except OppuError as error:
        return error
    return None


def _produced(metadata: Any) -> Produced:
    return Produced(Partition(metadata.topic, metadata.partition), metadata.offset)
