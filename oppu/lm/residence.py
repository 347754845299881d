"""Which adapter version lies in which slot of a bank: least recently used goes first, never one that is pinned."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from oppu.errors import Backpressure
from oppu.lm.bank import SlotBank
from oppu.lm.port import AdapterRef, Tensors

_PINNED_RETRY_SECONDS = 0.1


class AdapterBank:
    """Which adapter version lies in which slot: least recently used goes first, never one that is pinned."""

    def __init__(self, bank: SlotBank, on_event: Callable[[str], None] = lambda _: None) -> None:
        """Manage a bank's slots.

        Args:
            bank: The tensors.
            on_event: Told ``hit``, ``miss``, ``load`` or ``evict``.
        """
        self._bank = bank
        self._on_event = on_event
        self._slots: OrderedDict[AdapterRef, int] = OrderedDict()
        self._free = list(range(bank.slots, 0, -1))
        self._pins: Counter[AdapterRef] = Counter()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, ref: AdapterRef) -> bool:
        known = ref in self._slots
        self._on_event("hit" if known else "miss")
        return known

    def touch(self, refs: Iterable[AdapterRef]) -> None:
        """Count versions as used just now; those that are not in the bank are passed over."""
        for ref in refs:
            if ref in self._slots:
                self._slots.move_to_end(ref)

    def install(self, ref: AdapterRef, tensors: Tensors) -> None:
        """Write a version into a slot; one that is there already is the same and stays.

        Args:
            ref: Names the version.
            tensors: The adapter's weights; ``None`` = the base alone.

        Raises:
            AdapterUnreadable: It does not fit this base; nobody was evicted.
            Backpressure: Every slot is in use.
        """
        if ref in self._slots:
            self._slots.move_to_end(ref)
            return
        rank = self._bank.check(tensors)
        if not self._free:
            self._evict()
        # nobody is mapped to the slot while it is written: a write that breaks off leaves it free
        self._bank.write(self._free[-1], tensors, rank)
        self._slots[ref] = self._free.pop()
        self._on_event("load")

    @contextmanager
    def pinned(self, refs: Iterable[AdapterRef]) -> Iterator[dict[AdapterRef, int]]:
        """Hold versions in their slots.

        Args:
            refs: Every one must be resident.

        Yields:
            Their slots.

        Raises:
            KeyError: One is not resident.
        """
        held = list(dict.fromkeys(refs))
        slots = {ref: self._slots[ref] for ref in held}
        self._pins.update(held)
        for ref in held:
            self._slots.move_to_end(ref)
        try:
            yield slots
        finally:
            self._pins.subtract(held)
            self._pins = +self._pins

    def _evict(self) -> None:
        victim = next((ref for ref in self._slots if self._pins[ref] <= 0), None)
        if victim is None:
            raise Backpressure(_PINNED_RETRY_SECONDS)
        self._free.append(self._slots.pop(victim))
        self._on_event("evict")
