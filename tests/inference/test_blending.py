"""Weights of experts: by history, by adapter, and read back from their file."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from inference.blending import DEFAULT, MARGIN, TextFusion, caches, load_text_fusion
from oppu.errors import ConfigError
from oppu.lm.blend import EXPERTS, shares
from oppu.values import Event, EventId, UserId
from retriever.port import Hit

FUSION = TextFusion(
    {"base": (1.0, 0.0, 0.0), "knn": (0.0, 1.0, 0.5)}, {"base": (0.0, 0.0, 0.0), "adapter": (0.0, 2.0, 0.0)}
)


def hit(output: str, similarity: float) -> Hit:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Hit(Event(UserId("a"), 1, EventId("e"), "t", at, at, "in", output, None, None), similarity)


def test_weights_follow_the_length_of_the_history() -> None:
    assert FUSION.weights(0, adapter=False) == {"base": (1.0, 0.0), "knn": (0.0, 0.5)}
    assert FUSION.weights(147, adapter=True)["adapter"][0] == pytest.approx(2.0, abs=0.01)


def test_the_built_in_share_of_the_adapter_rises_and_every_expert_is_known() -> None:
    def share(events: int) -> float:
        return shares(DEFAULT.weights(events, adapter=True), dict.fromkeys(EXPERTS, 1))["adapter"]

    assert share(16) < share(64) < share(256)
    assert set(DEFAULT.beside) == set(EXPERTS)
    assert set(DEFAULT.alone) == set(EXPERTS) - {"adapter"}


def test_an_adapter_that_hurts_its_user_gives_its_weight_to_the_base() -> None:
    def share(earned: float) -> dict[str, float]:
        return shares(DEFAULT.weights(256, adapter=True, earned=earned), dict.fromkeys(EXPERTS, 1))

    before, after = share(0.0), share(-6.0)
    assert before["adapter"] > 0.2 and after["adapter"] < 0.03
    assert after["base"] + after["adapter"] == pytest.approx(before["base"] + before["adapter"])
    assert all(after[name] == pytest.approx(before[name]) for name in EXPERTS if name not in ("base", "adapter"))
    assert DEFAULT.adapter_share(256, -6.0) == after["adapter"] < DEFAULT.adapter_share(256, -2.0) < before["adapter"]
    assert share(2.0) == share(-MARGIN) == before
    assert DEFAULT.weights(256, adapter=False, earned=-5.0) == DEFAULT.weights(256, adapter=False)


def test_nearer_outputs_and_heavier_ones_come_first_and_blank_ones_not_at_all() -> None:
    found = caches("the input", [hit("near", 0.9), hit("far", 0.1), hit(" ", 0.8)], {"old": 1.0, "new": 2.0})
    assert [text for text, _ in found["knn"]] == ["near", "far"]
    assert found["knn"][0][1] == 1.0 and found["knn"][1][1] < 0.01
    assert found["prior"] == (("new", 2.0), ("old", 1.0))
    assert found["input"] == (("the input", 1.0),)


def test_what_is_not_there_is_left_out() -> None:
    assert caches("  ", [], {}) == {}


def test_a_file_keeps_it(tmp_path: Path) -> None:
    FUSION.save(tmp_path / "f.json")
    assert load_text_fusion(tmp_path / "f.json") == FUSION


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read"),
        ("[]", "expected an object"),
        ('{"alone": {}}', "alone: expected coefficients"),
        ('{"alone": {"base": [1, 0, 0], "adapter": [1, 0, 0]}}', "alone: expected coefficients"),
        ('{"alone": {"base": [1, 0]}}', "alone.base: expected three finite numbers"),
        ('{"alone": {"base": [1, 0, 0]}, "beside": {"base": [1, 0, NaN]}}', "beside.base: expected three"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ConfigError, match=f"model.text_fusion: .*{words}"):
        load_text_fusion(tmp_path / "f.json")
