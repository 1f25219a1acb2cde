"""Modules without weights: what a store has may be missing, and nothing else."""

import pytest
import torch
from torch import nn

import offramp
from offramp.errors import StageError
from offramp.streaming.weightless import weightless


class Quantised(nn.Module):
    """Makes a buffer of its weight, as I-BERT does."""

    persistent = True

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones_like(self.layer.weight), persistent=self.persistent)

    def forward(self, values):
        return nn.functional.linear(self.first(values), self.layer.weight * self.scale, self.layer.bias)


class Unsaved(Quantised):
    persistent = False


def test_a_saved_buffer_comes_from_the_store(tmp_path):
    torch.manual_seed(0)
    module, values = Quantised().eval(), torch.randn(2, 4)
    module.scale.fill_(3)
    with torch.no_grad():
        expected = module(values)
    offramp.divide(module, values, tmp_path / "store", method="eager")
    with offramp.stream(Quantised, tmp_path / "store") as stream:
        assert torch.equal(stream(values), expected)


def test_a_buffer_that_is_in_no_store_must_have_data():
    with pytest.raises(StageError, match="buffer scale has no data"):
        weightless(Unsaved)
