"""Counted dropout: the right share, scaled, and a row's own whatever stands beside it."""

import pytest
import torch

from oppu.lm import dropout
from oppu.lm.dropout import Dropout, dropped, kept, row_seed
from oppu.lm.sequence_packing import Layout


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_share_and_the_scale(rate: float) -> None:
    x = torch.ones(8, 50, 64, dtype=torch.float64)
    out = dropped(x, Dropout(rate, tuple(range(8))), 3)
    share = float((out == 0).double().mean())
    assert abs(share - rate) < 4 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - rate), dtype=torch.float64))
    for axis in range(3):  # no row, position or feature is favoured
        means = (out == 0).double().mean(dim=[d for d in range(3) if d != axis])
        assert float((means - rate).abs().max()) < 6 * (rate * (1 - rate) / (x.numel() / x.shape[axis])) ** 0.5


def test_a_rows_mask_is_its_own() -> None:
    x = torch.ones(3, 9, 16)
    whole = dropped(x, Dropout(0.4, (5, 6, 7)), 1)
    assert torch.equal(whole[1:2], dropped(x[:1], Dropout(0.4, (6,)), 1))
    assert torch.equal(whole[:, :4], dropped(x[:, :4], Dropout(0.4, (5, 6, 7)), 1))  # padded less
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, dropped(x, Dropout(0.4, (5, 6, 7)), 2))


def test_a_sequence_keeps_its_mask_where_it_shares_a_row() -> None:
    layout = Layout(2, 9, ((0, 0), (1, 2), (0, 4)), (4, 5, 3))
    shared = dropped(torch.ones(2, 9, 16), Dropout(0.4, (5, 6, 7)).laid_out((layout.narrowed([1, 1, 1]), layout)), 1)
    for number, (length, seed) in enumerate(zip(layout.lengths, (5, 6, 7), strict=True)):
        alone = dropped(torch.ones(1, length, 16), Dropout(0.4, (seed,)), 1)[0]
        assert torch.equal(shared.flatten(0, 1)[list(layout.cells(number))], alone)


def test_many_features_are_hashed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, given = torch.ones(5, 6, 8), Dropout(0.4, (1, 2, 3, 4, 5))
    whole = dropped(x, given, 0)
    monkeypatch.setattr(dropout, "_AT_ONCE", 100)
    assert torch.equal(whole, dropped(x, given, 0))


def test_masks_of_neighbouring_seeds_and_layers_are_independent() -> None:
    x = torch.ones(1, 100, 100)
    seeds = [row_seed(user, step, example) for user in (0, 1) for step in (0, 1) for example in (0, 1)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 1 << 63 for seed in seeds)
    masks = [kept(x, Dropout(0.5, (seed,)), layer).flatten().double() for seed in (0, 1, *seeds) for layer in (0, 1)]
    table = torch.corrcoef(torch.stack(masks))
    assert float((table - torch.eye(len(masks))).abs().max()) < 0.05


def test_gradients_pass_where_nothing_is_dropped() -> None:
    x = torch.ones(1, 4, 8, requires_grad=True)
    torch.autograd.backward(dropped(x, Dropout(0.5, (3,)), 0).sum())
    assert x.grad is not None
    assert torch.equal(x.grad != 0, kept(x, Dropout(0.5, (3,)), 0)) and set(x.grad.flatten().tolist()) == {0.0, 2.0}
