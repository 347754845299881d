"""What the guard remembers over the death of its process."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from oppu.crash_guard import DEATHS_BEFORE_SINGLE, CrashGuard, NullGuard
from oppu.values import Partition, Record

A, B = Partition("events", 0), Partition("events", 1)


def _records(partition: Partition, *offsets: int) -> list[Record]:
    return [Record(partition, offset, 0, b"k", b"v") for offset in offsets]


def _offsets(groups: Sequence[Sequence[Record]]) -> list[list[int]]:
    return [[record.offset for record in group] for group in groups]


def _die(path: Path, group: Sequence[Record]) -> None:
    """A process that marks a group and is never heard of again."""
    CrashGuard(path).entering(group)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ingest.inflight.json"


def test_a_new_guard_suspects_nothing(path: Path) -> None:
    guard = CrashGuard(path)
    records = _records(A, 1, 2, 3)
    assert _offsets(guard.split(records)) == [[1, 2, 3]]
    assert not guard.poisonous(records[:1])


def test_an_empty_poll_is_one_empty_group(path: Path) -> None:
    assert CrashGuard(path).split([]) == [[]]
    assert NullGuard().split([]) == [[]]


def test_an_empty_group_is_not_marked(path: Path) -> None:
    CrashGuard(path).entering([])
    assert not path.exists()


def test_one_death_changes_nothing(path: Path) -> None:
    _die(path, _records(A, 1, 2, 3))
    assert _offsets(CrashGuard(path).split(_records(A, 1, 2, 3))) == [[1, 2, 3]]


def test_after_two_deaths_a_batch_is_taken_one_by_one(path: Path) -> None:
    _die(path, _records(A, 1, 2, 3))
    _die(path, _records(A, 1, 2, 3))
    assert _offsets(CrashGuard(path).split(_records(A, 1, 2, 3, 4, 5))) == [[1], [2], [3], [4, 5]]


def test_what_two_deaths_share_is_suspected(path: Path) -> None:
    _die(path, _records(A, 1, 2, 3, 4))
    _die(path, _records(A, 3, 4, 5, 6))
    assert _offsets(CrashGuard(path).split(_records(A, 3, 4, 5, 6))) == [[3], [4], [5, 6]]


def test_deaths_in_different_places_are_not_added_up(path: Path) -> None:
    _die(path, _records(A, 1, 2))
    _die(path, _records(A, 3, 4))
    assert _offsets(CrashGuard(path).split(_records(A, 3, 4))) == [[3, 4]]


def test_partitions_are_suspected_on_their_own(path: Path) -> None:
    _die(path, _records(A, 1, 2) + _records(B, 7))
    _die(path, _records(A, 1, 2) + _records(B, 8))
    groups = CrashGuard(path).split(_records(B, 8) + _records(A, 1, 2) + _records(B, 9))
    assert _offsets(groups) == [[8], [1], [2], [9]]


def test_a_left_step_is_no_death(path: Path) -> None:
    for _ in range(3):
        guard = CrashGuard(path)
        guard.entering(_records(A, 1, 2))
        guard.leaving({})
    assert _offsets(CrashGuard(path).split(_records(A, 1, 2))) == [[1, 2]]


def test_finished_records_are_suspected_no_more(path: Path) -> None:
    _die(path, _records(A, 1, 2))
    _die(path, _records(A, 1, 2))
    guard = CrashGuard(path)
    guard.entering(_records(A, 1))
    guard.leaving({A: 2})
    assert _offsets(guard.split(_records(A, 2, 3))) == [[2], [3]]
    guard.entering(_records(A, 2))
    guard.leaving({A: 3})
    assert json.loads(path.read_text())["suspects"] == []


def test_only_the_record_that_dies_alone_twice_is_poison(path: Path) -> None:
    _die(path, _records(A, 1, 2, 3))
    _die(path, _records(A, 1, 2, 3))
    for _ in range(2):
        guard = CrashGuard(path)
        assert not guard.poisonous(_records(A, 2))
        guard.entering(_records(A, 2))
    guard = CrashGuard(path)
    assert guard.poisonous(_records(A, 2))
    assert not guard.poisonous(_records(A, 1))
    assert not guard.poisonous(_records(A, 3))
    assert not guard.poisonous(_records(B, 2))
    assert not guard.poisonous(_records(A, 2, 3)), "a group is never poison"
    guard.leaving({A: 3})
    assert json.loads(path.read_text())["alone"] == []


def test_one_poison_after_the_other_is_rather_something_else(path: Path) -> None:
    asked = []
    for offset in (1, 2, 3, 4):
        for _ in range(DEATHS_BEFORE_SINGLE):
            _die(path, _records(A, offset, offset + 1))
        deaths = 0
        while not CrashGuard(path).poisonous(_records(A, offset)):
            _die(path, _records(A, offset))
            deaths += 1
        CrashGuard(path).leaving({A: offset + 1})
        asked.append(deaths)
        if offset == 3:
            guard = CrashGuard(path)
            guard.entering(_records(B, 7))
            guard.leaving({B: 8})
    assert asked == [2, 4, 8, 2]


def test_a_lone_record_that_nobody_suspects_is_a_batch(path: Path) -> None:
    for _ in range(3):
        _die(path, _records(A, 5))
    assert not CrashGuard(path).poisonous(_records(A, 5)), "two deaths to be suspected, one since"
    _die(path, _records(A, 5))
    assert CrashGuard(path).poisonous(_records(A, 5))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"mark": 1}', '{"mark":[{"x":1}],"suspects":[]}', "\0" * 40])
def test_a_damaged_file_is_as_good_as_none(path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_text(content)
    guard = CrashGuard(path)
    assert _offsets(guard.split(_records(A, 1, 2))) == [[1, 2]]
    assert "cannot read" in caplog.text
    guard.entering(_records(A, 1))
    assert json.loads(path.read_text())["mark"]


def test_a_mark_that_cannot_be_written_does_not_stop_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    guard = CrashGuard(tmp_path / "file" / "guard.json")
    for _ in range(3):
        guard.entering(_records(A, 1))
        guard.leaving({A: 2})
    assert caplog.text.count("cannot mark records") == 1


def test_processes_of_one_stage_take_different_files_and_find_them_again(tmp_path: Path) -> None:
    first, second = CrashGuard.claim(tmp_path, "ingest"), CrashGuard.claim(tmp_path, "ingest")
    assert (first.slot, second.slot) == (0, 1)
    first.entering(_records(A, 1))
    second.entering(_records(B, 1))
    assert len(list(tmp_path.glob("ingest.*.json"))) == 2
    first.close()
    again = CrashGuard.claim(tmp_path, "ingest")  # counts the first one's death, then its own
    again.entering(_records(A, 1))
    again.close()
    third = CrashGuard.claim(tmp_path, "ingest")
    assert third.slot == 0
    assert _offsets(third.split(_records(A, 1, 2))) == [[1], [2]]
    assert _offsets(third.split(_records(B, 1, 2))) == [[1, 2]]
    third.close()
    second.close()


def test_marks_survive_kill_minus_9(path: Path) -> None:
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from oppu.crash_guard import CrashGuard
        from oppu.values import Partition, Record

        records = [Record(Partition("events", 0), n, 0, None, None) for n in (7, 8, 9)]
        guard = CrashGuard(Path(sys.argv[1]))
        for group in guard.split(records):
            if guard.poisonous(group):
                print("poison", group[0].offset)
                guard.leaving({group[0].partition: group[0].offset + 1})
                continue
            guard.entering(group)
            if any(record.offset == 8 for record in group):
                sys.stdout.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            guard.leaving({group[0].partition: group[-1].offset + 1})
            print("done", group[0].offset)
    """)
    ends = []
    for _ in range(5):
        root = Path(__file__).resolve().parents[2]
        run = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            capture_output=True,
            text=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            timeout=60,
        )
        ends.append((run.returncode, run.stdout.split("\n")[:-1]))
    assert ends[:4] == [(-9, []), (-9, []), (-9, ["done 7"]), (-9, ["done 7"])]
    assert ends[4] == (0, ["done 7", "poison 8", "done 9"])
