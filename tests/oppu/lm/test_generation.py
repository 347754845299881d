"""Texts under a mixture: what is served is what is evaluated, and lateness ends a text while it is written."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from oppu.lm import generation
from oppu.lm.blend import CACHE_EXPERTS, EXPERTS, Blend, Cache, foreseen, mixed, shares
from oppu.lm.encoding import _target
from oppu.lm.generation import Writing, _cast, _Row
from oppu.lm.model import TorchModel
from oppu.lm.port import AdapterRef, Example, Row
from oppu.lm.scoring import Aim
from oppu.settings import ModelSettings
from oppu.tasks import Tasks
from oppu.values import UserId

Make = Callable[..., Any]
CHANCE = np.random.default_rng(3)
WEIGHTS = {name: (float(CHANCE.normal()), float(CHANCE.random())) for name in EXPERTS}
TEXTS = {
    "knn": (("a headline", 1.0), ("another one", 0.5)),
    "prior": (("a head", 2.0),),
    "input": (("words of it", 1.0),),
}
TASK = "news_headline"
ANNA = AdapterRef(UserId("anna"), 0, 1)


@pytest.fixture
def model(make_base: Make, tasks: Tasks, settings: ModelSettings) -> TorchModel:
    return TorchModel(make_base("llama", torch.float64), tasks, settings=settings, slots=4)


def asked(*, adapter: bool = False, blend: bool = True, **more: Any) -> Row:
    fields = {"max_new_tokens": 7, **more}
    return Row(
        TASK, "words of it", adapter=ANNA if adapter else None, blend=Blend(WEIGHTS, TEXTS) if blend else None, **fields
    )


@pytest.mark.parametrize("adapter", [True, False])
def test_the_served_distribution_is_the_evaluated_one(
    model: TorchModel, make_adapter: Make, monkeypatch: pytest.MonkeyPatch, adapter: bool
) -> None:
    tensors = make_adapter(model._base.model, 1)
    model.install(ANNA, tensors)
    steps: list[torch.Tensor] = []
    mix = generation.mixture

    def recorded(*args: Any) -> torch.Tensor:
        steps.append(mix(*args))
        return steps[-1]

    monkeypatch.setattr(generation, "mixture", recorded)
    model.answer([asked(adapter=adapter)])
    written = tuple(int(step[0].argmax()) for step in steps)
    assert len(set(written)) > 1
    target = _target(
        model._encoder.prompts([asked()], [7])[0], written, {at: Aim(None, t) for at, t in enumerate(written)}, 1, 0
    )
    said = []
    for weights in (None, tensors if adapter else None):
        with monkeypatch.context() as patch:
            patch.setattr(model._encoder, "targets", lambda _: [target])
            said.append(np.exp(model.token_scores([Example(TASK, "words of it", "")], weights)[0]))
    if not adapter:
        said[1] = np.full(len(written), np.nan)
    cached, matched = foreseen(model._encoder.caches().of(TEXTS), written)
    experts = np.hstack([np.stack(said, axis=1), cached])
    none = np.zeros((len(written), 2), dtype=np.int64)
    expected = mixed(experts, np.hstack([none, matched]), WEIGHTS)
    served = [float(step[0, token]) for step, token in zip(steps, written, strict=True)]
    np.testing.assert_allclose(served, expected, rtol=1e-9)
    for step in steps:
        assert float(step.sum()) == pytest.approx(1)


def test_mixed_rows_write_what_each_writes_alone(model: TorchModel, make_adapter: Make) -> None:
    model.install(ANNA, make_adapter(model._base.model, 1))
    rows = [asked(adapter=True), asked(), asked(adapter=True, blend=False), asked(blend=False), asked(max_new_tokens=2)]
    together = [scored.text for scored in model.answer(rows)]
    assert together == [model.answer([row])[0].text for row in rows]
    assert len(set(together)) > 2


def test_a_blend_of_the_adapter_alone_is_the_adapter(model: TorchModel, make_adapter: Make) -> None:
    model.install(ANNA, make_adapter(model._base.model, 1))
    only = Row(
        TASK, "words of it", adapter=ANNA, blend=Blend({"base": (-99, 0), "adapter": (0, 0)}, {}), max_new_tokens=7
    )
    assert model.answer([only])[0].text == model.answer([asked(adapter=True, blend=False)])[0].text


def dense(said: torch.Tensor, rows: Any, writings: Any, written: Any) -> torch.Tensor:
    """Every text's mixture as one product of weights ``[texts, rows]`` and all rows."""
    weights, extra = torch.zeros(len(writings), len(rows), dtype=said.dtype), []
    for text, writing in enumerate(writings):
        cached = [one for cache in writing.caches for one in cache.after(tuple(written[text] or ()))]
        speaking = dict.fromkeys(writing.voices, 0) | {one.expert: one.matched for one in cached}
        share = shares(writing.blend.weights, speaking) if writing.blend is not None else {"base": 1.0}
        for at, row in enumerate(rows):
            if row.text == text:
                weights[text, at] = share.get(row.expert, 0.0)
        extra += [(text, one.tokens, share[one.expert] * one.probabilities) for one in cached]
    mixed = weights @ torch.where(said.isnan().any(-1, keepdim=True), 0.0, said)
    for text, tokens, mass in extra:
        mixed[text, torch.from_numpy(tokens)] += torch.from_numpy(mass).to(said)
    return mixed


