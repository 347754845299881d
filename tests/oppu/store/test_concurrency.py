"""Writers that interleave: what a reader's cursor may rely on, and who wins."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, text

from oppu.errors import OffsetConflict, TransientError
from oppu.settings import StoreSettings
from oppu.store.records import Claim
from oppu.store.sql import SqlStore
from oppu.values import BaseId, Partition, UserId
from tests.oppu.store.conftest import Opener
from tests.oppu.store.support import (
    ADA,
    BASE,
    BOB,
    CLUSTER,
    EMBEDDER,
    EVENTS,
    NOW,
    Writer,
    announce,
    candidate_of,
    new_answer,
    new_event,
    some,
    take,
)

_WAIT_SECONDS = 10.0


class Gate:
    """Stops a store's transactions right before they commit, until told to go on."""

    def __init__(self, store: SqlStore) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()
        event.listen(store.database.engine, "commit", self._stop)

    def _stop(self, connection: Any) -> None:
        self.reached.set()
        assert self.go_on.wait(_WAIT_SECONDS)


def seqs(store: SqlStore, after: int = 0, user_id: UserId = ADA) -> list[int]:
    """Sequence numbers that a reader sees after its cursor."""
    return [e.seq for e in store.events({user_id: after}, embedder=EMBEDDER, limit=10_000)[user_id]]


def patient(settings: StoreSettings) -> StoreSettings:
    """The same store with room to wait for another writer."""
    return settings.model_copy(update={"busy_timeout_seconds": _WAIT_SECONDS})


def test_no_cursor_skips_a_row(settings: StoreSettings, opener: Opener) -> None:
    """The first writer holds its numbers uncommitted; the second must not become visible before it."""
    slow, fast, reader = (opener(patient(settings)) for _ in range(3))
    slow.register_base(BASE)
    gate = Gate(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Writer(slow, Partition("t", 0)).write, [new_event("ada", "slow"), new_event("bob", "s")])
        assert gate.reached.wait(_WAIT_SECONDS)
        second = pool.submit(Writer(fast, Partition("t", 1)).write, [new_event("bob", "f"), new_event("ada", "fast")])
        threading.Event().wait(0.2)
        assert not second.done() and seqs(reader) == []
        gate.go_on.set()
        assert first.result(_WAIT_SECONDS).written == second.result(_WAIT_SECONDS).written == 2
    stored = reader.events({ADA: 0, BOB: 0}, embedder=EMBEDDER, limit=9)
    assert [(e.seq, e.event_id) for e in stored[ADA]] == [(1, "slow"), (2, "fast")]
    assert [(e.seq, e.event_id) for e in stored[BOB]] == [(1, "s"), (2, "f")]
    assert [user.pending for user in reader.due(BASE, now=NOW, min_pending=1, limit=9)] == [2, 2]


@pytest.mark.postgres
def test_other_users_are_not_kept_waiting_on_postgres(migrated_postgres: StoreSettings, opener: Opener) -> None:
    slow, fast = opener(patient(migrated_postgres)), opener(patient(migrated_postgres))
    gate = Gate(slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(Writer(slow, Partition("t", 0)).write, some("ada", 1))
        assert gate.reached.wait(_WAIT_SECONDS)
        assert Writer(fast, Partition("t", 1)).write(some("bob", 1)).written == 1
        gate.go_on.set()
        first.result(_WAIT_SECONDS)


def test_readers_following_cursors_see_every_number_in_order(settings: StoreSettings, opener: Opener) -> None:
    stores = [opener(patient(settings)) for _ in range(3)]
    reader = opener(patient(settings))
    done = threading.Event()
    barrier = threading.Barrier(3)

    def write(number: int) -> None:
        writer = Writer(stores[number], Partition("t", number))
        barrier.wait(_WAIT_SECONDS)
        for step in range(8):
            users = ["ada", "bob", f"u{number}"]
            order = users if (step + number) % 2 else users[::-1]
            writer.write([new_event(user, f"{number}-{step}-{n}") for n in range(3) for user in order])

    def follow() -> list[int]:
        seen: list[int] = []
        while not done.is_set() or len(seen) < 72:
            seen += seqs(reader, seen[-1] if seen else 0)
        return seen

    with ThreadPoolExecutor(4) as pool:
        following = pool.submit(follow)
        for writing in [pool.submit(write, number) for number in range(3)]:
            writing.result(30)
        done.set()
        assert following.result(30) == list(range(1, 73))
    assert seqs(reader, user_id=BOB) == list(range(1, 73))


def test_one_of_two_wins_an_offset(settings: StoreSettings, opener: Opener) -> None:
    stores = [opener(patient(settings)) for _ in range(2)]
    barrier = threading.Barrier(2)

    def write(number: int) -> bool:
        barrier.wait(_WAIT_SECONDS)
        try:
            return Writer(stores[number]).write([new_event("ada", f"by-{number}")]).written == 1
        except OffsetConflict:
            return False

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(write, range(2))) == [False, True]
    assert seqs(stores[0]) == [1]


