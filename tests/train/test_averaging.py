"""The average of the weights against its definition; swapped, saved, adopted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from conftest import make_model
from whyrec.train.averaging import Backbone, WeightAverage


def trained(average: WeightAverage, weight: nn.Parameter, steps: int) -> torch.Tensor:
    """Move a weight for some steps; the average by its definition."""
    expected = None
    anything: Any = None
    for step in range(1, steps + 1):
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape))
        kept = min(average.decay, step / (step + 10))
        now = weight.detach().clone()
        expected = now if expected is None else kept * expected + (1 - kept) * now
        average.on_step_end(anything, SimpleNamespace(global_step=step), anything)  # type: ignore
    assert expected is not None
    return expected


def test_the_average_is_what_it_says(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, decay=0.6)
    expected = trained(average, model.weight, steps=25)
    before, address = model.weight.detach().clone(), model.weight.data_ptr()
    with average.in_place():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, before) and model.weight.data_ptr() == address
    average.save(tmp_path)
    other = nn.Linear(3, 2).requires_grad_(False)
    other.weight.requires_grad_(True)
    resumed = WeightAverage(other, decay=0.6)
    resumed.resume(tmp_path)
    resumed.adopt()
    torch.testing.assert_close(other.weight.detach(), torch.nn.Parameter(expected).detach())


def test_before_the_first_step_it_is_the_model(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with WeightAverage(model, decay=0.9).in_place():
        assert torch.equal(model.weight, before)


def test_a_checkpoint_without_average_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without averaging"):
        WeightAverage(nn.Linear(2, 2), decay=0.9).resume(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_weights_go_back_towards_the_backbone_and_new_rows_do_not(tied: bool, share: float) -> None:
    model = make_model(vocab_size=12, tied=tied)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    backbone = Backbone(model, new_tokens=[9, 11])
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    backbone.draw_back(model, share=share)
    for name, weight in model.named_parameters():
        expected = (1 - share) * trained[name] + share * before[name]
        if len(weight) == 12:
            expected[[9, 11]] = trained[name][[9, 11]]
        torch.testing.assert_close(weight.detach(), expected)
    assert sum(len(weight) == 12 for weight in model.parameters()) == (1 if tied else 2)
