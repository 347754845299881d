"""Adapters in host memory: read once, read ahead, given up in turn, and nobody waits for another's disk."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from inference.host_cache import HostCache
from oppu.errors import AdapterNotReady, AdapterUnreadable
from oppu.lm.port import AdapterRef, AdapterSource, Tensors
from oppu.values import UserId

LONG = 30.0


class Disk(AdapterSource):
    """Counts reads; holds back or refuses those it is told to."""

    def __init__(self) -> None:
        self.reads: list[AdapterRef] = []
        self.gates: dict[AdapterRef, threading.Event] = {}
        self.bad: set[AdapterRef] = set()

    def load(self, ref: AdapterRef) -> Tensors:
        self.reads.append(ref)
        if ref in self.gates:
            assert self.gates[ref].wait(LONG)
        if ref in self.bad:
            raise AdapterUnreadable("torn")
        return {"weight": np.full(2, ref.version, dtype=np.float32)}


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def cache(disk: Disk) -> Iterator[HostCache]:
    cache = HostCache(disk, capacity=3, readers=ThreadPoolExecutor(2))
    yield cache
    for gate in disk.gates.values():
        gate.set()
    cache.close()


def ref(number: int) -> AdapterRef:
    return AdapterRef(UserId("anna"), 0, number)


def test_a_version_is_read_once(disk: Disk) -> None:
    hits = []
    cache = HostCache(disk, capacity=3, readers=ThreadPoolExecutor(1), on_hit=lambda: hits.append(1))
    assert [float(cache.load(ref(7))["weight"][0]) for _ in range(3)] == [7.0] * 3
    assert disk.reads == [ref(7)]
    assert len(hits) == 2


def test_what_is_expected_is_read_ahead_and_once(disk: Disk, cache: HostCache) -> None:
    cache.expect([ref(1), ref(2), ref(1)], wait_seconds=LONG)
    cache.expect([ref(1)], wait_seconds=LONG)
    assert sorted(disk.reads) == [ref(1), ref(2)]
    assert float(cache.load(ref(2))["weight"][0]) == 2.0
    cache.expect([ref(2)], wait_seconds=LONG)
    assert sorted(disk.reads) == [ref(1), ref(2)]


def test_a_slow_read_delays_nobody_else(disk: Disk, cache: HostCache) -> None:
    disk.gates[ref(1)] = threading.Event()
    cache.expect([ref(1), ref(2)], wait_seconds=0.05)
    cache.expect([ref(2)], wait_seconds=LONG)
    assert float(cache.load(ref(2))["weight"][0]) == 2.0
    with pytest.raises(AdapterNotReady, match="version 1"):
        cache.load(ref(1))
    disk.gates[ref(1)].set()
    cache.expect([ref(1)], wait_seconds=LONG)
    assert float(cache.load(ref(1))["weight"][0]) == 1.0


def test_the_least_recently_used_goes_first(disk: Disk, cache: HostCache) -> None:
    for number in (1, 2, 3, 1, 4):
        cache.load(ref(number))
    assert len(cache) == 3
    disk.reads.clear()
    for number in (1, 3, 4, 2):
        cache.load(ref(number))
    assert disk.reads == [ref(2)]


def test_a_failed_read_is_reported_once_and_tried_again(disk: Disk, cache: HostCache) -> None:
    disk.bad.add(ref(1))
    cache.expect([ref(1)], wait_seconds=LONG)
    with pytest.raises(AdapterUnreadable, match="torn"):
        cache.load(ref(1))
    disk.bad.clear()
    assert float(cache.load(ref(1))["weight"][0]) == 1.0


def test_no_more_reads_are_begun_than_there_is_room_for(disk: Disk, cache: HostCache) -> None:
    disk.gates |= {ref(number): threading.Event() for number in range(5)}
    cache.expect(map(ref, range(5)))
    for gate in disk.gates.values():
        gate.set()
    cache.expect(map(ref, range(3)), wait_seconds=LONG)
    assert sorted(disk.reads) == [ref(0), ref(1), ref(2)]


def test_reads_that_nobody_asks_for_hold_up_no_others(disk: Disk, cache: HostCache) -> None:
    for first in range(0, 12, 3):
        cache.expect(map(ref, range(first, first + 3)), wait_seconds=LONG)
    assert sorted(disk.reads) == [ref(number) for number in range(12)]
    cache.expect([ref(20)], wait_seconds=LONG)
    assert len(cache) == 3
    disk.reads.clear()
    assert float(cache.load(ref(20))["weight"][0]) == 20.0
    assert disk.reads == []


def test_failures_that_nobody_asks_for_hold_up_no_others(disk: Disk, cache: HostCache) -> None:
    disk.bad |= {ref(number) for number in range(3)}
    cache.expect(map(ref, range(3)), wait_seconds=LONG)
    cache.expect([ref(7)], wait_seconds=LONG)
    assert disk.reads[-1] == ref(7)
    disk.bad.clear()
    cache.expect([ref(1)], wait_seconds=LONG)
    assert float(cache.load(ref(1))["weight"][0]) == 1.0


def test_a_failure_is_told_while_the_version_is_read_anew(disk: Disk, cache: HostCache) -> None:
    """Or a file whose every read fails late would count as late for ever."""
    disk.bad.add(ref(1))
    cache.expect([ref(1)], wait_seconds=LONG)
    disk.gates[ref(1)] = threading.Event()
    cache.expect([ref(1)])
    with pytest.raises(AdapterUnreadable, match="torn"):
        cache.load(ref(1))
    with pytest.raises(AdapterNotReady):
        cache.load(ref(1))


def test_a_load_that_nobody_expected_waits_for_no_hung_ones(disk: Disk, cache: HostCache) -> None:
    disk.gates |= {ref(number): threading.Event() for number in range(3)}
    cache.expect(map(ref, range(3)))
    with pytest.raises(AdapterNotReady, match="too many"):
        cache.load(ref(9))
    assert ref(9) not in disk.reads
    assert cache.reading(ref(0)) and not cache.known(ref(9))


def test_the_first_load_of_what_was_read_ahead_is_no_hit(disk: Disk) -> None:
    hits = []
    cache = HostCache(disk, capacity=3, readers=ThreadPoolExecutor(1), on_hit=lambda: hits.append(1))
    cache.expect([ref(1)], wait_seconds=LONG)
    cache.load(ref(1))
    assert not hits
    cache.load(ref(1))
    assert len(hits) == 1
