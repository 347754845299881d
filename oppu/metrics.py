"""Every metric, declared once, with its help text; names are ``oppu_<package>_<thing>_<base unit>``.

Label values come from enums or fixed lists; never a user, an offset, a version or an exception's text.
"""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

_STEP = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_STALE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)
_JOB = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """All metrics of one process on one registry (tests make their own)."""

    def __init__(self, registry: CollectorRegistry = REGISTRY, *, shown: tuple[str, ...] = ("oppu_",)) -> None:
        """Declare all metrics.

        Args:
            registry: What ``/metrics`` shows.
            shown: Beginnings of the names that this process shows. What another stage counts would stand here at
                zero for ever, beside the true value.
        """
        self.registry = registry
        self._shown = shown
        c, g, h = self._counter, self._gauge, self._histogram
        # --- every worker
        self.worker_ready = g("oppu_worker_ready", "1 while /readyz would answer 200.", "worker")
        self.worker_retries = c("oppu_worker_retries_total", "Transient errors met, by kind.", "worker", "kind")
        self.worker_rebuilds = c("oppu_worker_client_rebuilds_total", "Stuck consumers rebuilt.", "worker")
        self.worker_step = h("oppu_worker_step_duration_seconds", "One step, effects included.", _STEP, "worker")
        self.lag = g("oppu_worker_lag_records", "Readable records not yet handled.", "worker", "topic", "partition")
        # --- ingest
        self.ingest_records = c("oppu_ingest_records_total", "Records by what became of them.", "outcome")
        self.dead_letters = c("oppu_ingest_dead_letters_total", "Records set aside, by reason.", "reason")
        self.ingest_gap = c("oppu_ingest_gap_records_total", "Records the broker had deleted before we read them.")
        self.embed = h("oppu_ingest_embed_duration_seconds", "Embedding one poll batch.", _STEP)
        self.retrievable = h(
            "oppu_ingest_event_to_retrievable_seconds",
            "From the Kafka record's time to the committed write.",
            _STALE,
        )
        self.outbox = g("oppu_ingest_outbox_records", "Records waiting to be sent.")
        self.users = g("oppu_ingest_users", "Users in the store.")
        self.events = g("oppu_ingest_events", "Events in the store.")
        self.answered = g("oppu_ingest_quality_answers", "Kept answers.", "task", "arm")
        self.matched = g("oppu_ingest_quality_matched", "Kept answers matched with what the user did.", "task", "arm")
        self.correct = g("oppu_ingest_quality_correct", "Matched answers that were right.", "task", "arm")
        # --- updater
        self.due = g("oppu_updater_due_users", "Users with enough new events.")
        self.updates = c("oppu_updater_updates_total", "Update attempts by outcome.", "outcome")
        self.job = h("oppu_updater_job_duration_seconds", "Scoring, training and publishing one tick's users.", _JOB)
        self.train = h("oppu_updater_train_duration_seconds", "Training one tick's users.", _JOB)
        self.trained_events = c("oppu_updater_trained_events_total", "New events trained on.")
        self.served = h(
            "oppu_updater_event_to_served_seconds",
            "From the newest trained event's Kafka time to publishing.",
            _STALE,
        )
        self.transitions = c("oppu_updater_transitions_total", "State changes of the updater.", "state")
        self.lift_events = g("oppu_updater_lift_events", "Events scored with the live adapter and with none.")
        self.lift_loss = g("oppu_updater_lift_loss_nats", "Their summed log loss, by arm.", "arm")
        self.lift_correct = g("oppu_updater_lift_correct", "Their correct answers, by arm.", "arm")
        self.rolled_back = g("oppu_updater_rolled_back_users", "Users held after a rollback.")
        # --- inference
        self.predictions = c("oppu_inference_predictions_total", "Answers.", "task", "status")
        self.errors = c("oppu_inference_errors_total", "Error answers by code.", "code")
        self.degraded = c("oppu_inference_degraded_total", "Parts asked for and not used.", "part", "reason")
        # not "stage": that is the scraped target's own label, and Prometheus would rename ours
        self.inference_stage = h("oppu_inference_stage_duration_seconds", "One poll batch by phase.", _STEP, "phase")
        self.answer_latency = h(
            "oppu_inference_request_to_answer_seconds", "From the request's Kafka time to the commit.", _STALE
        )
        self.bank_resident = g("oppu_inference_bank_adapters", "Adapters in the bank.")
        self.bank_bytes = g("oppu_inference_bank_bytes", "Memory of the bank.")
        self.bank_events = c(
            "oppu_inference_bank_events_total",
            "Bank hits, misses, loads, evictions, finds in host memory, late loads.",
            "event",
        )
        self.adapter_faults = c("oppu_inference_adapter_faults_total", "Adapter versions that could not be read.")
        # --- retriever
        self.index_bytes = g("oppu_retriever_index_bytes", "Memory of all loaded users' views.")
        self.index_users = g("oppu_retriever_index_users", "Users with a loaded view.")
        self.index_events = c("oppu_retriever_index_events_total", "View hits, loads, refreshes, evictions.", "event")

    def _registry_of(self, name: str) -> CollectorRegistry | None:
        return self.registry if name.startswith(self._shown) else None

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry_of(name))

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry_of(name))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, registry=self._registry_of(name), buckets=buckets)


def fresh() -> Metrics:
    """Return metrics on a registry of their own."""
    return Metrics(CollectorRegistry())
