"""The keeper by itself, with a small script in the broker's place."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from oppu.kafka.embedded import KEEPER
from oppu.kafka.ownership import read_record

IDLE = "import time; time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {IDLE}"

Keep = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def keep(tmp_path: Path) -> Iterator[Keep]:
    """Start keepers; whatever is left of them is killed at the end."""
    keepers: list[subprocess.Popen[bytes]] = []

    def start(script: str, **changes: object) -> "subprocess.Popen[bytes]":
        order = {
            **{"parent": os.getpid(), "command": [sys.executable, "-c", script], "pid": 0, "grace_seconds": 10.0},
            **{"record": str(tmp_path / "pid"), "log": str(tmp_path / "log"), "bootstrap_servers": "here:1"},
            **changes,
        }
        keepers.append(
            subprocess.Popen(
                [sys.executable, "-P", str(KEEPER), json.dumps(order)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        )
        return keepers[-1]

    yield start
    for keeper in keepers:
        keeper.kill()
        keeper.wait()
        for pipe in (keeper.stdin, keeper.stdout):
            if pipe:
                pipe.close()


def answer(keeper: "subprocess.Popen[bytes]") -> int:
    assert keeper.stdout is not None
    return int(keeper.stdout.readline())


def hang_up(keeper: "subprocess.Popen[bytes]") -> None:
    assert keeper.stdin is not None
    keeper.stdin.close()


def wait_for_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + 10
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_record_names_broker_keeper_and_owner(keep: Keep, tmp_path: Path) -> None:
    keeper = keep(IDLE)
    pid = answer(keeper)
    record = read_record(tmp_path / "pid")
    assert record is not None
    assert (record.broker.pid, record.keeper.pid, record.owner) == (pid, keeper.pid, os.getpid())
    assert record.broker.started == psutil.Process(pid).create_time()
    assert record.bootstrap_servers == "here:1"


@pytest.mark.parametrize("how", ["hang_up", "signal"])
def test_the_broker_ends_with_its_owner(keep: Keep, tmp_path: Path, how: str) -> None:
    keeper = keep(IDLE)
    pid = answer(keeper)
    if how == "hang_up":
        hang_up(keeper)
    else:
        keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(10) == 0
    assert not psutil.pid_exists(pid)
    assert not (tmp_path / "pid").exists()


def test_an_owner_whose_pipe_lives_on_in_a_fork_is_still_missed(keep: Keep) -> None:
    keeper = keep(IDLE, parent=os.getpid() + 1)  # as seen by a keeper that was handed to another parent
    pid = answer(keeper)
    assert keeper.wait(10) == 0
    assert not psutil.pid_exists(pid)


def test_a_broker_that_ends_by_itself_ends_its_keeper(keep: Keep, tmp_path: Path) -> None:
    keeper = keep("print('bye')")
    answer(keeper)
    assert keeper.wait(10) == 1
    assert (tmp_path / "log").read_text() == "bye\n"
    assert not (tmp_path / "pid").exists()


def test_a_broker_that_ignores_sigterm_is_killed_after_the_grace(keep: Keep, tmp_path: Path) -> None:
    keeper = keep(STUBBORN, grace_seconds=0.3)
    pid = answer(keeper)
    wait_for_text(tmp_path / "log", "deaf")
    hang_up(keeper)
    assert keeper.wait(10) == 0
    assert not psutil.pid_exists(pid)


def test_a_pid_file_that_cannot_be_written_leaves_no_broker(keep: Keep, tmp_path: Path) -> None:
    started = f"from pathlib import Path; import os; Path({str(tmp_path / 'x')!r}).write_text(str(os.getpid())); "
    keeper = keep(started + IDLE, record=str(tmp_path / "missing" / "pid"))
    assert keeper.stdout is not None
    assert keeper.stdout.readline() == b""
    assert keeper.wait(10) == 1
    marker = tmp_path / "x"
    assert not marker.exists() or not psutil.pid_exists(int(marker.read_text() or 0))


def test_a_command_that_cannot_run_is_reported_by_silence(keep: Keep, tmp_path: Path) -> None:
    keeper = keep("", command=[str(tmp_path / "no-java")])
    assert keeper.stdout is not None
    assert keeper.stdout.readline() == b""
    assert keeper.wait(10) == 1


def test_an_adopted_broker_ends_with_its_new_owner(keep: Keep) -> None:
    with psutil.Popen([sys.executable, "-c", IDLE]) as orphan:
        keeper = keep("", command=[], pid=orphan.pid)
        assert answer(keeper) == orphan.pid
        hang_up(keeper)
        assert keeper.wait(10) == 0
        assert orphan.wait(5) == -signal.SIGTERM
