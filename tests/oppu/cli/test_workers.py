"""What a worker says of itself while it is built."""

import gc
import signal
from collections.abc import Iterator

import pytest

from oppu.cli.workers import _Stopping, _wait_for, settle_heap
from oppu.clock import ManualClock
from oppu.errors import TransientError
from oppu.health import Health
from oppu.settings import ServiceSettings, Settings


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> _Stopping:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of the tests stay
    return _Stopping()


@pytest.mark.parametrize("refusals", [0, 1])
def test_a_worker_that_loads_for_long_is_live_and_not_ready(stopping: _Stopping, refusals: int) -> None:
    clock = ManualClock()
    health = Health(clock, live_within_seconds=10)
    seen = []

    def build() -> str:
        clock.advance(1000)
        seen.append((health.is_live(), health.reasons()))
        if len(seen) <= refusals:
            raise TransientError("away")
        return "worker"

    settings = Settings(service=ServiceSettings(max_backoff_seconds=0.01))
    assert _wait_for(build, settings, health, stopping) == "worker"
    reasons = ["starting", *["broker or store is away"] * refusals]
    assert seen == [(True, {"start": reason}) for reason in reasons]
    assert health.is_live() and health.is_ready()
    clock.advance(11)
    assert not health.is_live(), "from now on it counts"


@pytest.fixture
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_what_start_up_made_is_collected_no_more() -> None:
    early: list[object] = []
    settle_heap()
    late: list[object] = []
    looked_at = {id(found) for found in gc.get_objects()}
    assert id(late) in looked_at
    assert id(early) not in looked_at
