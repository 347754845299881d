"""Erasing a user: nothing stays, nothing older comes back, nothing derived from before is served."""

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select

from oppu.privacy import UserHash
from oppu.settings import StoreSettings
from oppu.store.records import Lift, Outcome
from oppu.store.schema import metadata
from oppu.store.sql import SqlStore
from oppu.values import BaseId, OutRecord, Partition, RequestId, UserId
from tests.oppu.store.conftest import Opener
from tests.oppu.store.support import (
    ADA,
    ANSWERS,
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
    publish,
    some,
    take,
)

TOMBSTONE = announce("ada", None)


def erase(store: SqlStore, end: int, *, partition: Partition = EVENTS, user_id: UserId = ADA) -> bool:
    """Erase with one partition's end."""
    return store.erase(user_id, cluster_id=CLUSTER, end_offsets={partition: end}, now=NOW, announce=TOMBSTONE)


def everything(store: SqlStore) -> list[tuple[str, Any]]:
    """Every value of every row, with its table's name."""
    with store.database.read() as connection:
        return [
            (table.name, value)
            for table in metadata.sorted_tables
            for row in connection.execute(select(table))
            for value in row
        ]


def test_nothing_of_the_user_stays(store: SqlStore, writer: Writer) -> None:
    writer.write([*some("ada", 3), *some("bob", 2)], answers=[new_answer("ada", "r1"), new_answer("bob", "r1")])
    writer.write([new_event("ada", "e1", text="the clash")])
    publish(store, ADA)
    publish(store, BOB)
    writer.write(some("ada", 1, start=4))
    store.record_lift(take(store, ADA), Lift(1, 1.0, 1.0, 1, 1), through=4, now=NOW)
    assert erase(store, 10)
    left = everything(store)
    assert not [
        name for name, value in left if value in ("ada", b"ada", "the clash", b"the clash") and name != "outbox"
    ]
    assert [row.record for row in store.outbox(9)] == [announce("bob"), TOMBSTONE]
    assert store.lift(BASE).events == 0 and store.versions(BASE, ADA) == [] and store.adapter(BASE, ADA) is None
    assert store.events({ADA: 0}, embedder=EMBEDDER, limit=9) == {ADA: []}
    assert store.counts() | {"outbox": 0} == {
        "users": 1,
        "events": 2,
        "outbox": 0,
        "answers": 1,
        "adapters": 1,
        "held": 0,
        "quarantined": 0,
    }
    assert [entry.outcome for entry in store.adapter_log(BASE, ADA, limit=9)] == [Outcome.ERASED, Outcome.PUBLISHED]


def test_the_epoch_rises_and_numbers_begin_again(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 3))
    publish(store, ADA)
    assert erase(store, 10)
    state = store.users([ADA, BOB], BASE)
    assert state.keys() == {ADA} and (state[ADA].epoch, state[ADA].last_seq, state[ADA].head) == (2, 0, None)
    writer.write([new_event("ada", "e1", offset=10)])
    state = store.users([ADA], BASE)
    assert (state[ADA].epoch, state[ADA].last_seq, state[ADA].head) == (2, 1, None)
    claim = take(store, ADA)
    assert (claim.epoch, claim.next_version, claim.last_seq) == (2, 1, 1)
    assert erase(store, 20)
    assert store.users([ADA], BASE)[ADA].epoch == 3


def test_late_records_are_dropped_below_the_end_only(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 1))
    erase(store, 10)
    elsewhere = Partition(EVENTS.topic, 1)
    result = writer.write([new_event("ada", "e1", offset=9), new_event("ada", "e2", offset=10), *some("bob", 1)])
    assert (result.written, result.erased, result.duplicates, result.conflicts) == (2, 1, 0, 0)
    assert [event.event_id for event in store.events({ADA: 0}, embedder=EMBEDDER, limit=9)[ADA]] == ["e2"]
    erase(store, 5)  # a lower end does not open what was closed
    erase(store, 3, partition=elsewhere)
    result = writer.write([new_event("ada", "e3", offset=9), new_event("ada", "e4", offset=11)])
    assert (result.written, result.erased) == (1, 1)


def test_records_of_another_cluster_are_not_late(store: SqlStore, writer: Writer) -> None:
    store.erase(ADA, cluster_id="another", end_offsets={EVENTS: 99}, now=NOW, announce=TOMBSTONE)
    assert writer.write(some("ada", 1)).written == 1


def test_late_answers_are_dropped(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 1))
    store.erase(ADA, cluster_id=CLUSTER, end_offsets={ANSWERS: 5}, now=NOW, announce=TOMBSTONE)
    after = NOW + timedelta(seconds=1)
    answers = [
        new_answer("ada", "r1", offset=4, at=after),
        new_answer("ada", "r2", offset=6, at=NOW),
        new_answer("ada", "r3", offset=6, at=after),
    ]
    assert writer.write(answers=answers).erased == 2
    assert store.counts()["answers"] == 1
    assert store.users([ADA], BASE)[ADA].epoch == 2


def test_answers_made_of_what_was_erased_or_asked_before_are_dropped(store: SqlStore, writer: Writer) -> None:
    requests = Partition("prediction-requests", 0)
    writer.write(some("ada", 1))
    store.erase(ADA, cluster_id=CLUSTER, end_offsets={requests: 7}, now=NOW, announce=TOMBSTONE)
    after = NOW + timedelta(seconds=1)
    answers = [
        new_answer("ada", "computed amid it", at=after, epoch=1, request=(requests, 7)),
        new_answer("ada", "waited", at=after, epoch=2, request=(requests, 6)),
        new_answer("ada", "asked afterwards", at=after, epoch=2, request=(requests, 7)),
    ]
    assert writer.write(answers=answers).erased == 2
    with store.database.read() as connection:
        kept = connection.execute(select(metadata.tables["answers"].c.request_id)).scalars().all()
    assert kept == ["asked afterwards"]


