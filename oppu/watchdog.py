"""Lag by partition, and the judgement that a consumer is stuck: records wait, and polls bring nothing.

Pure but for the gauges: the loop passes end offsets and the time. A partition's position is what the loop has
handled; before anything was, it is the end offset first seen, so that only growth counts there.
"""

from collections.abc import Mapping

from prometheus_client import Gauge

from oppu.values import Partition

MARKER_RECORDS = 1
"""A transactional topic ends with a control marker, which has an offset and is never delivered: a lag of one."""


class Watchdog:
    """Keeps positions and lag of the partitions held now."""

    def __init__(self, gauge: Gauge, worker: str, *, stuck_after_seconds: float) -> None:
        self._gauge = gauge
        self._worker = worker
        self._stuck_after = stuck_after_seconds
        self._positions: dict[Partition, int] = {}
        self._shown: set[Partition] = set()
        self._quiet_since: float | None = None

    def handled(self, next_offsets: Mapping[Partition, int]) -> None:
        """Note how far partitions have been handled."""
        self._positions.update(next_offsets)

    def heard(self) -> None:
        """Note that polls bring something, or that nothing is expected of them."""
        self._quiet_since = None

    def forget_positions(self) -> None:
        """Forget positions that a seek may have made untrue; what waits now does not count as waiting again."""
        self._positions.clear()
        self._quiet_since = None

    def keep_only(self, assigned: frozenset[Partition]) -> None:
        """Drop position and gauge of partitions that are held no more."""
        for partition in self._positions.keys() - assigned:
            del self._positions[partition]
        for partition in self._shown - assigned:
            self._gauge.remove(self._worker, partition.topic, str(partition.index))
        self._shown &= assigned

    def stuck(self, ends: Mapping[Partition, int], now: float) -> bool:
        """Update the gauges and judge.

        Args:
            ends: End offsets of the partitions held now.
            now: Monotonic time.

        Returns:
            Whether records have been waiting, and polls silent, for the configured time.
        """
        waiting = False
        for partition, end in ends.items():
            lag = max(0, end - self._positions.setdefault(partition, end))
            self._gauge.labels(self._worker, partition.topic, str(partition.index)).set(lag)
            self._shown.add(partition)
            waiting = waiting or lag > MARKER_RECORDS
        if not waiting:
            self._quiet_since = None
            return False
        if self._quiet_since is None:
            self._quiet_since = now
        return now - self._quiet_since >= self._stuck_after

    def close(self) -> None:
        """Remove every gauge."""
        self.keep_only(frozenset())
