"""The topics the service needs, and how each is configured."""

from oppu.kafka.port import TopicSpec
from oppu.settings import Settings
from oppu.wire import Topics

DEAD_LETTER_OVERHEAD_BYTES = 64 * 1024
"""Room for a dead letter's headers beside an original of the largest accepted size."""


def largest_record_bytes(settings: Settings) -> int:
    """Return the size of the largest record that may lie on any of our topics.

    Four times the accepted size: an oversized record must reach us to be refused by name, not be lost on the way.
    """
    return max(4 * settings.limits.record_bytes, 2 * 2**20) + DEAD_LETTER_OVERHEAD_BYTES


def topic_specs(settings: Settings) -> list[TopicSpec]:
    """Return every topic of the service; size limits follow ``limits.record_bytes``."""
    kafka, topics = settings.kafka, Topics(settings.kafka.topic_prefix)
    safe = {"min.insync.replicas": str(min(kafka.min_insync_replicas, kafka.replication))}
    largest = largest_record_bytes(settings)
    dead = {
        **safe,
        "max.message.bytes": str(largest),
        "retention.ms": str(kafka.dead_letter_retention_seconds * 1000),
    }
    plain = {**safe, "max.message.bytes": str(largest - DEAD_LETTER_OVERHEAD_BYTES)}
    # Whatever codec an application's producer uses, the broker unpacks it: we need none of their libraries, and what
    # is small only while packed is refused there instead of filling our memory.
    received = {**plain, "compression.type": "uncompressed"}

    def spec(name: str, config: dict[str, str]) -> TopicSpec:
        return TopicSpec(name, kafka.partitions, kafka.replication, config)

    return [
        spec(topics.events, received),
        spec(topics.requests, received),
        spec(topics.predictions, plain),
        spec(topics.dead_letters, dead),
        spec(topics.updates, {**safe, "cleanup.policy": "compact"}),
    ]
