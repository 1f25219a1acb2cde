"""Linear layers with integer weights in PyTorch: each token row is quantised by itself, and the products are exact.

Shapes: T tokens, K inputs, N outputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from offramp.program.narrow import LARGEST_ACTIVATION, LEAST_MAGNITUDE


class Quantised(NamedTuple):
    """Rows of activations as integers."""

    integers_TK: Tensor
    """int8, without the zero point."""
    scale_T1: Tensor
    axes: torch.Size
    """Axes of the rows before they were laid one after another."""


def quantise(x: Tensor) -> Quantised:
    """Quantise the rows of [..., K], each by its own scale."""
    rows_TK = x.reshape(-1, x.shape[-1])
    scale_T1 = rows_TK.abs().amax(1, keepdim=True).clamp_min(LEAST_MAGNITUDE) / LARGEST_ACTIVATION
    return Quantised((rows_TK / scale_T1).round_().to(torch.int8), scale_T1, x.shape[:-1])


def multiply(x: Quantised, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return [..., N]: the product with the integers [K, N], scaled by output and row, and the bias."""
    out_TN = torch.ops.aten._int_mm(x.integers_TK, weight).float()
    out_TN.mul_(scale).mul_(x.scale_T1).add_(bias)
    return out_TN.view(*x.axes, -1)


class NarrowLinear(nn.Module):
    """A linear layer of quantised rows, [T, K] to [..., N]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Quantised) -> Tensor:
        """Multiply, scale by output and row, add."""
        return multiply(x, self.weight, self.scale, self.bias)