def test_one_of_many_wins_a_claim(settings: StoreSettings, opener: Opener) -> None:
    stores = [opener(patient(settings)) for _ in range(4)]
    stores[0].register_base(BASE)
    Writer(stores[0]).write(some("ada", 1))
    barrier = threading.Barrier(4)

    def claim(number: int) -> Claim | None:
        barrier.wait(_WAIT_SECONDS)
        return stores[number].claim(BASE, ADA, holder=f"w{number}", ttl_seconds=60)

    with ThreadPoolExecutor(4) as pool:
        assert len([won for won in pool.map(claim, range(4)) if won]) == 1


@pytest.mark.postgres
def test_a_claimant_skips_a_locked_row_on_postgres(migrated_postgres: StoreSettings, opener: Opener) -> None:
    busy, other = opener(migrated_postgres), opener(migrated_postgres)
    busy.register_base(BASE)
    Writer(busy).write(some("ada", 1))
    with busy.database.write() as connection:
        connection.execute(text("SELECT * FROM adapters FOR UPDATE"))
        assert other.claim(BASE, ADA, holder="w", ttl_seconds=60) is None
    assert other.claim(BASE, ADA, holder="w", ttl_seconds=60) is not None


def _erase(store: SqlStore) -> bool:
    return store.erase(ADA, cluster_id=CLUSTER, end_offsets={EVENTS: 50}, now=NOW, announce=announce("ada", None))


def _publish(store: SqlStore, claim: Claim) -> bool:
    return store.publish(claim, candidate_of(claim), now=NOW, announce=announce("ada"))


@pytest.mark.parametrize("known", [True, False])
def test_an_erasure_meets_a_write(settings: StoreSettings, opener: Opener, known: bool) -> None:
    """Whichever commits first, nothing older than the erasure is left."""
    eraser, ingest = opener(patient(settings)), opener(patient(settings))
    ingest.register_base(BASE)
    writer = Writer(ingest)
    if known:
        writer.write(some("ada", 2))
    gate = Gate(eraser)
    with ThreadPoolExecutor(2) as pool:
        erasing = pool.submit(_erase, eraser)
        assert gate.reached.wait(_WAIT_SECONDS)
        writing = pool.submit(writer.write, [new_event("ada", "old", offset=49), new_event("ada", "new", offset=50)])
        threading.Event().wait(0.1)
        gate.go_on.set()
        assert erasing.result(_WAIT_SECONDS) is known
        result = writing.result(_WAIT_SECONDS)
    assert (result.written, result.erased) == (1, 1)
    state = ingest.users([ADA], BASE)[ADA]
    assert (state.epoch, state.last_seq) == (2, 1)


