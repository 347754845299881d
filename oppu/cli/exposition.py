"""What each worker's ``/metrics`` shows: its own metrics, and every known label value from the start, at zero.

A counter that appears with its first increment shows "no data" while all is well, and ``increase`` and ``rate``
miss that first increment. The label values are enums of the stages, so this is the composition root's.
"""

from collections.abc import Iterator, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter

from oppu.errors import ConfigError, OffsetConflict, OffsetOutOfRange, ProducerFenced, Reason, TransientError
from oppu.metrics import Metrics

_SHOWN = {
    "ingest": ("oppu_worker_", "oppu_ingest_"),
    "updater": ("oppu_worker_", "oppu_updater_", "oppu_retriever_"),
    "inference": ("oppu_worker_", "oppu_inference_", "oppu_retriever_", "oppu_ingest_dead_letters_"),
}
Child = tuple[Counter, Sequence[str]]


def metrics_of(worker: str, tasks: Sequence[str], registry: CollectorRegistry = REGISTRY) -> Metrics:
    """Declare one worker's metrics and set its counters to zero.

    Args:
        worker: ``ingest``, ``updater`` or ``inference``, as in the label ``worker``.
        tasks: Names of the known tasks.
        registry: What ``/metrics`` shows.

    Returns:
        The metrics.

    Raises:
        ConfigError: No worker is called so.
    """
    if worker not in _SHOWN:
        raise ConfigError(f"worker: expected one of {', '.join(_SHOWN)}, got {worker}")
    metrics = Metrics(registry, shown=_SHOWN[worker])
    metrics.worker_ready.labels(worker).set(0)
    for counter, labels in _children(worker, tasks, metrics):
        counter.labels(*labels)
    return metrics


def _children(worker: str, tasks: Sequence[str], metrics: Metrics) -> Iterator[Child]:
    yield metrics.worker_retries, (worker, TransientError.__name__)
    if worker == "updater":
        yield from _updater(metrics)
        return
    yield metrics.worker_rebuilds, (worker,)
    for kind in (OffsetConflict, ProducerFenced, OffsetOutOfRange):
        yield metrics.worker_retries, (worker, kind.__name__)
    for reason in Reason:
        yield metrics.dead_letters, (reason,)
    yield from _ingest(metrics) if worker == "ingest" else _inference(tasks, metrics)


def _ingest(metrics: Metrics) -> Iterator[Child]:
    from ingest.step import Outcome

    for outcome in Outcome:
        yield metrics.ingest_records, (outcome,)


def _updater(metrics: Metrics) -> Iterator[Child]:
    from updater.job import Ended
    from updater.state import State

    for ended in Ended:
        yield metrics.updates, (ended,)
    for state in State:
        yield metrics.transitions, (state,)


def _inference(tasks: Sequence[str], metrics: Metrics) -> Iterator[Child]:
    from inference.adapters import Fallback
    from inference.answers import EMPTY_GENERATION, UNKNOWN
    from retriever.port import Degradation

    for task in tasks:
        yield metrics.predictions, (task, "ok")
        yield metrics.predictions, (task, "error")
    yield metrics.predictions, (UNKNOWN, "error")
    for code in (*Reason, EMPTY_GENERATION):
        yield metrics.errors, (code,)
    for reason in Degradation:
        yield metrics.degraded, ("retrieval", reason)
    for part in ("history", "profile"):
        yield metrics.degraded, (part, Degradation.HISTORY_BEHIND)
    for fallback in Fallback:
        yield metrics.degraded, ("adapter", fallback)
    for event in ("hit", "miss", "load", "evict", "host_hit", "late"):
        yield metrics.bank_events, (event,)
