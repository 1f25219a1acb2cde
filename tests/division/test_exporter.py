"""Graphs that PyTorch's exporter writes: decomposed only where that changes an operation, and right in any case."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.onnx._internal.exporter import _fx_passes

from offramp.division import exporter
from offramp.division.export import opened


class Stage(nn.Module):
    """A function of `inputs`, as a captured graph is one."""

    def __init__(self, function, *names):
        super().__init__()
        self.function, self.inputs = function, names

    def forward(self, *inputs):
        return (self.function(*inputs),)


def idle(x, w):
    """Sizes and dtypes are those that are there; the length of the texts may differ."""
    y = x.reshape(x.shape[0], x.shape[1], 4).to(torch.float32).contiguous()
    return functional.linear(y, w).view(x.shape[0], x.shape[1], 3).reshape(-1, 3)


STAGES = {
    "idle": (idle, False),
    "idle at the end": (lambda x, w: functional.linear(x, w).reshape(x.shape[0], x.shape[1], 3), False),
    "no conversion at the end": (lambda x, w: functional.linear(x, w).to(torch.float32), True),
    "in place": (lambda x, w: functional.linear(x, w).mul_(2).add_(1), True),
    "another dtype": (lambda x, w: (x.to(torch.float64) @ w.T.to(torch.float64)).to(torch.float32), True),
    "without a function": (
        lambda x, w: torch.where((functional.linear(x, w) > 0).__and__(x.sum() < 9), 1.0, 0.0),
        True,
    ),
}
"""Name -> function of values [B, T, 4] and weights [3, 4], and whether PyTorch must decompose it."""


@pytest.fixture
def decomposed(monkeypatch):
    """The programs that PyTorch decomposes."""
    found, before = [], _fx_passes.decompose_with_registry
    monkeypatch.setattr(_fx_passes, "decompose_with_registry", lambda *of: (found.append(of), before(*of))[1])
    return found


def difference_of(function):
    """Largest difference of ONNX Runtime's result, for other sizes than those of the example."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 5, 4, generator=generator), torch.randn(3, 4, generator=generator)]
    data = exporter.to_onnx(Stage(function, "x", "w"), given, [(0, 1)])
    other = torch.randn(3, 7, 4, generator=generator)
    result = opened(data).run(None, {"x": other.numpy(), "w": given[1].numpy()})[0]
    wanted = function(other, given[1]).numpy()
    assert result.shape == wanted.shape and result.dtype == wanted.dtype
    return float(np.abs(result - wanted).max())


@pytest.mark.parametrize("name", STAGES)
def test_operations_are_decomposed_where_it_changes_them(name, decomposed):
    function, must = STAGES[name]
    assert difference_of(function) <= 1e-5
    assert bool(decomposed) is must


def test_what_fails_undecomposed_is_decomposed(monkeypatch, decomposed):
    write, asked = torch.onnx.export, []

    def export(*words, **options):
        asked.append(len(decomposed))
        if len(asked) == 1:
            raise ValueError("Cannot view a tensor")
        return write(*words, **options)

    monkeypatch.setattr(torch.onnx, "export", export)
    assert difference_of(idle) <= 1e-5
    assert asked == [0, 0] and len(decomposed) == 1


def test_another_version_of_pytorch_is_slower_and_no_more(monkeypatch, decomposed):
    absent = [("torch.no_such", "", "name"), ("torch.onnx", "", "no_such"), ("torch.onnx", "NoSuch", "name")]
    monkeypatch.setattr(exporter, "_TABLES", [(*each, exporter._kept) for each in absent[1:]])
    monkeypatch.setattr(exporter, "_DECOMPOSING", (*absent[0], exporter._kept))
    assert difference_of(idle) <= 1e-5
    assert len(decomposed) == 1


def test_pytorch_is_as_it_was():
    changes = [*exporter._TABLES, exporter._DECOMPOSING]
    before = [_of(*change[:3]) for change in changes]
    difference_of(idle)
    assert [_of(*change[:3]) for change in changes] == before


def _of(module, owner, name):
    holder = importlib.import_module(module)
    return vars(getattr(holder, owner) if owner else holder)[name]
