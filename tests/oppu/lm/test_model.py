"""The facade: answers of mixed users, losses, training through the port, and what reaches the registry."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from oppu.errors import AdapterUnreadable, InvalidRecord
from oppu.lm.blend import Blend
from oppu.lm.model import TorchModel
from oppu.lm.port import AdapterRef, Example, LanguageModel, Row, TrainConfig, TrainJob
from oppu.settings import ModelSettings
from oppu.tasks import Task, Tasks
from oppu.values import UserId

Make = Callable[..., Any]
CHOICES = ("alpha", "beta", "bravo", "be", "alphabet")
BLEND = Blend({"base": (0.0, 0.0), "adapter": (0.0, 0.0)}, {})
CONFIG = TrainConfig(learning_rate=1e-2, weight_decay=0.01, passes=4, batch=4)


@pytest.fixture
def make_model(make_base: Make, tasks: Tasks, settings: ModelSettings) -> Make:
    """Return a maker of models over tiny bases."""

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, slots: int = 8, **more: Any) -> TorchModel:
        return TorchModel(make_base(family, dtype), tasks, settings=settings, slots=slots, **more)

    return make


def ref(name: str, version: int = 1) -> AdapterRef:
    return AdapterRef(UserId(name), 0, version)


def install(model: TorchModel, make_adapter: Make, names: str) -> None:
    for at, name in enumerate(names):
        model.install(ref(name), make_adapter(model._base.model, at + 1))


def row(user: str | None, text: str, choices: tuple[str, ...] = CHOICES, **more: Any) -> Row:
    adapter = ref(user) if user else None
    return Row("movie_tagging" if choices else "news_headline", text, choices=choices, adapter=adapter, **more)


def rows() -> list[Row]:
    evidence = (("an earlier film", "beta"), ("another", "be"))
    return [
        row("a", "short"),
        row("b", "a much longer text about a film " * 3, evidence=evidence),
        row(None, "nobody's", profile="likes beta"),
        row("b", "text " * 5, choices=(), max_new_tokens=6),
        row("a", "a", choices=(), max_new_tokens=9),
        row("a", "only one", choices=("x",)),
    ]


def test_keeps_the_port(make_model: Make) -> None:
    model: LanguageModel = make_model()
    assert model.base == "0" * 32


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma", "gpt2", "bert"])
def test_a_rows_answer_does_not_depend_on_its_batch_mates(family: str, make_model: Make, make_adapter: Make) -> None:
    model = make_model(family, torch.float64)
    install(model, make_adapter, "ab")
    together = model.answer(rows())
    turned = model.answer(rows()[::-1])[::-1]
    alone = [model.answer([one])[0] for one in rows()]
    for answers in (turned, alone):
        for mine, other in zip(together, answers, strict=True):
            assert mine.text == other.text
            assert np.allclose(mine.scores, other.scores, atol=1e-9)
            assert np.allclose(mine.base_scores, other.base_scores, atol=1e-9)


def test_scores_are_log_probabilities_with_and_without_the_adapter(make_model: Make, make_adapter: Make) -> None:
    model = make_model()
    install(model, make_adapter, "ab")
    found = model.answer(rows())
    for scored in (found[0], found[1], found[2]):
        assert np.exp(scored.scores).sum() == pytest.approx(1)
        assert np.exp(scored.base_scores).sum() == pytest.approx(1)
    assert np.abs(found[0].scores - found[0].base_scores).max() > 0.01
    assert found[2].scores is found[2].base_scores
    assert found[3].scores.size == 0 and isinstance(found[3].text, str)
    assert found[5].scores.tolist() == [0.0]


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bert"])
def test_generation_equals_recomputing_every_token(family: str, make_model: Make, make_adapter: Make) -> None:
    model = make_model(family, torch.float64)
    install(model, make_adapter, "ab")
    asked = [row("a", "text " * 8, choices=(), max_new_tokens=12), row("b", "x", choices=(), max_new_tokens=12)]
    prompts = model._encoder.prompts(asked, [12, 12])
    for slot, prompt, scored in zip((1, 2), prompts, model.answer(asked), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12:
            with model._bank.use([slot]), torch.no_grad():
                token = int(model._base.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in model._encoder.stops:
                break
            ids.append(token)
        expected = model._base.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
        assert scored.text == expected


def test_text_stops_at_the_models_last_position(make_model: Make) -> None:
    model = make_model("gpt2")
    answer = model.answer([row(None, "x" * 500, choices=(), max_new_tokens=400)])[0]
    assert answer.text is not None


def test_losses_agree_with_scores(make_model: Make, make_adapter: Make) -> None:
    model = make_model(dtype=torch.float64)
    tensors = make_adapter(model._base.model, 3)
    examples = [Example("movie_tagging", f"film {n}" * n, CHOICES[n % 5], CHOICES) for n in range(7)]
    for weights in (None, tensors):
        scores = model.scores(examples, weights)
        losses = model.losses(examples, weights)
        expected = [-s[e.choices.index(e.output)] for s, e in zip(scores, examples, strict=True)]
        assert np.allclose(losses, expected, atol=1e-9)
    model.install(ref("a"), tensors)
    answers = model.answer([Row(e.task, e.input, choices=e.choices, adapter=ref("a")) for e in examples])
    for scored, expected in zip(answers, model.scores(examples, tensors), strict=True):
        assert np.allclose(scored.scores, expected, atol=1e-9)


def test_scores_of_texts_stand_beside_those_of_choices(make_model: Make, make_adapter: Make) -> None:
    model = make_model(dtype=torch.float64)
    tensors = make_adapter(model._base.model, 3)
    texts = [Example("news_headline", "some article", "abc"), Example("news_headline", "another", "a longer output")]
    choice = Example("movie_tagging", "film", CHOICES[1], CHOICES)
    first, middle, last = model.scores([texts[0], choice, texts[1]], tensors)
    assert middle.shape == (len(CHOICES),)
    assert np.allclose(middle, model.scores([choice], tensors)[0], atol=1e-9)
    for said, example in zip((first, last), texts, strict=True):
        assert -said.mean() == pytest.approx(model.losses([example], tensors)[0], abs=1e-9)


def test_loss_of_text_is_the_mean_over_its_tokens(make_model: Make) -> None:
    model = make_model(dtype=torch.float64)
    example = Example("news_headline", "some article", "abc")
    target = model._encoder.targets([example])[0]
    with torch.no_grad():
        logits = model._base.model(input_ids=torch.tensor([target.ids])).logits[0].log_softmax(-1)
    wanted = [*target.ids[target.prompt_tokens :], model._encoder._prompts.end]
    by_hand = -np.mean([float(logits[target.prompt_tokens - 1 + at, token]) for at, token in enumerate(wanted)])
    assert len(wanted) == 5  # the space before the answer is a token of this tokenizer; then a, b, c, end
    assert model.losses([example], None)[0] == pytest.approx(by_hand)


def by_hand(model: TorchModel, ids: list[int], first: int) -> float:
    """The mean loss of ``ids[first:]``, each given all before it, from the plain model's logits."""
    with torch.no_grad():
        logits = model._base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -float(np.mean([float(logits[at - 1, ids[at]]) for at in range(first, len(ids))]))


