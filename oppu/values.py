"""The values that cross module boundaries: Kafka records with coordinates, events, adapter heads.

Frozen and slotted; texts and user ids are kept out of ``repr`` so that logs cannot leak them.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import NewType

import numpy as np
from numpy.typing import NDArray

UserId = NewType("UserId", str)
EventId = NewType("EventId", str)
RequestId = NewType("RequestId", str)
BaseId = NewType("BaseId", str)
"""Fingerprint of base weights + tokenizer + prompt format; an adapter fits exactly one."""

Headers = tuple[tuple[str, bytes], ...]
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, order=True)
class Partition:
    """One partition of a topic."""

    topic: str
    index: int


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes as they came from Kafka, with their coordinates. ``timestamp_ms`` is the record's Kafka time."""

    partition: Partition
    offset: int
    timestamp_ms: int
    key: bytes | None = field(repr=False)
    value: bytes | None = field(repr=False)
    headers: Headers = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class OutRecord:
    """A record to be produced. The broker chooses the partition by the key (murmur2)."""

    topic: str
    key: bytes | None = field(repr=False)
    value: bytes | None = field(repr=False)
    headers: Headers = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Event:
    """Something a user did, as stored.

    ``seq`` starts at 1 for each user and has no gaps. ``embedding`` is ``[dim] float32`` (unit length) or
    ``None`` where the stored vector came from another embedder. ``recorded_at`` is the Kafka record's time.
    """

    user_id: UserId = field(repr=False)
    seq: int
    event_id: EventId
    task: str
    occurred_at: datetime
    recorded_at: datetime
    input: str = field(repr=False)
    output: str = field(repr=False)
    choices: tuple[str, ...] | None = field(default=None, repr=False)
    in_reply_to: RequestId | None = None
    embedding: Vector | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Head:
    """The adapter version that is served for a user on one base, and what its line has earned (log odds)."""

    version: int
    parent: int | None
    trained_through: int
    epoch: int
    earned: float = 0.0


FIRST_EPOCH = 1
"""The epoch of a user who was never erased."""


@dataclass(frozen=True, slots=True)
class UserState:
    """What a step must know of a user before it reads anything cached: all three in one query."""

    user_id: UserId = field(repr=False)
    epoch: int
    last_seq: int
    head: Head | None
