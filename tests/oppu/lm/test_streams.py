"""Parts of a call on threads of their own: results, gradients, errors and torch's thread numbers stay as they are."""

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oppu.lm import streams, train_jobs, training
from oppu.lm.model import TorchModel
from oppu.lm.port import AdapterRef, Example, Row, TrainConfig, Trained, TrainJob
from oppu.lm.streams import Streams
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from oppu.values import UserId
from tests.oppu.lm.conftest import FAMILIES

Make = Callable[..., Any]
CPU = torch.device("cpu")
CHOICES = ("art", "art house", "beta", "gamma", "a much longer label")
THREADS = 3


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give torch three threads, and let no part be too small."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    monkeypatch.setattr(streams, "_TOKENS", 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pair(three: None, make_base: Make, tasks: Tasks, settings: ModelSettings) -> Iterator[Make]:
    """Return a maker of two models on equal bases: with streams, and without."""
    made: list[TorchModel] = []

    def make(family: str = "llama", dtype: torch.dtype = torch.float64, upper: float = 1.0) -> list[TorchModel]:
        own = settings.model_copy(update={"lora_upper": upper})
        for most in (streams.MOST, 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(streams, "MOST", most)
                made.append(TorchModel(make_base(family, dtype), tasks, settings=own, slots=6))
        return made[-2:]

    yield make
    for model in made:
        model.close()


def ref(user: int) -> AdapterRef:
    return AdapterRef(UserId(f"u{user}"), 0, 1)


def asked(count: int, *, texts: bool) -> list[Row]:
    """Rows of mixed users, some without an adapter, of many lengths, and now and then equal ones."""
    return [
        Row(
            "news_headline" if texts else "movie_tagging",
            f"thing {at % 11} " + "long " * (at * 7 % 9),
            choices=() if texts else CHOICES,
            adapter=ref(at % 5) if at % 4 else None,
            max_new_tokens=3 + at % 4,
        )
        for at in range(count)
    ]


def learnt(count: int, size: int) -> list[TrainJob]:
    return [
        TrainJob(
            UserId(f"u{user}"),
            None,
            tuple(
                Example("movie_tagging", f"film {user} {n} " * (1 + n % 3), CHOICES[n % 5], CHOICES) for n in range(own)
            ),
            seed=user,
        )
        for user, own in ((user, size + user % 3) for user in range(count))
    ]


def parts_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note of every call how many parts it had."""
    seen: list[int] = []
    plain = Streams.run

    def run(self: Streams, work: Any, parts: Sequence[Sequence[int]], *stop: Any) -> None:
        seen.append(len(parts))
        plain(self, work, parts, *stop)

    monkeypatch.setattr(Streams, "run", run)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("upper", "dtype"), [(1.0, torch.float64), (0.5, torch.float64), (1.0, torch.float32)])
def test_answers_scores_and_losses_are_those_of_one_thread(
    family: str, upper: float, dtype: torch.dtype, pair: Make, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, alone = pair(family, dtype, upper)
    near = 1e-9 if dtype == torch.float64 else 1e-3
    adapters = [make_adapter(alone._base.model, seed) for seed in range(5)]
    adapters = [{k: v for k, v in one.items() if k in _keys(alone)} for one in adapters]
    for model in (own, alone):
        for user, adapter in enumerate(adapters):
            model.install(ref(user), adapter)
    seen = parts_of(monkeypatch)
    for rows in (asked(23, texts=False), asked(12, texts=True)):
        mine, theirs = own.answer(rows), alone.answer(rows)
        assert seen == [THREADS, 1]
        seen.clear()
        for one, other in zip(mine, theirs, strict=True):
            assert one.text == other.text
            assert np.allclose(one.scores, other.scores, atol=near)
            assert np.allclose(one.base_scores, other.base_scores, atol=near)
    examples = [*learnt(1, 12)[0].examples, *(Example("news_headline", f"article {n}", "a headline") for n in range(9))]
    losses = own.losses(examples, adapters[0]), alone.losses(examples, adapters[0])
    assert seen == [THREADS, 1] and np.allclose(*losses, atol=near)
    seen.clear()
    scores = own.scores(examples, adapters[1]), alone.scores(examples, adapters[1])
    assert seen == [THREADS, THREADS, 1, 1]  # texts and choices
    assert all(np.allclose(one, other, atol=near) for one, other in zip(*scores, strict=True))


def _keys(model: TorchModel) -> set[str]:
    return {key for keys in model._bank._keys.values() for key in keys}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(("upper", "dtype"), [(1.0, torch.float64), (0.5, torch.float64), (1.0, torch.float32)])
def test_training_is_that_of_one_thread(
    family: str, upper: float, dtype: torch.dtype, pair: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, alone = pair(family, dtype, upper)
    near = (1e-5, 1e-6) if dtype == torch.float64 else (1e-2, 2e-3)
    config, jobs = TrainConfig(1e-2, 0.1, passes=2, batch=3, dropout=0.2), learnt(7, 4)
    seen = parts_of(monkeypatch)
    mine, theirs = (model.train(jobs, config, heartbeat=lambda: None) for model in (own, alone))
    assert seen == [THREADS, 1]
    for one, other in zip(mine, theirs, strict=True):
        assert one.steps == other.steps and one.mean_loss == pytest.approx(other.mean_loss, rel=1e-4)
        assert one.tensors is not None and other.tensors is not None and one.tensors.keys() == other.tensors.keys()
        for key, tensor in one.tensors.items():
            assert np.allclose(tensor, other.tensors[key], *near)
    again: list[Trained] = own.train(jobs, config, heartbeat=lambda: None)
    assert all(np.array_equal(x, y) for x, y in zip(_flat(again), _flat(mine), strict=True))


def _flat(done: Sequence[Trained]) -> list[Any]:
    return [tensor for one in done for tensor in (one.tensors or {}).values()]


def test_who_diverges_spoils_nobody_elses_part(pair: Make, make_adapter: Make) -> None:
    own, _ = pair()
    wild = make_adapter(own._base.model, 1)
    next(iter(wild.values()))[:] = 1e30
    other = make_adapter(own._base.model, 2, rank=9)  # more than there is room for
    jobs = learnt(6, 4)
    jobs[1], jobs[4] = (TrainJob(jobs[at].user_id, parent, jobs[at].examples) for at, parent in ((1, wild), (4, other)))
    done = own.train(jobs, TrainConfig(1e-2, 0.0, passes=1, batch=2), heartbeat=lambda: None)
    assert [one.tensors is None for one in done] == [False, True, False, False, True, False]
    assert done[4].steps == 0 and np.isnan(done[1].mean_loss)


@pytest.mark.parametrize("error", [InterruptedError, KeyboardInterrupt])
def test_a_heartbeat_is_never_called_by_two_and_ends_all_parts(error: type[BaseException], pair: Make) -> None:
    own, _ = pair()
    before, inside, beats, failed_at = _hooks(own), threading.Lock(), 0, 12

    def beat() -> None:
        nonlocal beats
        assert inside.acquire(blocking=False), "two threads are in here"
        time.sleep(0.002)
        beats += 1
        inside.release()
        if beats >= failed_at:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        own.train(learnt(6, 6), TrainConfig(1e-2, 0.0, passes=50, batch=1), heartbeat=beat)
    assert beats == failed_at  # the other parts have heard of it, and did not ask again
    assert _hooks(own) == before


def test_a_part_that_breaks_ends_the_others(pair: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    own, _ = pair()
    plain, beats = training.train_slots, [0]

    def broken(runner: Any, bank: Any, targets: Any, *rest: Any, **named: Any) -> Any:
        if 0 in named["seeds"]:
            raise MemoryError("too much")
        return plain(runner, bank, targets, *rest, **named)

    def beat() -> None:
        beats[0] += 1
        time.sleep(0.01)

    monkeypatch.setattr(train_jobs, "train_slots", broken)
    with pytest.raises(MemoryError, match="too much"):
        own.train(learnt(6, 6), TrainConfig(1e-2, 0.0, passes=50, batch=1), heartbeat=beat)
    assert beats[0] < 20  # of some hundreds


def _hooks(model: TorchModel) -> int:
    return sum(len(module._forward_hooks) for module in model._base.model.modules())


@given(st.lists(st.integers(0, 900), max_size=40), st.integers(1, 4), st.integers(1, 600), st.booleans())
@example([0, 0, 1600], 3, 1, False)
@example([5, 5, 5, 5, 0, 0], 4, 1, False)
@example([9] * 100 + [1] * 10, 2, 1, True)
@settings(max_examples=200, deadline=None)
def test_parts_hold_everything_once_and_are_even(tokens: list[int], cores: int, least: int, paired: bool) -> None:
    own = Streams(CPU)
    own.count = cores
    alike = [at // 2 for at in range(len(tokens))] if paired else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_TOKENS", least)
        parts = own.parts(tokens, alike)
    assert sorted(number for part in parts for number in part) == list(range(len(tokens)))
    assert len(parts) in {1, cores}
    if len(parts) > 1:
        sums = [sum(tokens[number] for number in part) for part in parts]
        assert sum(tokens) >= cores * least and all(parts)
        assert max(sums) <= 1.25 * sum(sums) / cores
        assert not paired or len({(n // 2, at) for at, part in enumerate(parts) for n in part}) == -(-len(tokens) // 2)


@pytest.mark.parametrize(("tokens", "alike"), [([4000, 100], []), ([31] * 110, [0] * 100 + [1] * 10), ([0, 0], [])])
def test_what_cannot_be_divided_evenly_is_one_part(tokens: list[int], alike: list[int]) -> None:
    own = Streams(CPU)
    own.count = 2
    assert own.parts(tokens, alike) == [list(range(len(tokens)))]
    assert len(own.parts([31] * 110)) == 2


@pytest.mark.parametrize(("threads", "shares"), [(3, [1, 1, 1]), (4, [1] * 4), (6, [2, 2, 1, 1]), (9, [3, 2, 2, 2])])
def test_threads_of_torch_are_shared_out_and_nobody_elses_change(threads: int, shares: list[int], three: None) -> None:
    torch.set_num_threads(threads)
    own, found = Streams(CPU), []
    met = threading.Barrier(len(shares))

    def note(_: Sequence[int]) -> None:
        met.wait(10)  # so that each is on a thread of its own
        torch.randn(300, 300) @ torch.randn(300, 300)
        found.append((threading.get_ident(), torch.get_num_threads()))

    for _ in range(2):
        own.run(note, [[at] for at in range(len(shares))])
    assert len({thread for thread, _ in found}) == len(shares)
    assert sorted((number for _, number in found[: len(shares)]), reverse=True) == shares
    assert torch.get_num_threads() == threads
    late: list[int] = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [threads]
    own.close()
    own.close()
    assert own.parts([9000, 9000]) == [[0, 1]]
    own.run(lambda part: found.append((part[0], 0)), [[7], [8]])  # on the caller's thread
    assert found[-2:] == [(7, 0), (8, 0)]


def test_without_threads_nothing_is_divided(three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = threading.Thread.start

    def scarce(thread: threading.Thread) -> None:
        if thread.name == "stream_2":
            raise RuntimeError("can't start new thread")
        begin(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", scarce)
        own = Streams(CPU)
    assert own.count == 1 and own.parts([9000] * 9) == [list(range(9))]
    assert torch.get_num_threads() == THREADS
    for thread in threading.enumerate():
        if thread.name.startswith("stream_"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("parts", [[[0]], [[0], [1]]])
def test_gradients_are_the_callers(wanted: bool, parts: list[list[int]], three: None) -> None:
    own, found = Streams(CPU), []
    with torch.set_grad_enabled(wanted):
        own.run(lambda _: found.append(torch.is_grad_enabled()), parts)
        assert torch.is_grad_enabled() is wanted
    assert found == [wanted] * len(parts)
    own.close()


def test_an_interrupted_caller_waits_for_the_parts_that_it_stops(three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    own, ended, told, stopped = Streams(CPU), [], threading.Event(), []
    begun = threading.Barrier(THREADS + 1)

    def work(part: Sequence[int]) -> None:
        begun.wait(10)
        assert told.wait(10)
        ended.append(part[0])

    def stop(error: BaseException) -> None:
        stopped.append(error)
        told.set()

    calls = []

    def interrupted(running: Any) -> None:
        calls.append(running)
        if len(calls) == 1:
            begun.wait(10)
            raise KeyboardInterrupt
        wait(running)

    monkeypatch.setattr(streams, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own.run(work, [[0], [1], [2]], stop)
    assert sorted(ended) == [0, 1, 2] and len(stopped) == 1
    own.close()


def test_an_error_comes_when_all_have_ended(three: None, caplog: pytest.LogCaptureFixture) -> None:
    own, ended = Streams(CPU), []

    def work(part: Sequence[int]) -> None:
        if part[0] == 1:
            raise ValueError("part 1")
        time.sleep(0.1)
        if part[0] == 4:
            raise ValueError("part 4")
        ended.append(part[0])

    with pytest.raises(ValueError, match="part 1"):
        own.run(work, [[0], [1], [2]])
    assert sorted(ended) == [0, 2] and not caplog.records
    with pytest.raises(ValueError, match="part 1"):
        own.run(work, [[1], [4], [5]])
    assert "part 4" in caplog.text and ended.pop() == 5
    own.run(lambda part: ended.append(part[0]), [[3], [4]])  # and it goes on
    assert sorted(ended) == [0, 2, 3, 4]
    own.close()


def test_one_thread_a_gpu_or_little_work_is_one_part(three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(Streams(CPU).parts([9, 9, 9])) == THREADS
    assert Streams(torch.device("cuda")).parts([9, 9, 9]) == [[0, 1, 2]]
    monkeypatch.setattr(streams, "_TOKENS", 10)
    assert Streams(CPU).parts([9, 9, 9]) == [[0, 1, 2]]
    monkeypatch.setattr(streams, "_TOKENS", 1)
    assert Streams(CPU).parts([9, 9]) == [[0, 1]]
    torch.set_num_threads(1)
    assert Streams(CPU).parts([9, 9, 9]) == [[0, 1, 2]]
    assert Streams(CPU).parts([]) == [[]]


def test_a_model_that_runs_in_streams_can_be_copied(pair: Make) -> None:
    own, _ = pair()
    rows = [Row(row.task, row.input, choices=row.choices) for row in asked(6, texts=False)]
    expected = own.answer(rows)
    other, ids = copy.deepcopy(own._base.model), torch.tensor([[1, 2, 3], [3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, own._base.model(input_ids=ids).logits)
    assert np.allclose(expected[0].scores, own.answer(rows)[0].scores)
