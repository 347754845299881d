"""Whose adapter comes next, and when a failure is repeated."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oppu.settings import LONGEST_RETRY_SECONDS
from oppu.store.records import DueUser
from oppu.values import UserId
from updater.plan import plan, retry_at, should_quarantine

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def due(name: str, pending: int, idle_hours: float = 0.0) -> DueUser:
    return DueUser(UserId(name), pending, NOW - timedelta(hours=idle_hours))


def test_many_pending_events_come_first_and_ties_by_id() -> None:
    assert plan([due("b", 5), due("a", 5), due("c", 9)], now=NOW, budget_users=9) == ["c", "a", "b"]


def test_an_active_user_comes_before_one_with_more_pending_who_left_days_ago() -> None:
    assert plan([due("gone", 40, idle_hours=72), due("here", 10)], now=NOW, budget_users=9) == ["here", "gone"]


def test_an_idle_user_is_not_starved_by_a_trickle() -> None:
    assert plan([due("trickle", 16), due("gone", 400, idle_hours=10_000)], now=NOW, budget_users=1) == ["gone"]


def test_a_time_in_the_future_counts_as_now() -> None:
    assert plan([due("a", 5), due("future", 5, idle_hours=-1e4)], now=NOW, budget_users=2) == ["a", "future"]


@pytest.mark.parametrize(("users", "events", "expected"), [(0, None, 0), (2, None, 2), (9, 25, 2), (9, 1, 1)])
def test_budgets_hold_and_the_first_always_fits(users: int, events: int | None, expected: int) -> None:
    chosen = plan([due(name, 10) for name in "abcd"], now=NOW, budget_users=users, budget_events=events)
    assert chosen == list("abcd")[:expected]


@given(st.integers(0, 10**9), st.floats(0.001, 1e12))
def test_the_back_off_doubles_up_to_its_cap_and_never_overflows(failures: int, first: float) -> None:
    wait = retry_at(failures, now=NOW, first_seconds=first) - NOW
    longer = retry_at(failures + 1, now=NOW, first_seconds=first) - NOW
    assert timedelta() < wait <= longer <= timedelta(seconds=LONGEST_RETRY_SECONDS)


def test_the_back_off_starts_with_the_setting() -> None:
    waits = [(retry_at(n, now=NOW, first_seconds=30) - NOW).total_seconds() for n in (1, 2, 3, 4)]
    assert waits == [30, 60, 120, 240]


@pytest.mark.parametrize(("failures", "expected"), [(4, False), (5, True), (6, True)])
def test_quarantine_after_five(failures: int, *, expected: bool) -> None:
    assert should_quarantine(failures, after=5) is expected
