"""The whole run on a tiny random base: every stage, the report, a kill in between, and the command."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from evaluation import analyses, bases, training
from evaluation.calibration import calibrate
from evaluation.corpus import Item
from evaluation.experiment import Outcome, Plan, run
from evaluation.report import markdown, summarise, write
from evaluation.roles import Bounds
from evaluation.training import Recipe
from evaluation.variants import CHOSEN_OPPU, CHOSEN_PROMPT, PROMPTED, RECENT, TRAINED
from inference import blending
from inference.blending import TextFusion, load_text_fusion
from oppu.cli import cli, compose
from oppu.embedder import HashEmbedder
from oppu.errors import ConfigError
from oppu.fusion import DEFAULT, FILE, Fusion
from oppu.lm.model import TorchModel
from oppu.settings import Settings, UpdaterSettings
from oppu.tasks import Task, Tasks
from tests.evaluation.world import EMBEDDER, LABELS, people
from tests.oppu.lm.conftest import byte_tokenizer, tiny_model

COUNTS = {f"t{n}": 20 for n in range(3)} | {f"c{n}": 8 for n in range(6)} | {"s0": 4}
RECIPE = Recipe(base_epochs=2, passes=1, chunk=6, replay=2, chunk_passes=1, strangers=1, written=2)
TASKS = Tasks({
    "pick": Task("pick", "choice", "{input}", "is:", LABELS),
    "write": Task("write", "text", "{input}", "title:"),
})  # fmt: skip
BOUNDS = Bounds(target=20, calibrate=6, folds_below=2, enough_items=1, enough_judges=1)

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(str(folder))
    byte_tokenizer().save_pretrained(str(folder))
    return Settings.load(model={"base": str(folder), "max_tokens": 200, "lora_rank": 2, "threads": 1})


def planned(folder: Path, task: str = "pick", *, final: bool = True, seeds: tuple[int, ...] = (0,)) -> Plan:
    return Plan(task, folder, seeds, RECIPE, BOUNDS, final, None, lambda _: None)


def everybody(task: str = "pick") -> list[Item]:
    items = people(COUNTS, task=task)
    if task == "pick":
        return items
    return [Item(i.item_id, i.user_id, task, i.day, i.input, f"about {i.input[:6]}") for i in items]


def test_all_arms_and_the_report(settings: Settings, tmp_path: Path) -> None:
    outcomes = run(planned(tmp_path, seeds=(0, 1)), everybody(), settings, TASKS, EMBEDDER)
    result = summarise(planned(tmp_path, seeds=(0, 1)), outcomes, "choice", "tiny", "oppu evaluate pick")
    assert (result["users"], result["queries"], result["evidence"]) == (3, 12, False)
    wanted = {"none", "retrieval-1", "profile", "prior", "knn", "evidence", "oppu", "oppu-1", "oppu-profile",
              "recent-history", "chosen-oppu", "chosen-prompt", "volume", "permuted", "union",
              "stranger-0", "stranger-nearest", "follow", "frozen", "fused", "majority", "recent"}  # fmt: skip
    assert wanted <= set(result["arms"])
    assert all(0 <= arm["query_mean"] <= 1 for arm in result["arms"].values())
    chosen = {result["chosen"][0][part] for part in ("oppu", "prompt")}
    both = {name for name, arm in result["arms"].items() if len(arm["seeds"]) == 2}
    controls = {"volume", "permuted", "union", "stranger-0", "stranger-nearest"}
    assert wanted - {*PROMPTED, RECENT, *TRAINED} | controls | chosen | {"oppu"} <= both
    assert {len(arm["seeds"]) for arm in result["arms"].values()} <= {1, 2}
    assert {name[:2] for name in result["tests"] if name.startswith("P")} == {"P1", "P2", "P3"}
    assert not {"oppu-2", "oppu-unadapted"} & set(result["arms"])
    assert {c["seed"] for c in result["chosen"]} == {0, 1}
    first, second = result["chosen"]
    assert set(first["merits"]) == {*PROMPTED, RECENT, *TRAINED} and not second["merits"]
    assert (first["oppu"], first["prompt"], first["rate"]) == (second["oppu"], second["prompt"], second["rate"])
    assert float(min(first["rates"], key=first["rates"].get)) == pytest.approx(first["rate"]) and not second["rates"]
    assert len(first["rates"]) == len(RECIPE.rates)
    for o in outcomes:
        _equal(o, CHOSEN_OPPU, o.chosen[0].oppu)
        _equal(o, CHOSEN_PROMPT, o.chosen[0].prompt)
    assert {len(losses) for losses in result["adaption"].values()} <= {1, 2} and len(result["adaption"]) == 3
    _same_epochs(tmp_path, result["adaption"])
    assert 0 < result["recent_history_cut_share"] < 1  # 200 tokens hold two more items
    prompts = {"none", "retrieval-1", "profile", "profile-retrieval-1", "recent-history"}
    scores = {name: outcomes[0].arms.held[name][0].tobytes() for name in prompts}
    assert len(set(scores.values())) == len(prompts)
    data, page = write(result, outcomes, "choice", tmp_path / "out")
    assert json.loads(data.read_text())["arms"].keys() == result["arms"].keys()
    assert "not evidence" in page.read_text()
    assert (tmp_path / "final.log").read_text().count("\n") == 1


def test_peft_methods_are_reported_with_their_cost(settings: Settings, tmp_path: Path) -> None:
    plan = replace(planned(tmp_path), methods=True)
    outcomes = run(plan, everybody(), settings, TASKS, EMBEDDER)
    result = summarise(plan, outcomes, "choice", "tiny", "oppu evaluate pick")
    assert set(result["methods"]) == {"lora", "ia3", "prompt-tuning"}
    for name, fields in result["methods"].items():
        assert {"query_mean", "user_mean", "ci", "parameters", "bytes", "seconds", "rates"} <= set(fields)
        assert fields["query_mean"] == result["arms"][f"peft-{name}"]["query_mean"]


def test_a_text_task_is_judged_by_its_loss(settings: Settings, tmp_path: Path) -> None:
    outcomes = run(planned(tmp_path, "write"), everybody("write"), settings, TASKS, EMBEDDER)
    result = summarise(planned(tmp_path, "write"), outcomes, "text", "tiny", "oppu evaluate write")
    judged = {name: arm for name, arm in result["arms"].items() if "metric" not in arm}
    assert all(arm["query_mean"] < 0 for arm in judged.values())
    for name in set(result["arms"]) - set(judged):
        arm = result["arms"][name]
        assert (arm["metric"], arm["query_mean"]) == ("rouge_l", pytest.approx(arm["rouge_l"]))
        assert arm["user_mean"] == pytest.approx(arm["rouge_l_user_mean"]) and len(arm["seeds"]) == 1
        assert arm["ci"][0] <= arm["query_mean"] <= arm["ci"][1]
    assert {"none", "oppu", "evidence", "fused"} <= set(judged)
    assert {name[:2] for name in result["tests"] if name.startswith("P")} == {"P1", "P2", "P3"}
    wrote = {name for name, arm in result["arms"].items() if "rouge_l" in arm}
    assert {"none", "oppu", "evidence", "fused", "lead", "nearest", "frequent"} < wrote
    assert all({"rouge_1", "empty", "repeated", "copied"} <= set(result["arms"][name]) for name in wrote)
    assert {len(texts) for own in outcomes[0].arms.texts.values() for texts in own} == {RECIPE.written}
    assert result["case_study"] and len(result["tests"]["fused - evidence"]["by_user"]) == 3
    assert result["tests"]["fused - evidence"]["p"] is None
    data, page = write(result, outcomes, "text", tmp_path / "out")
    assert json.loads(data.read_text())["rouge_beats_lead"] == result["rouge_beats_lead"]
    assert "| written by |" in page.read_text() and "Foreseen better" in page.read_text()
    assert page.read_text().count("\n| lead |") == 1 and result["clustered_by"] in page.read_text()


def test_written_texts_are_kept_and_the_fit_beside_them(settings: Settings, tmp_path: Path) -> None:
    def kill(*_: Any, **__: Any) -> None:
        raise AssertionError("written again")

    first = run(planned(tmp_path, "write"), everybody("write"), settings, TASKS, EMBEDDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchModel, "answer", kill)
        again = run(planned(tmp_path, "write"), everybody("write"), settings, TASKS, EMBEDDER)
    assert first[0].arms.texts == again[0].arms.texts
    _same(first[0], again[0])
    assert load_text_fusion(tmp_path / "all-seed-0" / "text_fusion.json").alone


def test_a_killed_run_goes_on_and_ends_the_same(settings: Settings, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    whole = run(planned(tmp_path / "whole"), everybody(), settings, TASKS, EMBEDDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.experiment.train_once", kill)
        with pytest.raises(Killed):
            run(planned(tmp_path / "parts"), everybody(), settings, TASKS, EMBEDDER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bases, "adapt_once", kill)  # what was done is not done again
        again = run(planned(tmp_path / "parts"), everybody(), settings, TASKS, EMBEDDER)
    _same(whole[0], again[0])


def test_the_order_of_seeds_and_a_second_run_change_nothing(settings: Settings, tmp_path: Path) -> None:
    first = run(planned(tmp_path / "1"), everybody(), settings, TASKS, EMBEDDER)
    second = run(planned(tmp_path / "2"), everybody(), settings, TASKS, EMBEDDER)
    _same(first[0], second[0])


def test_the_development_run_never_sees_the_last_fifth(settings: Settings, tmp_path: Path) -> None:
    [outcome] = run(planned(tmp_path, final=False), everybody(), settings, TASKS, EMBEDDER)
    assert max(int(i.item_id.rpartition("/")[2]) for p in outcome.people for i in p.items) == 15
    assert not (tmp_path / "final.log").exists()


@pytest.mark.parametrize("task", ["pick", "write"])
def test_adapters_that_diverge_leave_the_base_alone(task: str, settings: Settings, tmp_path: Path) -> None:
    recipe = replace(RECIPE, variants=("plain",), base_search=False, adapt_items=10)
    # weights that are no numbers, and such as have no numbers for scores
    recipe = replace(recipe, learning_rate=3e38, rates=(1.0, 1e-8))
    [outcome] = run(replace(planned(tmp_path, task), recipe=recipe), everybody(task), settings, TASKS, EMBEDDER)
    [chosen] = outcome.chosen
    alone, odd = chosen.rates.values()
    assert chosen.rate == 3e38 and np.isfinite(alone) and not np.isfinite(odd)
    for trained, base in zip(outcome.arms.held["oppu"], outcome.arms.held["none"], strict=True):
        np.testing.assert_array_equal(trained, base)


@pytest.mark.parametrize("task", ["pick", "write"])
def test_a_plain_run_has_no_prompted_arm_and_no_p1(task: str, settings: Settings, tmp_path: Path) -> None:
    plan = planned(tmp_path, task)
    plan = replace(plan, recipe=replace(RECIPE, variants=("plain",), base_search=False, adapt_items=10))
    outcomes = run(plan, everybody(task), settings, TASKS, EMBEDDER)
    kind = TASKS[task].kind
    result = summarise(plan, outcomes, kind, "tiny", f"oppu evaluate {task}")
    assert {"none", "oppu", "evidence", "fused", "volume", "permuted", CHOSEN_OPPU} <= set(result["arms"])
    assert not {*PROMPTED, RECENT, CHOSEN_PROMPT, "oppu-1", "oppu-profile"} & set(result["arms"])
    assert {name[:2] for name in result["tests"] if name.startswith("P")} == {"P2", "P3"}
    assert [c["prompt"] for c in result["chosen"]] == [""]
    assert [path.name for path in (tmp_path / "all-seed-0").glob("base-*") if path.is_dir()] == ["base-plain"]
    made = tmp_path / "all-seed-0" / "base-plain" / str(RECIPE.base_epochs) / "oppu.json"
    assert json.loads(made.read_text())["examples"] == 10
    assert write(result, outcomes, kind, tmp_path / "out")[1].exists()


def test_folds_of_unequal_size_have_the_controls_that_all_have(settings: Settings, tmp_path: Path) -> None:
    items = people({f"u{n}": 12 for n in range(7)})
    recipe = replace(RECIPE, variants=("plain",), base_epochs=1, base_search=False, strangers=2)
    plan = replace(planned(tmp_path), recipe=recipe, bounds=Bounds(target=12, calibrate=6, folds_below=12))
    outcomes = run(plan, items, settings, TASKS, EMBEDDER)
    result = summarise(plan, outcomes, "choice", "tiny", "oppu evaluate pick")
    assert result["users"] == 7 and {"oppu", "permuted", "volume", "union", "fused"} <= set(result["arms"])
    assert "stranger-1" in result["left_out"] and "stranger-1" not in result["arms"]
    page = markdown(result)
    assert "**Arms that not all users had, and none shows: stranger-1" in page
    assert "**The base was adapted on little: fold-0 on " in page
    assert "p (Holm, of this task's 2)" in page and not result["case_study"]
    assert all(0 < test["p"] <= 1 for test in result["tests"].values())


def test_what_a_base_for_each_user_cannot_show_is_said(settings: Settings, tmp_path: Path) -> None:
    items = people({f"u{n}": 20 for n in range(4)})
    recipe = replace(RECIPE, variants=("plain",), base_epochs=1, base_search=False)
    plan = replace(planned(tmp_path), recipe=recipe, bounds=Bounds(target=20, calibrate=6, folds_below=12))
    result = summarise(plan, run(plan, items, settings, TASKS, EMBEDDER), "choice", "tiny", "oppu evaluate pick")
    assert result["not_tested"] == ["P2 oppu - volume"] and "P1" not in str(result["not_tested"])
    assert set(result["calibrate_users"].values()) == {1}
    page = markdown(result)
    assert "or of long histories: P2 oppu - volume.**" in page
    assert "**Few users chose for all: without-u0 by 1, " in page


def test_nobody_to_judge_is_said_and_no_loss_is_made_up(settings: Settings, tmp_path: Path) -> None:
    items = people({"t0": 20, "t1": 20} | {f"s{n}": 4 for n in range(5)})
    population = frozenset(f"s{n}" for n in range(5))
    plan = replace(planned(tmp_path), bounds=replace(BOUNDS, population=population))
    outcomes = run(plan, items, settings, TASKS, EMBEDDER)
    result = summarise(plan, outcomes, "choice", "tiny", "oppu evaluate pick")
    assert result["adaption"] == {} and result["calibrate_users"] == {"all": 0}
    for variant in ("plain", "retrieval", "profile"):  # the last number of epochs, and no other
        folders = [path.name for path in (tmp_path / "all-seed-0" / f"base-{variant}").iterdir() if path.is_dir()]
        assert folders == [str(RECIPE.base_epochs)]
    _data, page = write(result, outcomes, "choice", tmp_path / "out")
    assert "all by 0; what nobody chose is the first of its kind" in page.read_text()
    assert "nobody: the first" in page.read_text()


def test_a_lesser_run_stands_beside_a_better_one(settings: Settings, tmp_path: Path) -> None:
    plan = replace(planned(tmp_path, seeds=(0, 1)), recipe=replace(RECIPE, variants=("plain",), base_epochs=1))
    outcomes = run(plan, everybody(), settings, TASKS, EMBEDDER)
    whole = summarise(plan, outcomes, "choice", "tiny", "oppu evaluate pick") | {"evidence": True}
    lesser = {"seeds": [1]}, {"final": False}, {"evidence": False}, {"seeds": [1, 2]}
    names = [write(whole | change, outcomes, "choice", tmp_path / "out")[0].stem for change in ({}, *lesser)]
    assert names == ["pick", "pick-seed-1", "pick-dev", "pick-quick", "pick"]
    assert len(list((tmp_path / "out" / "figures").glob("pick-quick-*.png"))) >= 2


def test_the_items_that_adapt_a_base_are_drawn_by_the_seed() -> None:
    items, recipe = everybody(), replace(RECIPE, adapt_items=7)
    drawn = [bases.learnt_items(items, recipe, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and {len(own) for own in drawn} == {7}
    assert [i.day for i in drawn[0]] == sorted(i.day for i in drawn[0])
    assert bases.learnt_items(items, RECIPE, 0) == items
    assert bases.learnt_items(items[:5], recipe, 0) == items[:5]


def test_a_stage_keeps_users_of_any_id_apart(tmp_path: Path) -> None:
    class Kept:
        folder = tmp_path

        @staticmethod
        def say(_text: str) -> None:
            return None

    arrays = {
        key: np.full(2, at)
        for at, key in enumerate(("file", "=file", "allow_pickle", "a/b|c", "é", "==", "x", "x.npy", "x.npy."))
    }
    for _ in range(2):  # as it is computed, and from its file
        found = training.stage(Kept(), "scores", lambda: arrays)
        assert {key: value.tolist() for key, value in found.items()} == {k: v.tolist() for k, v in arrays.items()}


def test_a_chunk_ends_with_its_day() -> None:
    items = people({"u": 12})
    assert training.chunks_of(items, 5) == [(0, 5), (5, 10), (10, 12)]
    same = [*items[:4], *(Item(i.item_id, "u", i.task, items[4].day, i.input, i.output) for i in items[4:])]
    assert training.chunks_of(same, 5) == [(0, 12)]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nonsense", "--events", "e", "--out", "o"], "TASK: expected one of"),
        (["news_categorize", "--events", "none.jsonl", "--out", "o"], "cannot read"),
    ],
)
def test_the_command_refuses_before_it_starts(args: list[str], words: str) -> None:
    result = CliRunner().invoke(cli, ["evaluate", *args])
    assert result.exception is not None and words in str(result.exception)


def test_what_is_fitted_beside_a_base_is_what_inference_reads(settings: Settings, tmp_path: Path) -> None:
    own = settings.model_copy(update={"updater": UpdaterSettings(min_pending=6, passes=1)})
    done = calibrate([i for i in everybody() if i.user_id[0] != "s"], own, TASKS, EMBEDDER, lambda _: None)
    assert (done.items, done.users) == (108, 9)
    assert isinstance(done.fusion, Fusion)
    assert set(done.fusion.alone.coefficients) == {"base", "knn", "prior"}
    assert set(done.fusion.beside.coefficients) == {"adapter"}
    done.fusion.save(tmp_path / FILE)
    beside = settings.model.model_copy(update={"base": str(tmp_path)})
    assert compose.fusion(settings.model_copy(update={"model": beside})) == done.fusion
    named = settings.model.model_copy(update={"fusion": str(tmp_path / FILE)})
    assert compose.fusion(settings.model_copy(update={"model": named})) == done.fusion
    assert compose.fusion(settings) == DEFAULT


def test_a_text_tasks_weights_are_fitted_and_read_too(settings: Settings, tmp_path: Path) -> None:
    own = settings.model_copy(update={"updater": UpdaterSettings(min_pending=6, passes=1)})
    done = calibrate([i for i in everybody("write") if i.user_id[0] != "s"], own, TASKS, EMBEDDER, lambda _: None)
    assert isinstance(done.fusion, TextFusion) and (done.items, done.users) == (108, 9)
    assert 0 < done.fusion.adapter_share(64) < 1
    done.fusion.save(tmp_path / blending.FILE)
    beside = settings.model.model_copy(update={"base": str(tmp_path)})
    assert compose.text_fusion(settings.model_copy(update={"model": beside})) == done.fusion
    named = settings.model.model_copy(update={"text_fusion": str(tmp_path / blending.FILE)})
    assert compose.text_fusion(settings.model_copy(update={"model": named})) == done.fusion
    assert compose.text_fusion(settings) == blending.DEFAULT


class Turned(HashEmbedder):
    """A query encoder that has other vectors."""

    @property
    def own_fingerprint(self) -> str:
        """Not the embedder's."""
        return "turned"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the embedder's, turned."""
        return np.roll(super().embed(texts), 1, axis=1)


