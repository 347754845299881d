"""Parts of one call side by side on a CPU's cores, where one forward on all of them leaves some idle.

Of a small base every product is over in microseconds, and most of what lies between products runs on one core; forwards
on threads of their own meet only at the end (``python -m benchmarks.streams``). They are few, since between products
Python runs one thread at a time.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Self

import torch

logger = logging.getLogger(__name__)

MOST = 4
"""Streams; with more cores each has several."""
_TOKENS = 512
"""Least tokens of a stream's part: with fewer, products on one core are slow too, and Python's share grows."""
_UNEVEN = 1.25
"""Most of a part, over the mean: what one stream does while the others have ended takes longer than on all cores."""
_START_SECONDS = 30.0
_STARTING = threading.Lock()


class OfThread(threading.local):
    """What each thread has of its own for the forwards it runs. With a copy of a model comes one without anything."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return type(self)()


class Streams:
    """Threads that take parts of a call, each with its share of torch's threads. One call at a time."""

    def __init__(self, device: torch.device) -> None:
        """Start the threads.

        Args:
            device: Where the base is; only a CPU has streams, which share as many threads as torch has now.
        """
        self._device = device
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        self.count = min(MOST, threads)
        """Parts of a call that is divided; 1: none is."""
        self._pool: ThreadPoolExecutor | None = None
        if self.count > 1:
            try:
                self._pool = _started(self.count, threads)
            except RuntimeError as error:
                logger.warning("nothing is computed side by side, for want of threads: %s", error)
                self.count = 1

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return type(self)(self._device)

    def close(self) -> None:
        """End the threads; from then on nothing is divided."""
        self.count = 1
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def parts(self, tokens: Sequence[int], alike: Sequence[Hashable] = ()) -> list[list[int]]:
        """Divide what is to be computed into parts of about as many tokens, long and short ones in each.

        Args:
            tokens: Of each item.
            alike: Of each item, what it shares with others that are best computed beside it; none: nothing.

        Returns:
            Numbers of items, every number once: a list a stream, or one list where that is too little work for all
            streams, or cannot be divided evenly.
        """
        groups: dict[Hashable, list[int]] = {}
        for number, key in enumerate(alike or range(len(tokens))):
            groups.setdefault(key, []).append(number)
        total, whole = sum(tokens), [list(range(len(tokens)))]
        if self.count == 1 or total < self.count * _TOKENS or len(groups) < self.count:
            return whole
        sums = {key: sum(tokens[number] for number in group) for key, group in groups.items()}
        parts, taken = [list[int]() for _ in range(self.count)], [0] * self.count
        for key in sorted(groups, key=lambda key: -sums[key]):
            least = min(range(self.count), key=lambda part: (taken[part], len(parts[part])))
            parts[least] += groups[key]
            taken[least] += sums[key]
        return parts if max(taken) * self.count <= _UNEVEN * total else whole

    def run(
        self,
        work: Callable[[Sequence[int]], None],
        parts: Sequence[Sequence[int]],
        stop: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        """Do the work on each part at the same time, with gradients if the caller has them.

        Args:
            work: Called once a part; where there are several, on other threads than the caller's.
            parts: As ``parts`` returned them.
            stop: Told where the caller is interrupted, so that the parts can end soon: they are waited for.

        Raises:
            Exception: What the work raised on the first part that failed; the others have ended by then.
        """
        if len(parts) == 1 or self._pool is None:
            for part in parts:
                work(part)
            return
        gradients = torch.set_grad_enabled(torch.is_grad_enabled())  # a thread's own, as its number of threads is
        running = [self._pool.submit(gradients(work), part) for part in parts]
        try:
            wait(running)
        except BaseException as error:
            stop(error)
            for one in running:
                one.cancel()
            wait(running)  # what they use is taken away next
            raise
        errors = [failure for one in running if (failure := one.exception()) is not None]
        for failure in errors[1:]:
            logger.warning("another part failed too: %s: %s", type(failure).__name__, failure)
        if errors:
            raise errors[0]


def _started(count: int, threads: int) -> ThreadPoolExecutor:
    """Return threads that have been told how many of torch's each has; nobody else's number changes. Where the system
    gives no more threads, RuntimeError."""
    shares = iter(range(count))
    all_there = threading.Barrier(count, timeout=_START_SECONDS)
    pool = ThreadPoolExecutor(count, "stream", lambda: _take(threads // count + (next(shares) < threads % count)))
    with _STARTING:
        try:
            for started in [pool.submit(all_there.wait) for _ in range(count)]:
                started.result()
        except BaseException:
            all_there.abort()
            pool.shutdown(wait=False)
            raise
        finally:
            torch.set_num_threads(threads)  # what threads get that torch has not met yet
    return pool


def _take(threads: int) -> None:
    """Give the calling thread so many of torch's threads for good."""
    torch.get_num_threads()  # a thread's first question sets its number to what was last set anywhere
    torch.set_num_threads(threads)