def test_a_write_meets_an_erasure(settings: StoreSettings, opener: Opener) -> None:
    eraser, ingest = opener(patient(settings)), opener(patient(settings))
    gate = Gate(ingest)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(Writer(ingest).write, [new_event("ada", "old", offset=49)])
        assert gate.reached.wait(_WAIT_SECONDS)
        erasing = pool.submit(_erase, eraser)
        threading.Event().wait(0.1)
        gate.go_on.set()
        assert writing.result(_WAIT_SECONDS).written == 1 and erasing.result(_WAIT_SECONDS)
    assert seqs(eraser) == [] and eraser.counts()["users"] == 0


def test_an_erasure_meets_a_publication(settings: StoreSettings, opener: Opener) -> None:
    eraser, updater = opener(patient(settings)), opener(patient(settings))
    updater.register_base(BASE)
    Writer(updater).write(some("ada", 2))
    claim = take(updater, ADA)
    gate = Gate(eraser)
    with ThreadPoolExecutor(2) as pool:
        erasing = pool.submit(_erase, eraser)
        assert gate.reached.wait(_WAIT_SECONDS)
        publishing = pool.submit(_publish, updater, claim)
        threading.Event().wait(0.1)
        gate.go_on.set()
        assert erasing.result(_WAIT_SECONDS) and not publishing.result(_WAIT_SECONDS)
    assert updater.versions(BASE, ADA) == [] and len(updater.outbox(9)) == 1


def test_an_answer_and_its_event_written_at_once_match(settings: StoreSettings, opener: Opener) -> None:
    stores = [opener(patient(settings)) for _ in range(2)]
    gate = Gate(stores[0])
    reply = new_event("ada", "e", in_reply_to="r")
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(Writer(stores[0], Partition("t", 0)).write, [reply])
        assert gate.reached.wait(_WAIT_SECONDS)
        second = pool.submit(lambda: Writer(stores[1], Partition("t", 1)).write(answers=[new_answer("ada", "r")]))
        threading.Event().wait(0.1)
        gate.go_on.set()
        assert first.result(_WAIT_SECONDS).matched + second.result(_WAIT_SECONDS).matched == 1


def test_a_base_registered_meanwhile_counts_every_event(settings: StoreSettings, opener: Opener) -> None:
    ingest, updater = opener(patient(settings)), opener(patient(settings))
    writer = Writer(ingest)
    writer.write(some("ada", 2))
    gate = Gate(ingest)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(writer.write, [*some("ada", 3, start=3), *some("bob", 1)])
        assert gate.reached.wait(_WAIT_SECONDS)
        registering = pool.submit(updater.register_base, BaseId("new"))
        threading.Event().wait(0.1)
        gate.go_on.set()
        writing.result(_WAIT_SECONDS)
        registering.result(_WAIT_SECONDS)
    found = updater.due(BaseId("new"), now=NOW, min_pending=1, limit=9)
    assert [(user.user_id, user.pending) for user in found] == [("ada", 5), ("bob", 1)]


def test_waiting_too_long_for_a_lock_is_transient(settings: StoreSettings, opener: Opener) -> None:
    slow, hasty = opener(patient(settings)), opener(settings)
    Writer(slow, Partition("t", 0)).write(some("ada", 1))
    gate = Gate(slow)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(Writer(slow, Partition("t", 1)).write, some("ada", 1, start=2))
        assert gate.reached.wait(_WAIT_SECONDS)
        writer = Writer(hasty, Partition("t", 2))
        with pytest.raises(TransientError):
            writer.write(some("ada", 1, start=3))
        assert seqs(hasty) == [1]  # reading goes on meanwhile
        gate.go_on.set()
        writing.result(_WAIT_SECONDS)
    assert writer.write(some("ada", 1, start=3)).written == 1
    assert seqs(hasty) == [1, 2, 3]


def test_one_store_serves_many_threads(store: SqlStore, writer: Writer) -> None:
    reads: list[Callable[[], Any]] = [store.counts, store.quality, lambda: seqs(store), store.ping]
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(read) for read in reads * 10]
        for number in range(10):
            writer.write(some("ada", 2, start=1 + 2 * number))
        for read in running:
            read.result(_WAIT_SECONDS)
    assert seqs(store) == list(range(1, 21))
