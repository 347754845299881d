"""Readers: what hangs is replaced, up to a limit, comes back without harm, and ends with the process."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from inference import readers as module
from inference.readers import Readers

LONG = 30.0
STUCK = 0.05


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    gate = threading.Event()
    yield gate
    gate.set()


@pytest.fixture
def readers() -> Iterator[Readers]:
    readers = Readers(2, stuck_seconds=STUCK)
    yield readers
    readers.shutdown(cancel_futures=True)


def until(done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + LONG
    while not done() and time.monotonic() < deadline:
        time.sleep(0.005)
    return done()


def test_results_and_errors_arrive(readers: Readers) -> None:
    assert readers.submit(divmod, 7, 2).result(LONG) == (3, 1)
    assert isinstance(readers.submit(int, "x").exception(LONG), ValueError)
    assert list(readers.map(abs, (-1, -2))) == [1, 2]


def test_as_many_hung_reads_as_readers_starve_nobody(readers: Readers, gate: threading.Event) -> None:
    hung = [readers.submit(gate.wait, LONG) for _ in range(2)]
    assert readers.submit(abs, -1).result(LONG) == 1
    assert until(lambda: readers.lost == 2)
    gate.set()
    assert all(future.result(LONG) for future in hung)
    assert until(lambda: readers.lost == 0)
    assert readers.submit(abs, -1).result(LONG) == 1


def test_what_was_queued_behind_hung_reads_needs_no_further_call(readers: Readers, gate: threading.Event) -> None:
    for _ in range(2):
        readers.submit(gate.wait, LONG)
    assert [readers.submit(abs, number) for number in range(5)][-1].result(LONG) == 4


def test_no_more_than_so_many_are_replaced(
    readers: Readers, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_LOST", 3)
    hung = [readers.submit(gate.wait, LONG) for _ in range(8)]
    assert until(lambda: sum(future.running() for future in hung) == 5)
    time.sleep(4 * STUCK)
    assert (readers.lost, sum(future.running() for future in hung)) == (3, 5)
    gate.set()
    assert all(future.result(LONG) for future in hung)
    assert until(lambda: readers.lost == 0)


def test_shut_down_readers_take_nothing_and_drop_what_waits(gate: threading.Event) -> None:
    readers = Readers(2, stuck_seconds=LONG)
    futures = [readers.submit(gate.wait, LONG) for _ in range(4)]
    assert until(lambda: sum(future.running() for future in futures) == 2)
    readers.shutdown(cancel_futures=True)
    assert [future.cancelled() for future in futures] == [False, False, True, True]
    with pytest.raises(RuntimeError):
        readers.submit(abs, 1)


def test_a_hung_read_does_not_keep_the_process_alive() -> None:
    code = "import time; from inference.readers import Readers; Readers(2).submit(time.sleep, 600); time.sleep(0.1)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
