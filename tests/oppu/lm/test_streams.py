"""Parts of a call on threads of their own: results, gradients, errors and torch's thread numbers stay as they are."""

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oppu.lm import streams
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

    def run(self: Streams, work: Callable[[Sequence[int]], None], parts: Sequence[Sequence[int]]) -> None:
        seen.append(len(parts))
        plain(self, work, parts)

    monkeypatch.setattr(Streams, "run", run)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("upper", [1.0, 0.5])
def test_answers_scores_and_losses_are_those_of_one_thread(
    family: str, upper: float, pair: Make, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, alone = pair(family, upper=upper)
    adapters = [make_adapter(alone._base.model, seed) for seed in range(5)]
    adapters = [{k: v for k, v in one.items() if k in _keys(alone)} for one in adapters]
    for model in (own, alone):
        for user, adapter in enumerate(adapters):
            model.install(ref(user), adapter)
    seen = parts_of(monkeypatch)
    for rows in (asked(23, texts=False), asked(9, texts=True), [*asked(5, texts=True), *asked(6, texts=False)]):
        for mine, theirs in zip(own.answer(rows), alone.answer(rows), strict=True):
            assert mine.text == theirs.text
            assert np.allclose(mine.scores, theirs.scores, atol=1e-9)
            assert np.allclose(mine.base_scores, theirs.base_scores, atol=1e-9)
    examples = [*learnt(1, 9)[0].examples, Example("news_headline", "an article", "a headline")] * 2
    assert np.allclose(own.losses(examples, adapters[0]), alone.losses(examples, adapters[0]), atol=1e-9)
    for mine, theirs in zip(own.scores(examples, adapters[1]), alone.scores(examples, adapters[1]), strict=True):
        assert np.allclose(mine, theirs, atol=1e-9)
    assert max(seen) == THREADS and min(seen) == 1


def _keys(model: TorchModel) -> set[str]:
    return {key for keys in model._bank._keys.values() for key in keys}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("upper", [1.0, 0.5])
def test_training_is_that_of_one_thread(family: str, upper: float, pair: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    own, alone = pair(family, upper=upper)
    config, jobs = TrainConfig(1e-2, 0.1, passes=2, batch=3, dropout=0.2), learnt(7, 4)
    seen = parts_of(monkeypatch)
    mine, theirs = (model.train(jobs, config, heartbeat=lambda: None) for model in (own, alone))
    assert seen == [THREADS, 1]
    for one, other in zip(mine, theirs, strict=True):
        assert one.steps == other.steps and one.mean_loss == pytest.approx(other.mean_loss, rel=1e-6)
        assert one.tensors is not None and other.tensors is not None and one.tensors.keys() == other.tensors.keys()
        for key, tensor in one.tensors.items():
            assert np.allclose(tensor, other.tensors[key], rtol=1e-5, atol=1e-6)
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


def test_a_heartbeat_is_never_called_by_two_and_ends_all_parts(pair: Make) -> None:
    own, _ = pair()
    before, inside, beats, failed_at = _hooks(own), threading.Lock(), 0, 12

    def beat() -> None:
        nonlocal beats
        assert inside.acquire(blocking=False), "two threads are in here"
        time.sleep(0.002)
        beats += 1
        inside.release()
        if beats >= failed_at:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        own.train(learnt(6, 6), TrainConfig(1e-2, 0.0, passes=50, batch=1), heartbeat=beat)
    assert beats == failed_at  # the other parts have heard of it, and did not ask again
    assert _hooks(own) == before


def _hooks(model: TorchModel) -> int:
    return sum(len(module._forward_hooks) for module in model._base.model.modules())


@given(st.lists(st.integers(0, 900), max_size=40), st.integers(1, 4), st.integers(1, 600), st.booleans())
@settings(max_examples=200, deadline=None)
def test_parts_hold_everything_once_and_are_even(tokens: list[int], cores: int, least: int, paired: bool) -> None:
    own = Streams(CPU)
    own._count = cores
    alike = [at // 2 for at in range(len(tokens))] if paired else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_TOKENS", least)
        parts = own.parts(tokens, alike)
    assert sorted(number for part in parts for number in part) == list(range(len(tokens)))
    assert 1 <= len(parts) <= cores
    if len(parts) > 1:
        sums = [sum(tokens[number] for number in part) for part in parts]
        assert sum(tokens) >= len(parts) * least and all(parts)
        assert max(sums) - min(sums) <= (2 if paired else 1) * max(tokens)
        assert not paired or len({(n // 2, at) for at, part in enumerate(parts) for n in part}) == -(-len(tokens) // 2)


def test_threads_of_torch_are_shared_out_and_nobody_elses_change(three: None) -> None:
    own, found, met = Streams(CPU), [], threading.Barrier(THREADS)

    def note(_: Sequence[int]) -> None:
        met.wait(10)  # so that each is on a thread of its own
        torch.randn(300, 300) @ torch.randn(300, 300)
        found.append((threading.get_ident(), torch.get_num_threads()))

    for _ in range(2):
        own.run(note, [[0], [1], [2]])
    assert len({thread for thread, _ in found}) == THREADS
    assert [threads for _, threads in found] == [1] * 2 * THREADS
    assert torch.get_num_threads() == THREADS
    late: list[int] = []
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [THREADS]
    own.close()
    own.close()


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("parts", [[[0]], [[0], [1]]])
def test_gradients_are_the_callers(wanted: bool, parts: list[list[int]], three: None) -> None:
    own, found = Streams(CPU), []
    with torch.set_grad_enabled(wanted):
        own.run(lambda _: found.append(torch.is_grad_enabled()), parts)
        assert torch.is_grad_enabled() is wanted
    assert found == [wanted] * len(parts)
    own.close()


def test_an_error_comes_when_all_have_ended(three: None) -> None:
    own, ended = Streams(CPU), []

    def work(part: Sequence[int]) -> None:
        if part[0] == 1:
            raise ValueError("part 1")
        time.sleep(0.1)
        ended.append(part[0])

    with pytest.raises(ValueError, match="part 1"):
        own.run(work, [[0], [1], [2]])
    assert sorted(ended) == [0, 2]
    own.run(lambda part: ended.append(part[0]), [[3], [4]])  # and it goes on
    assert sorted(ended) == [0, 2, 3, 4]
    own.close()


def test_one_thread_a_gpu_or_little_work_is_one_part(three: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(Streams(CPU).parts([9, 9, 9])) == THREADS
    assert Streams(torch.device("cuda")).parts([9, 9, 9]) == [[0, 1, 2]]
    monkeypatch.setattr(streams, "_TOKENS", 28)
    assert Streams(CPU).parts([9, 9, 9]) == [[0, 1, 2]]
    monkeypatch.setattr(streams, "_TOKENS", 1)
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
