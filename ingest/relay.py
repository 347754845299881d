"""The outbox's relay: rows are sent, and deleted once acknowledged.

A crash between the two sends a row twice; origin coordinates identify it. One process is to send, or a user's head
could come after the tombstone that erased it; one that the group expelled amid a send does not know it yet. A row that
the broker refuses as too large stays, visible in the gauge, and holds up no other, however many of them there are.
"""

import logging
from collections.abc import Sequence
from functools import partial

from oppu.effects import Effect, Steps
from oppu.errors import InvalidRecord, TransientError
from oppu.kafka.port import Broker, Producer
from oppu.store.port import HistoryStore
from oppu.store.records import OutboxRow

logger = logging.getLogger(__name__)

ROWS = 500
"""Rows of one send at most; the store gives fewer where they are large."""


class Relay:
    """Sends the store's outbox."""

    def __init__(self, broker: Broker, store: HistoryStore, *, client_id: str) -> None:
        self._broker, self._store, self._client_id = broker, store, client_id
        self._producer: Producer | None = None
        self._suspect = False
        self._after = 0  # rows up to here stay in this pass: no topic takes them

    def open(self) -> None:
        """Open the producer."""
        if self._producer is None:
            self._producer = self._broker.producer(client_id=self._client_id)

    def close(self) -> None:
        """Release the producer."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close()

    def reopen_if_suspect(self) -> None:
        """Replace a producer whose last send failed: what it still holds must not come after newer rows."""
        if not self._suspect:
            return
        try:
            self.close()
        except TransientError as error:
            logger.warning("the old producer did not close: %s", error)
        self.open()
        self._suspect = False

    def run(self) -> Steps[bool]:
        """Send the oldest rows and delete them; says whether there may be more to send at once."""
        rows = self._store.outbox(ROWS, after=self._after)
        if not rows:
            self._after = 0
            return False
        sent = yield from self._send(rows)
        if sent:
            ids = [row.id for row in sent]
            yield Effect("store.delete_outbox", partial(self._store.delete_outbox, ids), f"{len(ids)} rows")
        if len(sent) < len(rows):
            self._after = rows[-1].id
        return True

    def _send(self, rows: Sequence[OutboxRow]) -> Steps[list[OutboxRow]]:
        producer = self._producer
        if producer is None:
            raise TransientError("the outbox's producer is not open")
        try:
            records = [row.record for row in rows]
            yield Effect("producer.send", partial(producer.send, records), f"{len(rows)} records")
            return list(rows)
        except TransientError:
            self._suspect = True
            raise
        except InvalidRecord as error:
            if len(rows) == 1:
                logger.error("outbox row %d stays: %s takes no record of its size", rows[0].id, rows[0].record.topic)
                return []
            logger.warning("the outbox is sent one by one: %s", error.message)
        sent: list[OutboxRow] = []
        for row in rows:
            sent += yield from self._send([row])
        return sent