@pytest.mark.parametrize("choices", [(), CHOICES])
def test_a_text_without_an_output_has_the_next_token_loss(make_model: Make, choices: tuple[str, ...]) -> None:
    model = make_model(dtype=torch.float64)
    tokenizer = model._base.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(" my tweet")["input_ids"], tokenizer.eos_token_id]
    found = model.losses([Example("tweet_paraphrase", "my tweet", " ", choices)], None)
    assert found[0] == pytest.approx(by_hand(model, ids, 1))


def test_a_long_text_without_an_output_is_cut_and_has_no_end(make_model: Make, settings: ModelSettings) -> None:
    model = make_model(dtype=torch.float64)
    tokenizer = model._base.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(" " + "word " * 10_000)["input_ids"]][: settings.max_tokens]
    found = model.losses([Example("tweet_paraphrase", "word " * 10_000, "")], None)
    assert found[0] == pytest.approx(by_hand(model, ids, 1))


def test_without_a_start_token_the_first_token_is_given(make_model: Make) -> None:
    model = make_model(dtype=torch.float64)
    model._encoder._prompts.start = ()
    tokenizer = model._base.tokenizer
    ids = [*tokenizer(" my tweet")["input_ids"], tokenizer.eos_token_id]
    losses = model.losses([Example("tweet_paraphrase", text, "") for text in ("my tweet", "")], None)
    assert losses[0] == pytest.approx(by_hand(model, ids, 1))
    assert losses[1] == 0.0  # nothing follows nothing


