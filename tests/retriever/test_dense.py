"""The dense index against brute force, over any history of adds, trims and frees."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from oppu.errors import FatalError
from oppu.values import UserId
from retriever.dense import DenseIndex, ListKey, Probe

DIM = 8
Rows = NDArray[np.float32]


def unit(rng: np.random.Generator, n: int) -> Rows:
    rows = rng.standard_normal((n, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def key(user: int, task: str = "t", epoch: int = 1) -> ListKey:
    return ListKey(UserId(f"u{user}"), epoch, task)


def brute(held: dict[int, Rows], probe: Probe) -> list[tuple[int, float]]:
    """Return (seq, similarity) of the best visible items by plain numpy."""
    seqs = [s for s in held if probe.first_seq <= s < probe.before_seq and s not in probe.hidden]
    scored = [(round(float(held[s] @ probe.vector), 6), s) for s in seqs]
    scored.sort(key=lambda pair: (-pair[0], -pair[1]))
    return [(seq, score) for score, seq in scored[: probe.want]]


actions = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "add", "repeat", "trim", "free", "release"]),
        st.integers(0, 5),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(actions, st.integers(0, 2**31), st.data())
def test_equals_brute_force_after_any_history(
    steps: list[tuple[str, int, int]], seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    index = DenseIndex(DIM, lists=2)
    held: dict[ListKey, dict[int, Rows]] = {key(u): {} for u in range(6)}
    last = dict.fromkeys(held, 0)
    for action, user, n in steps:
        k = key(user)
        if action in ("add", "repeat"):
            seqs = [last[k] + 1 + 2 * i for i in range(n)]
            rows = unit(rng, n) if action == "add" else np.repeat(unit(rng, 1), n, axis=0)
            index.add(k, seqs, rows)
            held[k].update(zip(seqs, rows, strict=True))
            last[k] = seqs[-1]
        elif action == "trim":
            index.trim(k, n)
            held[k] = {s: row for s, row in held[k].items() if s >= n}
        elif action == "free":
            index.free(k)
            held[k] = {}
        else:
            index.release()
    probes = []
    for k in held:
        first = data.draw(st.integers(0, 30))
        before = data.draw(st.integers(0, last[k] + 2))
        hidden = frozenset(data.draw(st.sets(st.integers(1, 20), max_size=4)))
        want = data.draw(st.integers(0, 60))
        probes.append(Probe(k, unit(rng, 1)[0], want, first, before, hidden))
        probes.append(Probe(k, unit(rng, 1)[0], 3, 0, 10**6))
    for probe, found in zip(probes, index.search(probes), strict=True):
        expected = brute(held[probe.key], probe)
        assert len(found.seqs) == len(expected)
        np.testing.assert_allclose(found.similarities, [s for _, s in expected], atol=2e-6)
        own = [float(held[probe.key][int(s)] @ probe.vector) for s in found.seqs]
        np.testing.assert_allclose(found.similarities, own, atol=2e-6)
        assert len(set(found.seqs.tolist())) == len(found.seqs)
        assert index.size(probe.key) == len(held[probe.key])


def test_result_does_not_depend_on_batch_mates() -> None:
    """Hundreds of equal items: which of them is returned is settled by seq, whatever else is asked in the call."""
    rng, index = np.random.default_rng(0), DenseIndex(DIM)
    row = unit(rng, 1)
    index.add(key(1), list(range(1, 301)), np.repeat(row, 300, axis=0))
    index.add(key(2), list(range(1, 1001)), unit(rng, 1000))
    probe = Probe(key(1), row[0], 5, 1, 1000)
    alone = index.search([probe])[0]
    beside = index.search([Probe(key(2), row[0], 900, 1, 2000), probe])[1]
    assert alone.seqs.tolist() == beside.seqs.tolist() == [300, 299, 298, 297, 296]


def test_a_planted_wrong_map_is_fatal() -> None:
    rng, index = np.random.default_rng(0), DenseIndex(DIM)
    for user in (1, 2):
        index.add(key(user), [1, 2], unit(rng, 2))
    lists = index._lists
    lists[key(1)], lists[key(2)] = lists[key(2)], lists[key(1)]
    with pytest.raises(FatalError, match="another owner"):
        index.search([Probe(key(1), unit(rng, 1)[0], 1, 0, 9)])


def test_a_list_that_kept_its_last_owners_vectors_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, index = np.random.default_rng(0), DenseIndex(DIM)
    index.add(key(1), [1, 2], unit(rng, 2))
    monkeypatch.setattr(DenseIndex, "_clear", lambda self, owned: None)
    index.free(key(1))
    index.add(key(2), [1], unit(rng, 1))
    with pytest.raises(FatalError, match="another owner"):
        index.search([Probe(key(2), unit(rng, 1)[0], 3, 0, 9)])


def test_the_same_seq_of_tasks_and_epochs_stays_apart() -> None:
    rng, index = np.random.default_rng(0), DenseIndex(DIM, lists=1)
    rows = unit(rng, 3)
    keys = [key(1, "a"), key(1, "b"), key(1, "a", epoch=2)]
    for k, row in zip(keys, rows, strict=True):
        index.add(k, [1], row[None])
    found = index.search([Probe(k, rows[0], 5, 0, 9) for k in keys])
    np.testing.assert_allclose([f.similarities[0] for f in found], rows @ rows[0], atol=1e-6)


def test_nothing_to_find() -> None:
    index = DenseIndex(DIM)
    vector = unit(np.random.default_rng(0), 1)[0]
    assert index.search([]) == []
    index.add(key(1), [1], vector[None])
    for probe in (
        Probe(key(2), vector, 4, 0, 9),
        Probe(key(1), vector, 0, 0, 9),
        Probe(key(1), vector, 4, 2, 9),
        Probe(key(1), np.full(DIM, np.nan, np.float32), 4, 0, 9),
    ):
        assert index.search([probe])[0].seqs.tolist() == []


@pytest.mark.parametrize(
    ("seqs", "rows"),
    [
        ([1, 1], (2, DIM)),
        ([2, 1], (2, DIM)),
        ([0], (1, DIM)),
        ([2**28], (1, DIM)),
        ([1], (1, DIM + 1)),
        ([1], (2, DIM)),
    ],
)
def test_bad_input_is_refused(seqs: list[int], rows: tuple[int, int]) -> None:
    index = DenseIndex(DIM)
    with pytest.raises(FatalError):
        index.add(key(1), seqs, np.ones(rows, np.float32))
    with pytest.raises(FatalError):
        index.add(key(2), [1], np.ones((1, DIM), np.float32))
        index.search([Probe(key(2), np.ones(DIM + 1, np.float32), 1, 0, 9)])


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_freed_lists_give_their_memory_back() -> None:
    """Resizing a faiss list to nothing keeps its memory; a bound on residency would then be a bound on nothing."""
    index, rows = DenseIndex(4096), np.ones((2_000, 4096), np.float32)  # 33 MB
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
    trim(0)  # where a base was loaded before, the process keeps what is free until it is told not to
    before = _rss()
    for user in range(4):
        index.add(key(user), list(range(1, len(rows) + 1)), rows)
    assert index.nbytes >= 4 * rows.nbytes
    assert _rss() - before > 3 * rows.nbytes
    for user in range(4):
        index.free(key(user))
    assert index.nbytes < 2**20
    trim(0)
    assert _rss() - before < rows.nbytes


def test_release_leaves_the_others_alone() -> None:
    rng, index, rows = np.random.default_rng(0), DenseIndex(DIM, lists=4), {}
    for user in range(9):
        rows[user] = unit(rng, 50)
        index.add(key(user), list(range(1, 51)), rows[user])
    for user in (0, 3, 8):
        index.free(key(user))
    assert index.nbytes - index.live_bytes >= 3 * 50 * DIM * 4
    index.release()
    assert index.nbytes == index.live_bytes == sum(index.list_bytes(key(user)) for user in range(9))
    index.add(key(8), [7], unit(rng, 1))
    rest = [1, 2, 4, 5, 6, 7]
    found = index.search([Probe(key(user), rows[user][9], 1, 1, 99) for user in rest])
    assert [f.seqs.tolist() for f in found] == [[10]] * 6
    assert index.search([Probe(key(8), rows[1][0], 60, 1, 99)])[0].seqs.tolist() == [7]


def test_a_freed_lists_memory_is_counted_once_when_reused() -> None:
    rng, index = np.random.default_rng(0), DenseIndex(DIM)
    index.add(key(1), list(range(1, 51)), unit(rng, 50))
    index.free(key(1))
    assert index.nbytes == 50 * (DIM * 4 + 8)
    index.add(key(2), [1], unit(rng, 1))
    assert index.nbytes == index.live_bytes == index.list_bytes(key(2)) >= 50 * (DIM * 4 + 8)


def test_accounting_returns_to_zero_and_counts_growth() -> None:
    rng, index = np.random.default_rng(0), DenseIndex(DIM, lists=1)
    for seq in range(1, 50):
        index.add(key(1), [seq], unit(rng, 1))
    assert index.nbytes == index.list_bytes(key(1)) >= 49 * DIM * 4
    index.add(key(2), [1], unit(rng, 1))
    assert index.nbytes == index.list_bytes(key(1)) + index.list_bytes(key(2))
    index.trim(key(1), 40)
    index.free(key(2))
    index.free(key(1))
    index.free(key(1))
    assert index.live_bytes == 0 < index.nbytes
    index.release()
    assert index.nbytes == 0
    assert index.list_bytes(key(1)) == index.size(key(1)) == 0
