"""Adapters in host memory between the registry and the bank, read ahead of the batch that wants them.

A version never changes, so a copy serves for as long as its name is asked for; the least recently used one goes first.
Used by one thread; the readers only read. Invariants: a version is read once at a time; a read that is done holds no
place of those that are not; what failed is reported to the next who asks for it, and read anew.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, wait

from oppu.errors import AdapterNotReady
from oppu.lm.port import AdapterRef, AdapterSource, Tensors

_FAILURES = 64
"""Failures kept until somebody asks: each may hold on to what had been read by then."""


class HostCache(AdapterSource):
    """Reads through to a slower source."""

    def __init__(
        self,
        source: AdapterSource,
        *,
        capacity: int,
        readers: Executor,
        on_hit: Callable[[], None] = lambda: None,
    ) -> None:
        """Wrap a source.

        Args:
            source: The registry; its ``load`` must bear several threads.
            capacity: Adapters kept, and as many being read.
            readers: Runs the reads; it is the cache's from now on.
            on_hit: Told of each load that found the adapter here, but for the first one after it was read ahead.
        """
        self._source, self._capacity, self._readers, self._on_hit = source, capacity, readers, on_hit
        self._kept: OrderedDict[AdapterRef, Tensors] = OrderedDict()
        self._unasked: set[AdapterRef] = set()
        self._reading: dict[AdapterRef, Future[Tensors]] = {}
        self._failed: OrderedDict[AdapterRef, BaseException] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def close(self) -> None:
        """Begin no more reads."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def expect(self, refs: Iterable[AdapterRef], *, wait_seconds: float = 0.0) -> None:
        """Begin to read versions, and wait for them together.

        Args:
            refs: What will be loaded soon, most urgent first. Those for whom there is no room are passed over.
            wait_seconds: Longest wait.
        """
        self._settle()
        wanted = list(dict.fromkeys(refs))
        for ref in wanted:
            if ref in self._kept:
                self._kept.move_to_end(ref)
            elif ref not in self._reading and len(self._reading) < self._capacity:
                self._reading[ref] = self._readers.submit(self._source.load, ref)
        if wait_seconds > 0:
            wait([self._reading[ref] for ref in wanted if ref in self._reading], timeout=wait_seconds)

    def reading(self, ref: AdapterRef) -> bool:
        """Say whether a version is still being read."""
        return ref in self._reading and not self._reading[ref].done()

    def known(self, ref: AdapterRef) -> bool:
        """Say whether ``load`` would answer from what is here, is being read, or has failed."""
        return ref in self._kept or ref in self._failed or ref in self._reading

    def load(self, ref: AdapterRef) -> Tensors:
        """Return a version's weights.

        Args:
            ref: Names the version.

        Returns:
            The weights; one that nobody expected is read now.

        Raises:
            AdapterNotReady: It is still being read, or nobody expected it and too many others are being read.
            AdapterUnreadable: As of the source.
            TransientError: As of the source.
        """
        if ref not in self._kept:
            self._settle()
        if ref in self._kept:
            return self._found(ref)
        if ref in self._failed:
            raise self._failed.pop(ref)
        if ref in self._reading:
            raise AdapterNotReady(f"adapter version {ref.version} is still being read")
        if len(self._reading) >= self._capacity:
            raise AdapterNotReady(f"adapter version {ref.version}: too many others are being read")
        tensors = self._source.load(ref)
        self._keep(ref, tensors)
        return tensors

    def _found(self, ref: AdapterRef) -> Tensors:
        if ref in self._unasked:
            self._unasked.remove(ref)
        else:
            self._on_hit()
        self._kept.move_to_end(ref)
        return self._kept[ref]

    def _settle(self) -> None:
        """Sort out what is done: weights are kept, failures wait for who asks."""
        for ref in [ref for ref, reading in self._reading.items() if reading.done()]:
            reading = self._reading.pop(ref)
            if reading.cancelled():
                continue
            error = reading.exception()
            if error is None:
                self._keep(ref, reading.result())
                self._unasked.add(ref)
            else:
                self._failed[ref] = error
                self._failed.move_to_end(ref)
        while len(self._failed) > _FAILURES:
            self._failed.popitem(last=False)

    def _keep(self, ref: AdapterRef, tensors: Tensors) -> None:
        self._failed.pop(ref, None)
        self._kept[ref] = tensors
        while len(self._kept) > self._capacity:
            gone, _ = self._kept.popitem(last=False)
            self._unasked.discard(gone)
