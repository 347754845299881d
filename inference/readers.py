"""Threads that read adapters ahead; a read that hangs uses none of them up for good and keeps no process alive.

A reader that is stuck in one read counts as lost and another takes its place; if it comes back after all, it ends.
Invariant: never more than ``count`` readers that are not lost, nor more than ``MOST_LOST`` that are.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

from oppu.clock import Clock, SystemClock

logger = logging.getLogger(__name__)

STUCK_SECONDS = 10.0
"""A read that takes longer hangs: a local disk answers within milliseconds, a slow object store within a second."""

MOST_LOST = 16
"""A file system that hangs as a whole must not cost a thread for every adapter: from here on it is waited for."""

_LOOKS = 4
"""How often the readers are looked at in the time that makes one stuck."""

P = ParamSpec("P")
T = TypeVar("T")


class Readers(Executor):
    """Runs reads on daemon threads, which the end of the process does not wait for."""

    def __init__(self, count: int, *, clock: Clock | None = None, stuck_seconds: float = STUCK_SECONDS) -> None:
        """Start no thread yet.

        Args:
            count: Reads at a time.
            clock: Times the reads; the machine's where absent.
            stuck_seconds: From when on a reader counts as lost.
        """
        self._count, self._clock, self._stuck_seconds = count, clock or SystemClock(), stuck_seconds
        self._work: SimpleQueue[_Task | None] = SimpleQueue()
        self._closed = threading.Event()
        self._watched = False
        self._lock = threading.Lock()
        self._readers: set[threading.Thread] = set()
        self._lost: set[threading.Thread] = set()
        self._since: dict[threading.Thread, float] = {}

    @property
    def lost(self) -> int:
        """Readers that are stuck and were replaced."""
        with self._lock:
            return len(self._lost)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Begin a call as soon as a reader is free.

        Args:
            fn: What to call.
            *args: Its arguments.
            **kwargs: Its named arguments.

        Returns:
            What it will have returned or raised.

        Raises:
            RuntimeError: After ``shutdown``.
        """
        if self._closed.is_set():
            raise RuntimeError("the readers are shut down")
        future: Future[T] = Future()
        self._work.put(_Task(future, lambda: fn(*args, **kwargs)))
        with self._lock:
            self._fill()
            if not self._watched:
                self._watched = True
                _start(self._watch, "adapters-watch")
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls. Never waits, since a read may hang for good.

        Args:
            wait: Without effect.
            cancel_futures: Drop what has not begun.
        """
        self._closed.set()
        try:
            while cancel_futures:
                task = self._work.get_nowait()
                if task is not None:
                    task.future.cancel()
        except Empty:
            pass
        with self._lock:
            for _ in self._readers:
                self._work.put(None)

    def _fill(self) -> None:
        while len(self._readers) - len(self._lost) < self._count:
            self._readers.add(_start(self._read, "adapters"))

    def _read(self) -> None:
        me = threading.current_thread()
        while (task := self._work.get()) is not None:
            with self._lock:
                self._since[me] = self._clock.monotonic()
            task.run()
            del task  # or its result would stay in memory until the next one
            with self._lock:
                del self._since[me]
                if me in self._lost:
                    break
        with self._lock:
            self._lost.discard(me)
            self._readers.discard(me)

    def _watch(self) -> None:
        while not self._closed.wait(self._stuck_seconds / _LOOKS):
            with self._lock:
                self._replace(self._clock.monotonic() - self._stuck_seconds)

    def _replace(self, before: float) -> None:
        """Count those that have been reading since ``before`` as lost, and start others in their places."""
        for reader, since in self._since.items():
            if since <= before and reader not in self._lost and len(self._lost) < MOST_LOST:
                self._lost.add(reader)
                logger.warning("a reader of adapters is stuck, %d are now", len(self._lost))
        self._fill()


@dataclass(frozen=True, slots=True)
class _Task:
    future: Future[Any]
    call: Callable[[], Any]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.call()
        except BaseException as error:  # whoever asks for the result gets it
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


def _start(target: Callable[[], None], name: str) -> threading.Thread:
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