@pytest.mark.parametrize("kinds", ["plain", "blended", "both"])
@pytest.mark.parametrize("silent", [(), (0,), (0, 1, 2, 3, 4, 5)])
def test_the_next_tokens_are_those_of_the_dense_product(kinds: str, silent: tuple[int, ...]) -> None:
    blend, cache = Blend(WEIGHTS, {}), Cache("knn", [((3, 4, 9), 1.0)])
    plain = [Writing((1,), slot, 5) for slot in (0, 2)]
    blended = [Writing((1,), slot, 5, blend, own) for slot, own in ((2, (cache,)), (0, ()), (3, ()))]
    writings = {"plain": plain, "blended": blended, "both": [plain[0], blended[0], plain[1], *blended[1:]]}[kinds]
    rows = sorted(
        (_Row(slot, text, expert) for text, w in enumerate(writings) for expert, slot in w.voices.items()),
        key=lambda row: row.slot,
    )
    said = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(2)).mul(4).softmax(-1)
    said[[row for row in silent if row < len(rows)]] = torch.nan
    written: list[list[int] | None] = [[3], None, [], [4], []]
    cast = _cast(rows, writings, said.device)
    expected = dense(said, rows, writings, written)
    assert torch.equal(generation.next_tokens(said.clone(), cast, writings, written), expected.argmax(-1))
    if cast.blends:
        mixed = generation.mixture(said.clone(), cast, writings, written)
        assert torch.allclose(mixed, expected[list(cast.blends)], rtol=1e-6, atol=0)


def test_a_late_text_is_given_up_while_it_is_written_and_no_other(
    model: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(100))
    stops: list[int] = []
    mix = generation.next_tokens

    def recorded(*args: Any) -> torch.Tensor:
        stops.append(1)
        return mix(*args)

    monkeypatch.setattr(generation, "next_tokens", recorded)
    late, whole = model.answer([asked(late=lambda: next(times) >= 3, blend=False), asked(blend=False)])
    assert (late.late, late.text) == (True, None)
    assert not whole.late and whole.text == model.answer([asked(blend=False)])[0].text
    stops.clear()
    times = iter(range(100))
    model.answer([asked(late=lambda: next(times) >= 3, blend=False)])
    assert len(stops) <= 3  # the model was not asked again


def test_token_scores_are_the_losses_parts(model: TorchModel, make_adapter: Make) -> None:
    tensors = make_adapter(model._base.model, 2)
    examples = [Example(TASK, "text " * n, "out" * n) for n in (1, 5, 2, 9)]
    for weights in (None, tensors):
        parts = model.token_scores(examples, weights)
        np.testing.assert_allclose([-p.mean() for p in parts], model.losses(examples, weights), rtol=1e-9)
    assert [len(p) for p in parts] == [3 * n + 2 for n in (1, 5, 2, 9)]  # the space before, and the end
    assert len(parts[-1]) <= model.longest_output(TASK)


def test_caches_foresee_an_outputs_tokens_and_its_end(model: TorchModel) -> None:
    [(said, matched)] = model.cached([Example(TASK, "x", "ab")], [{"knn": (("ab", 1.0),)}])
    column = CACHE_EXPERTS.index("knn_next")
    assert said.shape == matched.shape == (len(matched), len(CACHE_EXPERTS))
    np.testing.assert_allclose(said[:, column], 1.0)
    assert np.isnan(said[:, CACHE_EXPERTS.index("prior")]).all()


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "llama"])
def test_a_finished_text_is_not_stepped_past_the_models_end(make_base: Make, tasks: Tasks, family: str) -> None:
    """A prompt as long as the model reads, beside a short one that is written on and on."""
    model = TorchModel(make_base(family), tasks, settings=ModelSettings(max_tokens=256, lora_rank=4), slots=2)
    rows = [Row(TASK, "w " * 400, max_new_tokens=4), Row(TASK, "short", max_new_tokens=60)]
    alone = [model.answer([row])[0].text for row in rows]
    assert [answer.text for answer in model.answer(rows)] == alone