def test_what_is_dropped_brings_no_user_back(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 1))
    erase(store, 10)
    letters = [OutRecord("dead-letters", key, b"a text") for key in (b"ada", b"bob", b"\xff", None)]
    result = writer.write([new_event("ada", "e1", offset=9)], answers=[new_answer("ada", "r")], dead_letters=letters)
    assert (result.erased, [r.letter.key for r in result.set_aside]) == (3, [b"bob", b"\xff", None])
    assert [row.record.key for row in store.outbox(9)] == [b"ada", b"bob", b"\xff", None]
    assert store.outbox(9)[0].record == TOMBSTONE
    with store.database.read() as connection:
        assert connection.execute(select(metadata.tables["users"])).all() == []
    assert store.users([ADA], BASE)[ADA].epoch == 2


def test_refused_records_of_after_an_erasure_are_set_aside(store: SqlStore, writer: Writer) -> None:
    erase(store, 1)
    assert writer.write(dead_letters=[OutRecord("dead-letters", b"ada", b"x")]).erased == 0


def test_nothing_of_the_user_stays_in_the_file(migrated_sqlite: StoreSettings, opener: Opener) -> None:
    store = opener(migrated_sqlite)
    store.register_base(BASE)
    Writer(store).write([new_event("ada", "e1", text="a very secret text")])
    erase(store, 10)
    file = store.database.file
    assert file is not None
    for path in (file, file.with_name(f"{file.name}-wal")):
        assert b"a very secret text" not in path.read_bytes()


def test_an_unknown_user_is_refused_from_then_on(store: SqlStore, writer: Writer) -> None:
    assert not erase(store, 10)
    assert store.outbox(9)[0].record == TOMBSTONE
    assert writer.write(some("ada", 2)).erased == 2
    assert store.counts()["users"] == 0
    writer.write([new_event("ada", "late", offset=10)])
    assert store.users([ADA], BASE)[ADA].epoch == 2


def test_erasures_are_listed_by_hash_and_time(store: SqlStore, writer: Writer) -> None:
    assert store.erasures(after="", since=None, limit=9) == {}
    writer.write(some("ada", 1))
    day = timedelta(days=1)
    for user_id, times in ((ADA, (NOW - day, NOW)), (BOB, (NOW,)), (UserId("eve"), (NOW - day,))):
        for now in times:
            store.erase(user_id, cluster_id=CLUSTER, end_offsets={}, now=now, announce=TOMBSTONE)
    hashed = UserHash("test key")
    expected = sorted([(hashed(ADA), 3), (hashed(BOB), 2), (hashed("eve"), 2)])
    found: list[tuple[str, int]] = []
    after = ""
    while page := store.erasures(after=after, since=None, limit=2):
        found += page.items()
        after = max(page)
    assert found == expected
    assert store.users([ADA], BASE)[ADA].epoch == 3
    recent = store.erasures(after="", since=NOW, limit=9)
    assert list(recent.items()) == [entry for entry in expected if entry[0] != hashed("eve")]
    assert store.erasures(after="", since=NOW + day, limit=9) == {}


def test_a_claim_from_before_is_worth_nothing(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 2))
    old = take(store, ADA)
    erase(store, 10)
    assert not store.publish(old, candidate_of(old), now=NOW, announce=announce("ada"))
    writer.write([new_event("ada", "n", offset=11)])
    new = take(store, ADA)
    assert new.token == old.token and new.epoch != old.epoch  # the epoch tells them apart
    assert not store.publish(old, candidate_of(old), now=NOW, announce=announce("ada"))
    assert not store.renew(old, 60)
    assert not store.conclude(old, Outcome.REJECTED, considered_through=1, reason="", now=NOW)
    assert not store.give_back(old)
    store.record_lift(old, Lift(1, 1.0, 1.0, 1, 1), through=1, now=NOW)
    assert store.lift(BASE).events == 0
    assert store.publish(new, candidate_of(new), now=NOW, announce=announce("ada"))


@pytest.mark.parametrize("name", ["a\x00b", "e\u0301", "\U0001f600"])
def test_erasure_takes_the_exact_id(store: SqlStore, writer: Writer, name: str) -> None:
    near = ["ab", "a", "é", "\U0001f601"]
    writer.write([new_event(user, "e", in_reply_to=RequestId("r")) for user in [name, *near]])
    erase(store, 10, user_id=UserId(name))
    assert {state.user_id for state in store.list_users(limit=9)} == set(near)


def test_unsent_records_of_others_stay(store: SqlStore, writer: Writer) -> None:
    writer.write(dead_letters=[OutRecord("d", b"ada", b"1"), OutRecord("d", None, b"2"), OutRecord("d", b"ad", b"3")])
    erase(store, 1)
    assert [row.record.value for row in store.outbox(9)] == [b"2", b"3", None]


def test_an_erasure_is_logged_where_there_was_anything(store: SqlStore, writer: Writer) -> None:
    store.register_base(BaseId("base-2"))
    writer.write(some("ada", 1))
    take(store, ADA)
    erase(store, 1)
    (entry,) = store.adapter_log(BASE, ADA, limit=9)
    assert (entry.outcome, entry.version, entry.parent) == (Outcome.ERASED, None, None)
    assert store.adapter_log(BaseId("base-2"), ADA, limit=9) == []  # nothing was ever done there
