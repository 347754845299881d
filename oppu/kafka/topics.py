"""The topics the service needs, and how each is configured."""

from oppu.kafka.port import TopicSpec
from oppu.settings import Settings
from oppu.wire import Topics

DEAD_LETTER_OVERHEAD_BYTES = 64 * 1024
"""Room for a dead letter's headers beside an original of the largest accepted size."""


def topic_specs(settings: Settings) -> list[TopicSpec]:
    """Return every topic of the service; size limits follow ``limits.record_bytes``."""
    kafka, topics = settings.kafka, Topics(settings.kafka.topic_prefix)
    safe = {"min.insync.replicas": str(min(kafka.min_insync_replicas, kafka.replication))}
    # four times: an oversized record must reach us to be refused by name, not be lost at the producer
    room = str(max(4 * settings.limits.record_bytes, 2 * 2**20))
    dead = {
        **safe,
        "max.message.bytes": str(int(room) + DEAD_LETTER_OVERHEAD_BYTES),
        "retention.ms": str(kafka.dead_letter_retention_seconds * 1000),
    }
    plain = {**safe, "max.message.bytes": room}

    def spec(name: str, config: dict[str, str]) -> TopicSpec:
        return TopicSpec(name, kafka.partitions, kafka.replication, config)

    return [
        spec(topics.events, plain),
        spec(topics.requests, plain),
        spec(topics.predictions, plain),
        spec(topics.dead_letters, dead),
        spec(topics.updates, {**safe, "cleanup.policy": "compact"}),
    ]
