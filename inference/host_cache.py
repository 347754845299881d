"""Adapters in host memory between the registry and the bank, read ahead of the batch that wants them.

A version never changes, so a copy serves for as long as its name is asked for; the least recently used one goes first.
Used by one thread; the readers only read. Invariant: a version is read once at a time, and a read that failed is
forgotten when it has been reported.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, wait

from oppu.errors import AdapterNotReady
from oppu.lm.port import AdapterRef, AdapterSource, Tensors


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
            capacity: Adapters kept.
            readers: Runs the reads; it is the cache's from now on.
            on_hit: Told of each load that found the adapter here.
        """
        self._source, self._capacity, self._readers, self._on_hit = source, capacity, readers, on_hit
        self._kept: OrderedDict[AdapterRef, Tensors] = OrderedDict()
        self._reading: dict[AdapterRef, Future[Tensors]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def close(self) -> None:
        """Begin no more reads."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def expect(self, refs: Iterable[AdapterRef], *, wait_seconds: float = 0.0) -> None:
        """Begin to read versions, and wait for them together.

        Args:
            refs: What will be loaded soon, most urgent first.
            wait_seconds: Longest wait.
        """
        wanted = list(dict.fromkeys(refs))
        for ref in wanted:
            if ref not in self._kept and ref not in self._reading and len(self._reading) < self._capacity:
                self._reading[ref] = self._readers.submit(self._source.load, ref)
        if wait_seconds > 0:
            wait([self._reading[ref] for ref in wanted if ref in self._reading], timeout=wait_seconds)

    def load(self, ref: AdapterRef) -> Tensors:
        """Return a version's weights.

        Args:
            ref: Names the version.

        Returns:
            The weights; one that nobody expected is read now.

        Raises:
            AdapterNotReady: It was expected and is still being read.
            AdapterUnreadable: As of the source.
        """
        if ref in self._kept:
            self._on_hit()
            self._kept.move_to_end(ref)
            return self._kept[ref]
        reading = self._reading.get(ref)
        if reading is not None and not reading.done():
            raise AdapterNotReady(f"adapter version {ref.version} is still being read")
        if reading is not None:
            del self._reading[ref]
        tensors = self._source.load(ref) if reading is None else reading.result()
        self._kept[ref] = tensors
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return tensors
