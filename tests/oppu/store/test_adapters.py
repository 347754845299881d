"""The contract of claims, publishing, rollback and lift, on every database."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from oppu.clock import ManualClock
from oppu.errors import ConfigError
from oppu.settings import LONGEST_CLAIM_SECONDS, LONGEST_RETRY_SECONDS, StoreSettings
from oppu.store.records import ClaimState, Lift, Outcome
from oppu.store.sql import SqlStore
from oppu.values import BaseId, Head, UserId
from tests.oppu.store.conftest import Opener
from tests.oppu.store.support import ADA, BASE, BOB, NOW, Writer, announce, candidate_of, publish, some, take

OTHER = BaseId("base-2")
CARL = UserId("carl")


def due(store: SqlStore, *, min_pending: int = 1, base: BaseId = BASE, later: float = 0) -> list[tuple[str, int]]:
    """Due users with their pending counts; the count must agree with the list."""
    now = NOW + timedelta(seconds=later)
    found = store.due(base, now=now, min_pending=min_pending, limit=100)
    assert store.due_count(base, now=now, min_pending=min_pending) == len(found)
    return [(user.user_id, user.pending) for user in found]


@pytest.fixture
def fail(store: SqlStore) -> Callable[..., bool]:
    """Claims ada and fails."""

    def run(*, retry_after: float | None = None, quarantine: bool = False) -> bool:
        retry_at = None if retry_after is None else NOW + timedelta(seconds=retry_after)
        claim = take(store, ADA)
        return store.conclude(
            claim,
            Outcome.FAILED,
            considered_through=claim.considered_through,
            reason="not finite",
            now=NOW,
            retry_at=retry_at,
            quarantine=quarantine,
        )

    return run


def test_due_is_ordered_and_bounded(store: SqlStore, writer: Writer) -> None:
    writer.write([*some("bob", 3), *some("ada", 5), *some("carl", 3), *some("dan", 1)])
    assert due(store, min_pending=2) == [("ada", 5), ("bob", 3), ("carl", 3)]
    (first,) = store.due(BASE, now=NOW, min_pending=2, limit=1)
    assert (first.user_id, first.last_recorded_at) == (ADA, NOW + timedelta(seconds=5))
    writer.write(some("dan", 9, start=2))
    assert due(store, min_pending=2)[0] == ("dan", 10)


def test_a_later_base_counts_what_is_there(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 3))
    publish(store, ADA)
    store.register_base(OTHER)
    store.register_base(OTHER)
    assert due(store) == [] and due(store, base=OTHER) == [("ada", 3)]
    writer.write([*some("ada", 2, start=4), *some("bob", 1)])
    assert due(store) == [("ada", 2), ("bob", 1)] and due(store, base=OTHER) == [("ada", 5), ("bob", 1)]
    assert store.bases() == [BASE, OTHER]
    assert store.users([ADA], OTHER)[ADA].head is None and store.users([ADA], BASE)[ADA].head is not None


def test_a_claim_excludes_others(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 4))
    claim = take(store, ADA)
    assert (claim.token, claim.epoch, claim.head, claim.attempts) == (1, 1, None, 1)
    assert (claim.considered_through, claim.last_seq, claim.next_version) == (0, 4, 1)
    assert store.claim(BASE, ADA, holder="w2", ttl_seconds=60) is None
    assert store.claim(BASE, UserId("nobody"), holder="w2", ttl_seconds=60) is None
    assert due(store) == []
    status = store.adapter(BASE, ADA)
    assert status is not None and status.state is ClaimState.CLAIMED


def test_an_expired_claim_is_taken_over_and_its_holder_shut_out(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 4))
    zombie = take(store, ADA, ttl_seconds=-1)
    assert due(store) == [("ada", 4)]
    claim = take(store, ADA, holder="w2")
    assert (claim.token, claim.attempts) == (zombie.token + 1, 2)
    assert claim.next_version != zombie.next_version  # they never write files under one path
    assert not store.renew(zombie, 60)
    assert not store.publish(zombie, candidate_of(zombie), now=NOW, announce=announce("ada"))
    assert not store.conclude(zombie, Outcome.REJECTED, considered_through=4, reason="", now=NOW)
    store.record_lift(zombie, Lift(4, 1.0, 1.0, 1, 1), through=4, now=NOW)
    assert store.lift(BASE).events == 0 and store.outbox(9) == [] and store.adapter_log(BASE, ADA, limit=9) == []
    assert store.publish(claim, candidate_of(claim), now=NOW, announce=announce("ada"))


def test_an_expired_claim_nobody_took_still_counts(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 4))
    late = take(store, ADA, ttl_seconds=-1)
    assert store.publish(late, candidate_of(late), now=NOW, announce=announce("ada"))


def test_expiry_follows_the_injected_clock(migrated_sqlite: StoreSettings, opener: Opener, clock: ManualClock) -> None:
    store = opener(migrated_sqlite, clock)
    store.register_base(BASE)
    Writer(store).write(some("ada", 1))
    claim = take(store, ADA, ttl_seconds=60)
    assert claim.expires_at == clock.now() + timedelta(seconds=60)
    clock.advance(50)
    assert store.renew(claim, 60)
    clock.advance(59)
    assert store.claim(BASE, ADA, holder="w2", ttl_seconds=1) is None
    clock.advance(1)
    assert store.claim(BASE, ADA, holder="w2", ttl_seconds=1) is not None


def test_publishing_moves_head_watermarks_log_and_outbox(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 6))
    claim = take(store, ADA)
    writer.write(some("ada", 2, start=7))
    candidate = candidate_of(claim, through=5)
    assert store.publish(claim, candidate, now=NOW, announce=announce("ada"))
    head = Head(1, None, 5, 1)
    assert store.users([ADA], BASE)[ADA].head == head
    status = store.adapter(BASE, ADA)
    assert status is not None
    assert (status.head, status.considered_through, status.last_seq, status.state) == (head, 5, 8, ClaimState.FREE)
    assert due(store) == [("ada", 3)]
    assert store.versions(BASE, ADA) == [candidate]
    (entry,) = store.adapter_log(BASE, ADA, limit=9)
    assert (entry.outcome, entry.version, entry.parent, entry.metrics) == (Outcome.PUBLISHED, 1, None, {"loss": 0.5})
    assert entry.user != "ada" and len(entry.user) == 64 and entry.at == NOW
    assert [row.record for row in store.outbox(9)] == [announce("ada")]
    assert store.counts()["adapters"] == 1
    assert publish(store, ADA) == 2
    second = store.users([ADA], BASE)[ADA].head
    assert second == Head(2, 1, 8, 1) and due(store) == []


def test_a_lost_acknowledgement_is_no_second_publication(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 3))
    claim = take(store, ADA)
    candidate = candidate_of(claim)
    assert store.publish(claim, candidate, now=NOW, announce=announce("ada"))
    assert store.publish(claim, candidate, now=NOW, announce=announce("ada"))
    assert len(store.outbox(9)) == len(store.versions(BASE, ADA)) == len(store.adapter_log(BASE, ADA, limit=9)) == 1
    assert not store.publish(claim, replace(candidate, digest="x"), now=NOW, announce=announce("ada"))
    assert not store.conclude(claim, Outcome.FAILED, considered_through=0, reason="", now=NOW)


def test_publishing_needs_the_parent(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 3))
    publish(store, ADA)
    writer.write(some("ada", 3, start=4))
    claim = take(store, ADA)
    fresh = replace(candidate_of(claim), parent=None)
    assert not store.publish(claim, fresh, now=NOW, announce=announce("ada"))
    assert not store.publish(replace(claim, head=None), fresh, now=NOW, announce=announce("ada"))
    assert not store.publish(claim, candidate_of(claim, parent=7), now=NOW, announce=announce("ada"))
    assert len(store.outbox(9)) == 1
    assert store.publish(claim, candidate_of(claim), now=NOW, announce=announce("ada"))


def test_a_rejection_is_not_retrained_for_ever(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 4))
    claim = take(store, ADA)
    assert store.conclude(
        claim, Outcome.REJECTED, considered_through=99, reason="worse", now=NOW, metrics={"loss": 2.0}
    )
    assert due(store) == []
    status = store.adapter(BASE, ADA)
    assert status is not None and (status.considered_through, status.last_seq, status.head) == (4, 4, None)
    (entry,) = store.adapter_log(BASE, ADA, limit=1)
    assert (entry.outcome, entry.reason, entry.metrics) == (Outcome.REJECTED, "worse", {"loss": 2.0})
    writer.write(some("ada", 1, start=5))
    assert due(store) == [("ada", 1)] and take(store, ADA).considered_through == 4


def test_failures_back_off_and_are_quarantined(store: SqlStore, writer: Writer, fail: Callable[..., bool]) -> None:
    writer.write(some("ada", 4))
    assert fail(retry_after=30)
    assert due(store, later=29) == [] and due(store, later=30) == [("ada", 4)]
    assert fail(quarantine=True)
    assert due(store, later=9e6) == [] and store.claim(BASE, ADA, holder="w", ttl_seconds=1) is None
    status = store.adapter(BASE, ADA)
    assert status is not None and (status.failures, status.state) == (2, ClaimState.QUARANTINED)
    assert store.counts()["quarantined"] == 1
    assert store.release(BASE, ADA, now=NOW) and not store.release(BASE, BOB, now=NOW)
    assert due(store) == [("ada", 4)]
    status = store.adapter(BASE, ADA)
    assert status is not None and (status.failures, status.state) == (0, ClaimState.FREE)
    assert [entry.outcome for entry in store.adapter_log(BASE, ADA, limit=2)] == [Outcome.RELEASED, Outcome.FAILED]


def test_back_off_is_shown(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 1))
    claim = take(store, ADA)
    later = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=5)
    assert store.conclude(claim, Outcome.FAILED, considered_through=0, reason="", now=NOW, retry_at=later)
    status = store.adapter(BASE, ADA)
    assert status is not None and (status.state, status.retry_at) == (ClaimState.BACKING_OFF, later)


def test_times_of_a_clock_that_was_ahead_hold_nobody(
    store: SqlStore, writer: Writer, fail: Callable[..., bool]
) -> None:
    writer.write(some("ada", 4))
    take(store, ADA, ttl_seconds=2 * LONGEST_CLAIM_SECONDS)
    status = store.adapter(BASE, ADA)
    assert status is not None and status.state is ClaimState.FREE
    assert due(store) == [("ada", 4)]
    take(store, ADA, ttl_seconds=LONGEST_CLAIM_SECONDS)
    assert due(store) == [] and store.claim(BASE, ADA, holder="w2", ttl_seconds=60) is None


def test_a_back_off_of_a_clock_that_was_ahead_holds_nobody(
    store: SqlStore, writer: Writer, fail: Callable[..., bool]
) -> None:
    writer.write(some("ada", 4))
    assert fail(retry_after=LONGEST_RETRY_SECONDS)
    assert due(store) == []
    assert fail(retry_after=LONGEST_RETRY_SECONDS + 1)
    assert due(store) == [("ada", 4)]


def test_attempts_count_claims_that_never_ended(store: SqlStore, writer: Writer, fail: Callable[..., bool]) -> None:
    writer.write(some("ada", 4))
    assert [take(store, ADA, ttl_seconds=-1).attempts for _ in range(3)] == [1, 2, 3]
    assert fail()
    assert take(store, ADA).attempts == 1


def test_a_claim_given_back_was_never_made(store: SqlStore, writer: Writer, fail: Callable[..., bool]) -> None:
    writer.write(some("ada", 4))
    assert fail() and fail(retry_after=30)
    before, log = store.adapter(BASE, ADA), store.adapter_log(BASE, ADA, limit=9)
    claim = take(store, ADA)
    assert store.give_back(claim)
    assert store.adapter(BASE, ADA) == before and store.adapter_log(BASE, ADA, limit=9) == log
    assert before is not None and (before.failures, before.considered_through) == (2, 0)
    assert due(store, later=29) == [] and due(store, later=30) == [("ada", 4)]
    again = take(store, ADA)
    assert (again.attempts, again.token) == (1, claim.token + 1)
    assert again.next_version != claim.next_version  # files may lie there already
    assert store.outbox(9) == []


def test_a_claim_given_back_is_no_attempt_and_forgives_none(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 4))
    for _ in range(2):
        take(store, ADA, ttl_seconds=-1)
    for _ in range(3):
        claim = take(store, ADA)
        assert claim.attempts == 3
        assert store.give_back(claim)
    late = take(store, ADA, ttl_seconds=-1)
    assert store.give_back(late)  # it expired, but nobody took it
    assert take(store, ADA).attempts == 3


def test_only_the_current_claim_is_given_back(store: SqlStore, writer: Writer) -> None:
    writer.write([*some("ada", 4), *some("bob", 1)])
    zombie = take(store, ADA, ttl_seconds=-1)
    claim = take(store, ADA, holder="w2")
    assert not store.give_back(zombie)
    assert store.renew(claim, -1)
    claim = take(store, ADA, holder="w2")
    assert claim.attempts == 2  # the zombie's process is alive, so its attempt was not one that ended with it
    assert store.claim(BASE, ADA, holder="w3", ttl_seconds=1) is None
    assert store.publish(claim, candidate_of(claim), now=NOW, announce=announce("ada"))
    assert not store.give_back(claim)
    released = take(store, BOB)
    assert store.release(BASE, BOB, now=NOW)  # which sets the count to zero
    assert store.give_back(released) and not store.give_back(released)
    last = take(store, BOB)
    assert last.attempts == 1
    store.roll_back(BASE, BOB, to=None, reason="", now=NOW, announce=announce("bob"))
    assert not store.give_back(last)


def test_an_attempt_is_concluded_as_an_attempt(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 1))
    with pytest.raises(ValueError, match="published"):
        store.conclude(take(store, ADA), Outcome.PUBLISHED, considered_through=1, reason="", now=NOW)


def test_what_an_adapter_has_earned_moves_with_the_watermark(store: SqlStore, writer: Writer) -> None:
    def earned() -> float:
        head = store.users([ADA], BASE)[ADA].head
        assert head is not None
        return head.earned

    def conclude(outcome: Outcome, through: int, value: float | None) -> None:
        claim = take(store, ADA)
        assert store.conclude(claim, outcome, considered_through=through, reason="", now=NOW, earned=value)

    writer.write(some("ada", 3))
    publish(store, ADA)
    writer.write(some("ada", 3, start=4))
    conclude(Outcome.REJECTED, 6, -1.25)
    assert earned() == -1.25 == take_head(store).earned
    writer.write(some("ada", 3, start=7))
    conclude(Outcome.FAILED, 6, 9.0)  # considered nothing: its events will be judged again
    assert earned() == -1.25
    conclude(Outcome.REJECTED, 9, None)
    assert earned() == -1.25
    writer.write(some("ada", 1, start=10))
    claim = take(store, ADA)
    assert store.publish(claim, replace(candidate_of(claim), earned=0.5), now=NOW, announce=announce("ada"))
    assert earned() == 0.5
    store.roll_back(BASE, ADA, to=1, reason="odd", now=NOW, announce=announce("ada", b"back"))
    assert earned() == 0.0


def take_head(store: SqlStore) -> Head:
    claim = take(store, ADA)
    assert claim.head is not None
    assert store.conclude(claim, Outcome.SKIPPED, considered_through=claim.considered_through, reason="", now=NOW)
    return claim.head


def test_rollback_holds_until_there_is_new_evidence(store: SqlStore, writer: Writer) -> None:
    for start in (1, 4):
        writer.write(some("ada", 3, start=start))
        publish(store, ADA)
    writer.write(some("ada", 2, start=7))
    trainer = take(store, ADA)
    head = store.roll_back(BASE, ADA, to=1, reason="odd", now=NOW, announce=announce("ada", b"back"))
    assert head == Head(1, None, 3, 1) == store.users([ADA], BASE)[ADA].head
    assert store.outbox(9)[-1].record.value == b"back"
    assert not store.publish(trainer, candidate_of(trainer), now=NOW, announce=announce("ada"))
    assert due(store) == [] and store.claim(BASE, ADA, holder="w", ttl_seconds=1) is None
    status = store.adapter(BASE, ADA)
    assert status is not None and status.state is ClaimState.HELD and store.counts()["held"] == 1
    writer.write(some("ada", 1, start=9))
    assert due(store) == [("ada", 3)] and due(store, min_pending=2) == []  # one new event is not yet two
    assert store.counts()["held"] == 0
    assert publish(store, ADA) == 4  # versions 2 and 3 were given out before
    assert [version.version for version in store.versions(BASE, ADA)] == [1, 2, 4]
    assert [e.outcome for e in store.adapter_log(BASE, ADA, limit=2)] == [Outcome.PUBLISHED, Outcome.ROLLED_BACK]


def test_rollback_to_nothing_and_release(store: SqlStore, writer: Writer) -> None:
    writer.write(some("ada", 3))
    publish(store, ADA)
    writer.write(some("ada", 2, start=4))
    assert store.roll_back(BASE, ADA, to=None, reason="", now=NOW, announce=announce("ada")) is None
    assert store.users([ADA], BASE)[ADA].head is None and due(store) == []
    assert store.release(BASE, ADA, now=NOW)
    assert due(store) == [("ada", 2)]
    claim = take(store, ADA)
    assert claim.head is None and store.publish(claim, candidate_of(claim), now=NOW, announce=announce("ada"))


@pytest.mark.parametrize(("user_id", "to"), [(ADA, 9), (BOB, None), (BOB, 1)])
def test_rollback_to_what_is_not_there(store: SqlStore, writer: Writer, user_id: UserId, to: int | None) -> None:
    writer.write(some("ada", 3))
    publish(store, ADA)
    with pytest.raises(ConfigError):
        store.roll_back(BASE, user_id, to=to, reason="", now=NOW, announce=announce(user_id))
    assert len(store.outbox(9)) == 1 and store.users([ADA], BASE)[ADA].head is not None


def test_adapters_lists_heads_and_attempts(store: SqlStore, writer: Writer) -> None:
    writer.write([*some("carl", 1), *some("ada", 1), *some("bob", 1), *some("dan", 1)])
    publish(store, CARL)
    take(store, ADA)
    take(store, UserId("dan"))
    listed = store.adapters(BASE, limit=2)
    assert [status.user_id for status in listed] == ["ada", "carl"]
    assert [status.user_id for status in store.adapters(BASE, limit=9, after=CARL)] == ["dan"]
    assert store.adapter(BASE, UserId("nobody")) is None
    untried = store.adapter(BASE, BOB)
    assert untried is not None and (untried.state, untried.last_seq) == (ClaimState.FREE, 1)


def test_lift_counts_each_event_once(store: SqlStore, writer: Writer) -> None:
    writer.write([*some("ada", 9), *some("bob", 2)])
    assert store.lift(BASE) == Lift(0, 0.0, 0.0, 0, 0)
    crashed = take(store, ADA, ttl_seconds=-1)
    store.record_lift(crashed, Lift(9, 1.5, 2.5, 3, 2), through=9, now=NOW)
    store.record_lift(crashed, Lift(9, 8.0, 8.0, 8, 8), through=9, now=NOW)
    assert store.lift(BASE) == Lift(9, 1.5, 2.5, 3, 2)
    writer.write(some("ada", 1, start=10))
    claim = take(store, ADA)
    store.record_lift(claim, Lift(10, 2.0, 3.0, 4, 3), through=10, now=NOW)  # takes the crashed one's place
    store.record_lift(take(store, BOB), Lift(2, 0.25, 0.5, 1, 0), through=2, now=NOW)
    assert store.lift(BASE) == Lift(12, 2.25, 3.5, 5, 3) and store.lift(OTHER).events == 0
    assert store.publish(claim, candidate_of(claim), now=NOW, announce=announce("ada"))
    writer.write(some("ada", 1, start=11))
    store.record_lift(take(store, ADA), Lift(1, 1.0, 1.0, 1, 1), through=11, now=NOW)
    assert store.lift(BASE).events == 13
