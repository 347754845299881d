"""Gauges that come from the store, so that a restart neither doubles nor resets them.

They are read at most every few seconds: counting is cheap but not free.
"""

from oppu.metrics import Metrics
from oppu.store.port import HistoryStore


class StoreGauges:
    """Counts and live quality of the whole store, shown by every ingest worker alike."""

    def __init__(self, store: HistoryStore, metrics: Metrics) -> None:
        self._store, self._metrics = store, metrics
        self._shown: set[tuple[str, str]] = set()

    def refresh(self) -> None:
        """Read the store and set the gauges.

        Raises:
            TransientError: The store cannot be read.
        """
        counts, quality = self._store.counts(), self._store.quality()
        self._metrics.users.set(counts["users"])
        self._metrics.events.set(counts["events"])
        self._metrics.outbox.set(counts["outbox"])
        by_arm = (self._metrics.answered, self._metrics.matched, self._metrics.correct)
        for row in quality:
            for gauge, value in zip(by_arm, (row.answered, row.matched, row.correct), strict=True):
                gauge.labels(row.task, row.arm).set(value)
        now_shown = {(row.task, row.arm) for row in quality}
        for task, arm in self._shown - now_shown:
            for gauge in by_arm:
                gauge.remove(task, arm)
        self._shown = now_shown
