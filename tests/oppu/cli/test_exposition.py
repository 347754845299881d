"""Each worker shows its own metrics and no other's, and its counters before anything was counted."""

import pytest
from prometheus_client import CollectorRegistry

from oppu.cli.exposition import metrics_of
from oppu.errors import ConfigError, Reason

SHOWN = {
    "ingest": {"worker", "ingest"},
    "updater": {"worker", "updater", "retriever"},
    "inference": {"worker", "inference", "retriever", "ingest"},  # it dead-letters too
}


def samples(worker: str) -> dict[str, set[tuple[str, ...]]]:
    registry = CollectorRegistry()
    metrics_of(worker, ["mood"], registry)
    found: dict[str, set[tuple[str, ...]]] = {}
    for family in registry.collect():
        for sample in family.samples:
            assert sample.value == 0 or sample.name.endswith("_created")
            found.setdefault(sample.name, set()).add(tuple(sample.labels.values()))
    return found


@pytest.mark.parametrize("worker", SHOWN)
def test_own_metrics_alone(worker: str) -> None:
    names = samples(worker)
    assert {name.split("_")[1] for name in names} == SHOWN[worker]
    assert ("oppu_ingest_users" in names) == (worker == "ingest")
    assert (worker,) in names["oppu_worker_ready"]


def test_counters_are_there_before_they_count() -> None:
    refusals = {(str(reason),) for reason in Reason}
    ingest, updater, inference = (samples(worker) for worker in SHOWN)
    assert ingest["oppu_ingest_dead_letters_total"] == inference["oppu_ingest_dead_letters_total"] == refusals
    assert ("written",) in ingest["oppu_ingest_records_total"]
    assert {("published",), ("failed",)} <= updater["oppu_updater_updates_total"]
    assert inference["oppu_inference_errors_total"] > refusals
    assert {("mood", "ok"), ("mood", "error"), ("unknown", "error")} == inference["oppu_inference_predictions_total"]
    assert ("adapter", "unreadable_used_base") in inference["oppu_inference_degraded_total"]


def test_unknown_worker() -> None:
    with pytest.raises(ConfigError, match="expected one of ingest, updater, inference"):
        metrics_of("baker", [], CollectorRegistry())