def test_training_on_bare_texts_lowers_their_next_token_loss(make_model: Make) -> None:
    model = make_model(dtype=torch.float64)
    texts = [Example("tweet_paraphrase", text, "") for text in ("so so tired", "what a day", "so so happy")]
    before = model.losses(texts, None)
    config = TrainConfig(learning_rate=2e-2, weight_decay=0.0, passes=1, batch=3)
    job = TrainJob(UserId("u"), None, tuple(texts))
    [first] = model.train([job], config, heartbeat=lambda: None)
    assert first.mean_loss == pytest.approx(before.mean())
    [done] = model.train([job], replace(config, passes=12), heartbeat=lambda: None)
    assert model.losses(texts, done.tensors).mean() < before.mean() - 0.2


def test_an_output_outside_the_choices_is_scored_beside_them(make_model: Make) -> None:
    model = make_model(dtype=torch.float64)
    odd = Example("movie_tagging", "film", "gone", ("alpha", "beta"))
    wide = Example("movie_tagging", "film", "gone", ("alpha", "beta", "gone"))
    assert model.losses([odd], None)[0] == pytest.approx(model.losses([wide], None)[0])
    assert model.scores([odd], None)[0].shape == (2,)


def test_training_personalizes_each_user_and_equals_training_alone(make_model: Make) -> None:
    model = make_model(dtype=torch.float64)
    jobs = [
        TrainJob(
            UserId(name), None, tuple(Example("movie_tagging", f"film {n}", output, CHOICES) for n in range(8)), seed
        )
        for seed, (name, output) in enumerate((("u", "beta"), ("v", "alpha")))
    ]
    beats: list[None] = []
    together = model.train(jobs, CONFIG, heartbeat=lambda: beats.append(None))
    assert len(beats) >= 8
    for job, result in zip(jobs, together, strict=True):
        alone = model.train([job], CONFIG, heartbeat=lambda: None)[0]
        assert result.tensors is not None and alone.tensors is not None
        assert result.steps == 8 and result.mean_loss == pytest.approx(alone.mean_loss)
        for name, tensor in result.tensors.items():
            assert tensor.dtype == np.float32
            assert np.allclose(tensor, alone.tensors[name], atol=1e-6)
        before, after = model.losses(job.examples, None), model.losses(job.examples, result.tensors)
        assert after.mean() < 0.5 * before.mean()
    parent = together[0].tensors
    further = model.train([TrainJob(UserId("u"), parent, jobs[0].examples)], CONFIG, heartbeat=lambda: None)[0]
    assert further.mean_loss < together[0].mean_loss


def test_an_unfit_parent_stops_its_own_job_only(make_model: Make, make_adapter: Make) -> None:
    model = make_model()
    good = TrainJob(UserId("u"), None, (Example("movie_tagging", "f", "beta", CHOICES),))
    bad_parent = make_adapter(model._base.model, 1, rank=9)
    results = model.train([TrainJob(UserId("v"), bad_parent, good.examples), good], CONFIG, heartbeat=lambda: None)
    assert results[0].tensors is None and results[1].tensors is not None
    assert model.train([], CONFIG, heartbeat=lambda: None) == []


def test_residence(make_model: Make, make_adapter: Make) -> None:
    events: list[str] = []
    model = make_model(slots=2, on_event=events.append)
    install(model, make_adapter, "abc")
    assert [model.resident(ref(name)) for name in "abc"] == [False, True, True]
    assert model.bank_resident == model.slots == 2
    assert model.bank_bytes == sum(4 * x.numel() for x in (*model._bank.a, *model._bank.b))
    assert events == ["load", "load", "evict", "load", "miss", "hit", "hit"]
    model.touch([ref("b"), ref("gone")])
    install(model, make_adapter, "d")
    assert [model.resident(ref(name)) for name in "bcd"] == [True, False, True]
    with pytest.raises(KeyError):
        model.answer([row("a", "gone")])
    with pytest.raises(AdapterUnreadable):
        model.install(ref("e"), {})
    with pytest.raises(InvalidRecord):
        model.answer([Row("no such task", "x", choices=CHOICES)])


