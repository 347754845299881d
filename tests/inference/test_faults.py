"""How long failed versions are held back, and when failures mean that the registry is away."""

import pytest

from inference.faults import AWAY_SECONDS, HOLD_BACK_SECONDS, RETRY_SECONDS, Faults
from oppu.clock import ManualClock
from oppu.lm.port import AdapterRef
from oppu.values import UserId

REF, OTHER = AdapterRef(UserId("anna"), 0, 1), AdapterRef(UserId("ben"), 0, 1)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def faults(clock: ManualClock) -> Faults:
    return Faults(clock)


def test_what_is_unreadable_is_held_back_longer_than_what_met_an_error(faults: Faults, clock: ManualClock) -> None:
    faults.unreadable(REF)
    faults.failed(OTHER)
    assert faults.held_back(REF) and faults.held_back(OTHER)
    clock.advance(HOLD_BACK_SECONDS)
    assert faults.held_back(REF) and not faults.held_back(OTHER)
    clock.advance(RETRY_SECONDS - HOLD_BACK_SECONDS)
    assert not faults.held_back(REF)


def test_a_registry_that_is_away_is_asked_again_at_once(faults: Faults) -> None:
    faults.failed(REF)
    assert faults.away([REF], answered=False)
    assert not faults.held_back(REF)


def test_a_version_that_fails_for_long_says_nothing_of_the_registry(faults: Faults, clock: ManualClock) -> None:
    faults.failed(REF)
    assert faults.away([REF], answered=False)
    clock.advance(AWAY_SECONDS)
    faults.failed(REF)
    assert not faults.away([REF], answered=False)
    assert faults.held_back(REF)
    faults.failed(OTHER)
    assert faults.away([REF, OTHER], answered=False)


def test_a_version_that_failed_beside_others_that_were_read_is_no_sign_later_either(
    faults: Faults, clock: ManualClock
) -> None:
    faults.failed(REF)
    assert not faults.away([REF], answered=True)
    clock.advance(HOLD_BACK_SECONDS)
    faults.failed(REF)
    assert not faults.away([REF], answered=False)


def test_a_read_takes_everything_back(faults: Faults, clock: ManualClock) -> None:
    faults.failed(REF)
    clock.advance(AWAY_SECONDS)
    faults.read(REF)
    assert not faults.held_back(REF)
    faults.failed(REF)
    assert faults.away([REF], answered=False)


def test_what_is_over_is_forgotten(faults: Faults, clock: ManualClock) -> None:
    faults.failed(REF)
    clock.advance(3600)
    faults.forget()
    faults.failed(REF)
    assert faults.away([REF], answered=False)
