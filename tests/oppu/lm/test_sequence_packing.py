"""Layouts of several sequences a row."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oppu.lm.sequence_packing import OWN_WIDTHS, WIDTHS, Layout, cost, looks_near, packed

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(LENGTHS)
def test_every_sequence_lies_whole_in_one_row_and_no_two_on_one_place(lengths: list[int]) -> None:
    layout = packed(lengths)
    cells = [set(layout.cells(number)) for number in range(len(lengths))]
    assert [len(own) for own in cells] == lengths
    assert len(set().union(*cells)) == sum(lengths)
    assert all(min(own) // layout.width == max(own) // layout.width < layout.rows for own in cells)
    assert layout.width <= max(WIDTHS[-1], *lengths)
    assert layout.cost <= cost(len(lengths), max(WIDTHS[0], *lengths))


@given(LENGTHS, st.integers(1, 5))
def test_rows_may_be_of_one_owner_each(lengths: list[int], every: int) -> None:
    owners = [number // every for number in range(len(lengths))]
    layout = packed(lengths, owners)
    by_row = layout.by_row(owners)
    assert by_row == sorted(owners[n] for n in {row: n for n, (row, _) in enumerate(layout.places)}.values())
    assert by_row is not None and len(by_row) == layout.rows
    cells = [cell for number in range(len(lengths)) for cell in layout.cells(number)]
    assert len(set(cells)) == len(cells) == sum(lengths) and max(cells) < layout.rows * layout.width
    assert layout.cost <= cost(len(lengths), max(OWN_WIDTHS[0], *lengths))
    assert layout.width <= max(OWN_WIDTHS[-1], *lengths)


def test_a_row_of_several_has_no_number() -> None:
    layout = Layout(2, 8, ((0, 0), (1, 0), (0, 4)), (4, 5, 3))
    assert layout.by_row([7, 8, 7]) == [7, 8]
    assert layout.by_row([7, 8, 9]) is None


@given(LENGTHS)
def test_what_lies_where(lengths: list[int]) -> None:
    layout = packed(lengths)
    numbers = [[1000 * number + at for at in range(length)] for number, length in enumerate(lengths)]
    filled, positions, owners = layout.filled(numbers, -5).flatten(), layout.positions(2), layout.owners()
    for number, own in enumerate(numbers):
        cells = list(layout.cells(number))
        assert filled[cells].tolist() == own
        assert positions.flatten()[cells].tolist() == list(range(2, 2 + len(own)))
        assert set(owners.flatten()[cells].tolist()) == {number}
    empty = owners.flatten() < 0
    assert int(empty.sum()) == layout.rows * layout.width - sum(lengths) == int((filled == -5).sum())
    assert sorted(layout.in_order) == list(range(len(lengths)))
    assert [n for n in dict.fromkeys(owners.flatten().tolist()) if n >= 0] == layout.in_order


@pytest.mark.parametrize("causal", [True, False])
def test_masks_keep_sequences_apart_and_leave_no_place_without_anything(causal: bool) -> None:
    layout = packed([5, 3, 90, 60, 7])
    mask, owners = layout.mask(torch.float32, causal=causal), layout.owners()
    assert mask.shape == (layout.rows, 1, layout.width, layout.width) and set(mask.flatten().tolist()) == {
        0,
        -torch.inf,
    }
    for row, known in enumerate(owners.tolist()):
        for at, one in enumerate(known):
            seen = [one == other and (not causal or before <= at) for before, other in enumerate(known)]
            assert (mask[row, 0, at] == 0).tolist() == seen and any(seen)


@pytest.mark.parametrize("seed", range(8))
def test_a_narrowed_layout_keeps_rows_and_order(seed: int) -> None:
    chance = random.Random(seed)
    layout = packed([chance.randint(1, 40) for _ in range(30)])
    counts = [chance.randint(1, length) for length in layout.lengths]
    narrow = layout.narrowed(counts)
    assert narrow.lengths == tuple(counts) and narrow.rows == layout.rows
    assert [row for row, _ in narrow.places] == [row for row, _ in layout.places]
    assert narrow.in_order == layout.in_order
    assert narrow.width >= max(sum(n for (at, _), n in zip(narrow.places, counts, strict=True) if at == row)
                               for row in range(layout.rows))  # fmt: skip


def test_a_narrowed_layout_can_be_told_from_the_whole_one() -> None:
    layout = Layout(1, 5, ((0, 0), (0, 3)), (3, 2))
    assert layout.narrowed([3, 2]).width == 6
    assert layout.narrowed([1, 1]).width == 2


@pytest.mark.parametrize(
    ("config", "near"),
    [
        ({}, False),
        ({"layer_types": ["full_attention"] * 2}, False),
        ({"sliding_window": 4096}, False),
        ({"sliding_window": 255}, True),
        ({"sliding_window": None, "layer_types": ["sliding_attention", "full_attention"]}, True),
        ({"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}, False),
        ({"layer_types": ["linear_attention", "full_attention"]}, True),
        ({"attention_chunk_size": 128}, True),
        ({"attention_window": [512, 512]}, True),
    ],
)
def test_what_looks_at_near_tokens_only(config: dict[str, object], near: bool) -> None:
    assert looks_near(SimpleNamespace(**config), 256) == near
