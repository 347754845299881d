"""Parts of one call side by side on a CPU's cores, where one forward on all of them leaves some idle.

Of a small base every product is over in microseconds, and most of what lies between products runs on one core; forwards
on threads of their own meet only at the end (``python -m benchmarks.streams``). They are few, since between products
Python runs one thread at a time.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Self

import torch

MOST = 4
"""Streams; with more cores each has several."""
_TOKENS = 512
"""Least tokens of a stream's part: with fewer, products on one core are slow too, and Python's share grows."""


class OfThread(threading.local):
    """What each thread has of its own for the forwards it runs. With a copy of a model comes one without anything."""

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return type(self)()


class Streams:
    """Threads that take parts of a call, each with its share of torch's threads. One call at a time."""

    def __init__(self, device: torch.device) -> None:
        """Plan threads; they start with the first call that is worth it.

        Args:
            device: Where the base is; only a CPU has streams, which share as many threads as torch has now.
        """
        self._device = device
        self._threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._count = min(MOST, self._threads)
        self._pool: ThreadPoolExecutor | None = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return type(self)(self._device)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def parts(self, tokens: Sequence[int], alike: Sequence[Hashable] = ()) -> list[list[int]]:
        """Divide what is to be computed into parts of about as many tokens, long and short ones in each.

        Args:
            tokens: Of each item.
            alike: Of each item, what it shares with others that are best computed beside it; none: nothing.

        Returns:
            Numbers of items, a list a stream, every number once; one list where that is too little work for more.
        """
        groups: dict[Hashable, list[int]] = {}
        for number, key in enumerate(alike or range(len(tokens))):
            groups.setdefault(key, []).append(number)
        count = min(self._count, sum(tokens) // _TOKENS, len(groups))
        if count <= 1:
            return [list(range(len(tokens)))]
        parts, taken = [list[int]() for _ in range(count)], [0] * count
        for group in sorted(groups.values(), key=lambda group: -tokens[group[0]]):
            least = taken.index(min(taken))
            parts[least] += group
            taken[least] += sum(tokens[number] for number in group)
        return parts

    def run(self, work: Callable[[Sequence[int]], None], parts: Sequence[Sequence[int]]) -> None:
        """Do the work on each part at the same time, with gradients if the caller has them.

        Args:
            work: Called once a part; where there are several, each time on another thread.
            parts: As ``parts`` returned them.

        Raises:
            Exception: What the work raised on the first part that failed; the others have ended by then.
        """
        if len(parts) == 1:
            work(parts[0])
            return
        gradients = torch.set_grad_enabled(torch.is_grad_enabled())  # a thread's own, as its number of threads is
        pool = self._started()
        running = [pool.submit(gradients(work), part) for part in parts]
        wait(running)
        for part in running:
            part.result()

    def _started(self) -> ThreadPoolExecutor:
        """Return the threads, each told how many of torch's it has, and the caller as many as before."""
        if self._pool is None:
            before, all_there = torch.get_num_threads(), threading.Barrier(self._count)
            self._pool = ThreadPoolExecutor(self._count, "stream", _take, (self._threads // self._count,))
            wait([self._pool.submit(all_there.wait) for _ in range(self._count)])
            torch.set_num_threads(before)  # what threads get that torch has not met yet
        return self._pool


def _take(threads: int) -> None:
    """Give the calling thread so many of torch's threads for good."""
    torch.get_num_threads()  # a thread's first question sets its number to what was last set anywhere
    torch.set_num_threads(threads)