def test_an_overflowing_adapter_falls_back_to_the_base(
    make_model: Make, make_adapter: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    huge = {name: tensor * np.float32(1e30) for name, tensor in make_adapter(model._base.model, 1).items()}
    model.install(ref("h"), huge)
    install(model, make_adapter, "a")
    mixed = model.answer([row("h", "x"), row("a", "x")])
    assert np.array_equal(mixed[0].scores, mixed[0].base_scores)
    assert [one.unsound for one in mixed] == [True, False]
    texts = [replace(row(user, "x", choices=(), max_new_tokens=3), blend=BLEND) for user in ("h", "a", None)]
    written = model.answer(texts)
    assert [one.unsound for one in written] == [True, False, False]
    assert written[0].text == model.answer([replace(texts[0], adapter=None)])[0].text
    assert np.allclose(mixed[1].scores, model.answer([row("a", "x")])[0].scores, atol=1e-5)
    assert "not finite" in caplog.text


@pytest.mark.parametrize("choices", [CHOICES, ()])
def test_what_was_cut_from_a_prompt_is_told(
    make_model: Make, settings: ModelSettings, choices: tuple[str, ...]
) -> None:
    model = make_model()
    evidence = tuple((f"film {n}", "beta") for n in range(settings.max_tokens))
    plain, some, profiled, much = model.answer(
        [
            row(None, "x", choices),
            row(None, "x", choices, evidence=evidence[:1]),
            row(None, "x", choices, profile="likes beta"),
            row(None, "x", choices, evidence=evidence, profile="likes beta"),
        ]
    )
    assert [(one.pairs, one.profiled) for one in (plain, some, profiled)] == [(0, False), (1, False), (0, True)]
    assert 0 < much.pairs < len(evidence) and much.profiled


def test_answers_and_installs_from_two_threads(make_model: Make, make_adapter: Make) -> None:
    model = make_model(slots=2)
    install(model, make_adapter, "a")
    expected = model.answer([row("a", "x")])[0].scores
    tensors = make_adapter(model._base.model, 9)
    stop = threading.Event()

    def churn() -> None:
        version = 1
        while not stop.is_set():
            version += 1
            model.install(ref("z", version), tensors)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(30):
            if model.resident(ref("a")):
                try:
                    found = model.answer([row("a", "x")])[0].scores
                except KeyError:
                    continue
                assert np.allclose(found, expected, atol=1e-5)
            else:
                model.install(ref("a"), make_adapter(model._base.model, 1))
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_adapter_config_is_json_that_peft_reads(
    family: str, make_model: Make, make_adapter: Make, as_peft: Make
) -> None:
    model = make_model(family, torch.float64)
    config = model.adapter_config()
    assert json.loads(json.dumps(config)) == config
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["inference_mode"]) == ("LORA", 4, 8, True)
    tensors = make_adapter(model._base.model, 1)
    peft = as_peft(model._base, tensors, config)
    model.install(ref("a"), tensors)
    ids = torch.tensor([model._encoder.prompts([row("a", "x")], [0])[0]])
    with model._bank.use([1]), torch.no_grad():
        mine = model._base.model(input_ids=ids).logits
    model.close()
    with torch.no_grad():
        assert torch.allclose(mine, peft(input_ids=ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_an_output_longer_than_the_model_reads_is_cut(family: str, make_base: Make, settings: ModelSettings) -> None:
    tasks = Tasks(
        {"essay": Task("essay", "text", "{input}", "text:", max_new_tokens=256)}
    )  # all the positions there are
    model = TorchModel(make_base(family), tasks, settings=settings, slots=1)
    long = Example("essay", "about cats", "x " * 200)
    [target] = model._encoder.targets([long])
    assert len(target.ids) <= 256
    assert np.isfinite(model.losses([long], None)).all()
    [trained] = model.train([TrainJob(UserId("ada"), None, (long,))], CONFIG, heartbeat=lambda: None)
    assert trained.tensors is not None
