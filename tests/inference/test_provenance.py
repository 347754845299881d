"""An answer names what took part in it, and nothing that was merely at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from inference.blending import DEFAULT as DEFAULT_TEXT
from inference.blending import TextFusion
from oppu.fusion import DEFAULT, Fusion, Stack
from oppu.lm.fake import FakeModel
from oppu.lm.port import Scored
from oppu.settings import Settings
from oppu.wire import Provenance
from retriever.port import Profile, Query, Retrieved

if TYPE_CHECKING:
    from tests.inference.conftest import World

Make = Callable[..., "World"]
PAIRS = [(f"text {number}", ("war", "law")[number % 2]) for number in range(6)]
ALONE = {"retrieve": 0, "profile": False}


def _made(world: World, request_id: str = "r1") -> Provenance:
    answer = world.answer(request_id)
    assert answer.status == "ok" and answer.provenance is not None
    return answer.provenance


def _prompting(settings: Settings, which: str) -> Settings:
    return settings.model_copy(update={"model": settings.model.model_copy(update={"prompt_evidence": which})})


class Parted:
    """A retriever whose hits for the prompt are none of the neighbours."""

    def __init__(self) -> None:
        self.world: World

    def expect(self, queries: list[Query]) -> None:
        self.world.retriever.expect(queries)

    def retrieve(self, queries: list[Query]) -> list[Retrieved]:
        found = self.world.retriever.retrieve(queries)
        neighbours = [tuple(hit for hit in one.neighbours if hit.event.seq <= 2) for one in found]
        hits = [tuple(sorted(one.neighbours, key=lambda hit: -hit.event.seq))[:3] for one in found]
        return [Retrieved(own, near, one.through_seq) for own, near, one in zip(hits, neighbours, found, strict=True)]

    def profiles(self, requests: Any) -> list[Profile]:
        return self.world.retriever.profiles(requests)


def _parted(settings: Settings, make_world: Make, **parts: Any) -> World:
    retriever = Parted()
    retriever.world = make_world(settings, retriever=retriever, **parts)
    return retriever.world


class Short(FakeModel):
    """Has room for so many pairs, and for a profile or not."""

    def __init__(self, pairs: int, *, profiled: bool) -> None:
        super().__init__()
        self.pairs, self.profiled = pairs, profiled

    def answer(self, rows: Any) -> list[Scored]:
        return [
            Scored(s.scores, s.base_scores, s.text, s.late, min(s.pairs, self.pairs), s.profiled and self.profiled)
            for s in super().answer(rows)
        ]


class Overflowing(FakeModel):
    """Every adapter's scores are no numbers: the base's are given, as the real model does."""

    def answer(self, rows: Any) -> list[Scored]:
        return [
            Scored(s.base_scores, s.base_scores, s.text, unsound=row.adapter is not None)
            for row, s in zip(rows, super().answer(rows), strict=True)
        ]


@pytest.mark.parametrize("task", ["label", "write"])
def test_items_that_are_neither_prompted_nor_near_are_not_named(
    settings: Settings, make_world: Make, task: str
) -> None:
    world = _parted(settings, make_world)
    world.remember("anna", PAIRS, task=task)
    world.ask("anna", "r1", task=task)
    world.turn()
    assert set(_made(world).retrieved) == {"anna-0", "anna-1"}


def test_the_items_of_a_prompt_are_named_first(settings: Settings, make_world: Make) -> None:
    world = _parted(_prompting(settings, "all"), make_world)
    world.remember("anna", PAIRS)
    world.ask("anna", "r1", input="text 0")
    world.turn()
    assert _made(world).retrieved == ("anna-5", "anna-4", "anna-3", "anna-0", "anna-1")


@pytest.mark.parametrize(("pairs", "named"), [(0, {"anna-0", "anna-1"}), (2, {"anna-5", "anna-4", "anna-0", "anna-1"})])
def test_items_that_were_cut_from_the_prompt_are_not_named(
    settings: Settings, make_world: Make, pairs: int, named: set[str]
) -> None:
    world = _parted(_prompting(settings, "all"), make_world, model=Short(pairs, profiled=True))
    world.remember("anna", PAIRS)
    world.ask("anna", "r1")
    world.turn()
    assert set(_made(world).retrieved) == named


CITED = ["paper A", "paper B"]


def test_a_history_that_says_nothing_of_the_choices_takes_no_part(world: World) -> None:
    world.remember("anna", [("words", "paper X")] * 3, task="cite")
    world.ask("anna", "r1", task="cite", choices=CITED)
    world.turn()
    made = _made(world)
    assert (made.used, made.retrieved, made.profile_version, made.degraded) == ((), (), None, ())
    assert made.history_sequence == 3


@pytest.mark.parametrize(("profiled", "used"), [(True, ("profile",)), (False, ())])
def test_unless_its_line_stood_in_the_prompt(
    settings: Settings, make_world: Make, profiled: bool, used: tuple[str, ...]
) -> None:
    world = make_world(_prompting(settings, "all"), model=Short(0, profiled=profiled))
    world.remember("anna", [("words", "paper X")] * 3, task="cite")
    world.ask("anna", "r1", task="cite", choices=CITED)
    world.turn()
    assert (_made(world).used, _made(world).retrieved) == (used, ())
    assert (_made(world).profile_version is not None) == profiled


def test_neighbours_with_other_outputs_are_not_named(world: World) -> None:
    world.remember("anna", [("words", "paper X"), ("words", "paper B"), ("words", "paper Y")], task="cite")
    world.ask("anna", "r1", task="cite", choices=CITED)
    world.turn()
    made = _made(world)
    assert (made.used, made.retrieved) == (("retrieval", "profile"), ("anna-1",))


@pytest.mark.parametrize(
    ("alone", "used"),
    [
        ({"base": (1.0, 0.0)}, ()),
        ({"base": (1.0, 0.0), "prior": (1.0, 0.0)}, ("profile",)),
        ({"base": (1.0, 0.0), "knn": (1.0, 0.0)}, ("retrieval",)),
    ],
)
def test_what_the_fusion_does_not_weigh_takes_no_part(
    settings: Settings, make_world: Make, alone: dict[str, tuple[float, float]], used: tuple[str, ...]
) -> None:
    world = make_world(settings, fusion=Fusion(Stack(alone), DEFAULT.beside, DEFAULT.share))
    world.remember("anna", PAIRS)
    world.ask("anna", "r1")
    world.turn()
    assert _made(world).used == used


@pytest.mark.parametrize(
    ("silent", "used"),
    [
        (("knn", "knn_next"), ("profile", "adapter")),
        (("knn",), ("retrieval", "profile", "adapter")),
        (("prior", "prior_next"), ("retrieval", "adapter")),
        (("adapter",), ("retrieval", "profile")),
    ],
)
def test_a_text_names_the_caches_and_the_adapter_it_was_written_from(
    settings: Settings, make_world: Make, silent: tuple[str, ...], used: tuple[str, ...]
) -> None:
    beside = {name: own for name, own in DEFAULT_TEXT.beside.items() if name not in silent}
    world = make_world(settings, text_fusion=TextFusion(DEFAULT_TEXT.alone, beside))
    world.remember("anna", [("goal match", "a headline")], task="write")
    world.publish("anna", "art", task="write")
    world.ask("anna", "r1", task="write")
    world.turn()
    made = _made(world)
    assert made.used == used
    assert (made.adapter_version is None) == ("adapter" not in used)
    assert made.retrieved == (("anna-0",) if "retrieval" in used else ())


@pytest.mark.parametrize("task", ["label", "write"])
@pytest.mark.parametrize(("options", "used"), [({}, ("retrieval", "profile")), (ALONE, ())])
def test_an_adapter_that_says_nothing_finite_is_degraded(
    settings: Settings, make_world: Make, task: str, options: dict[str, Any], used: tuple[str, ...]
) -> None:
    world = make_world(settings, model=Overflowing())
    world.remember("anna", PAIRS, task=task)
    world.publish("anna", "art", task=task)
    world.ask("anna", "r1", task=task, options=options)
    world.turn()
    made = _made(world)
    assert (made.adapter_version, made.used) == (None, used)
    assert [(fault.part, fault.reason) for fault in made.degraded] == [("adapter", "not_finite_used_base")]
    assert world.sample("oppu_inference_degraded_total", part="adapter", reason="not_finite_used_base") == 1


def test_an_answer_without_its_adapter_is_the_evidences(settings: Settings, make_world: Make) -> None:
    world = make_world(settings, model=Overflowing())
    world.remember("anna", PAIRS)
    world.publish("anna", "art")
    world.ask("anna", "lost")
    world.ask("anna", "none", options={"adapter": False})
    world.turn()
    lost, none = (world.answer(name).scores for name in ("lost", "none"))
    assert lost is not None and none is not None
    np.testing.assert_allclose(list(lost.values()), list(none.values()))