def test_calibration_asks_through_the_query_encoder(settings: Settings) -> None:
    own = settings.model_copy(update={"updater": UpdaterSettings(min_pending=6, passes=1)})
    items = [i for i in everybody() if i.user_id[0] != "s"]
    plain, same, turned = (
        calibrate(items, own, TASKS, EMBEDDER, lambda _: None, queries=queries).fusion
        for queries in (None, EMBEDDER, Turned())
    )
    assert isinstance(plain, Fusion) and isinstance(same, Fusion) and isinstance(turned, Fusion)
    assert plain.alone == same.alone != turned.alone


def test_the_experiment_asks_through_the_query_encoder_and_keeps_its_results_apart(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def stop(items: Any, vectors: Any, *_args: Any, queries: Any, **_named: Any) -> Any:
        seen.append((vectors, queries))
        raise InterruptedError

    monkeypatch.setattr(analyses, "pasts", stop)
    for queries in (Turned(), None):
        folder = tmp_path / ("turned" if queries else "plain")
        with pytest.raises(InterruptedError):
            run(planned(folder), everybody(), settings, TASKS, EMBEDDER, queries=queries)
        with pytest.raises(ConfigError, match="holds results of other query encoder"):
            run(planned(folder), everybody(), settings, TASKS, EMBEDDER, queries=None if queries else Turned())
    (vectors, turned), (_, none) = seen
    assert none is None and vectors.keys() == turned.keys()
    assert all(np.allclose(turned[name], np.roll(vectors[name], 1)) for name in vectors)


@pytest.mark.parametrize("items", [[], everybody("write")[:50], everybody()[:50]])
def test_too_little_to_calibrate_on_is_refused(settings: Settings, items: list[Item]) -> None:
    with pytest.raises(ConfigError, match="EVENTS: expected"):
        calibrate(items, settings, TASKS, EMBEDDER, lambda _: None)


def test_items_of_one_day_leave_nothing_to_weigh_an_adapter_by(settings: Settings) -> None:
    own = settings.model_copy(update={"updater": UpdaterSettings(min_pending=4)})
    single = [replace(i, day=date(2020, 1, 1)) for i in everybody() if i.user_id[0] != "s"]
    with pytest.raises(ConfigError, match="EVENTS: expected some user with more days"):
        calibrate(single, own, TASKS, EMBEDDER, lambda _: None)


def _same_epochs(folder: Path, curves: dict[str, list[float]]) -> None:
    """The first seed's curve chooses each base's number of epochs, for those that the others need too."""
    made = {path.name: path for path in (folder / "all-seed-1-after-0").glob("base-*") if path.is_dir()}
    best = {f"base-{name.rpartition('/')[2]}": str(1 + losses.index(min(losses))) for name, losses in curves.items()}
    assert "base-plain" in made and set(made) <= set(best)
    for name, path in made.items():
        assert [tried.name for tried in path.iterdir() if tried.is_dir()] == [best[name]]


def _equal(outcome: Outcome, one: str, other: str) -> None:
    for a, b in zip(outcome.arms.held[one], outcome.arms.held[other], strict=True):
        np.testing.assert_array_equal(a, b)


def _same(one: Outcome, other: Outcome) -> None:
    assert one.arms.held.keys() == other.arms.held.keys()
    for name, scores in one.arms.held.items():
        for a, b in zip(scores, other.arms.held[name], strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
