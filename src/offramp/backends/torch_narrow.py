"""Linear layers with integer weights in PyTorch: each token row is quantised by itself, and the products are exact.

Shapes: T tokens, K inputs, N outputs, E exact inputs.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.program.narrow import LEAST_MAGNITUDE, ROTATION, Turned, hadamard, option, steps_of


class Quantised(NamedTuple):
    """Rows of activations as integers."""

    integers_TK: Tensor
    """int8, with the zero point and `shift` subtracted. With a shift, the last row is ones: its products are the sums
    of the weights of each output, and `shift` times these is added to the products of the other rows."""
    shift: int
    scale_T1: Tensor
    axes: torch.Size
    """Axes of the rows before they were laid one after another."""
    rows_TK: Tensor
    """Rows that were quantised, after rotation."""


def quantise(x: Tensor, sizes: Mapping[str, Any]) -> Quantised:
    """Rotate the rows of [..., K], and quantise each by its own scale, as the attributes of a kernel say."""
    rows_TK, rotation, (below, above) = x.reshape(-1, x.shape[-1]), option(sizes, ROTATION), steps_of(sizes)
    if rotation > 1:  # a product for each row: the bits of one for all rows depend on their number
        turns = _rotation(rotation).expand(len(rows_TK), -1, -1)
        rows_TK = torch.bmm(rows_TK.view(len(rows_TK), -1, rotation), turns).view(rows_TK.shape)
    magnitude_T1 = torch.maximum(rows_TK.amax(1, keepdim=True), rows_TK.amin(1, keepdim=True) * (-above / below))
    scale_T1, shift = magnitude_T1.clamp_min(LEAST_MAGNITUDE) / above, above - torch.iinfo(torch.int8).max
    integers_TK = (rows_TK / scale_T1).round_().sub_(shift).to(torch.int8)
    if shift:
        integers_TK = torch.cat([integers_TK, integers_TK.new_ones(1, x.shape[-1])])
    return Quantised(integers_TK, shift, scale_T1, x.shape[:-1], rows_TK)


def multiply(x: Quantised, role: str, inputs: Mapping[str, Any]) -> Tensor:
    """Return [..., N]: the product with the integers [K, N] of a role, scaled by output and row, plus the bias and the
    product of the exact inputs."""
    sums_TN = torch.ops.aten._int_mm(x.integers_TK, inputs[f"{role}weight"])
    if x.shift:
        sums_TN = sums_TN[:-1].add_(sums_TN[-1], alpha=x.shift)
    out_TN = sums_TN.float()
    out_TN.mul_(inputs[f"{role}scale"]).mul_(x.scale_T1).add_(inputs[f"{role}bias"])
    if f"{role}exact" in inputs:
        chosen_TE = x.rows_TK.index_select(1, inputs[f"{role}channels"])
        # One at a time: the bits of a matrix product depend on its number of outputs.
        for exact, weight_N in enumerate(inputs[f"{role}exact"]):
            out_TN.addcmul_(chosen_TE[:, exact : exact + 1], weight_N)
    return out_TN.view(*x.axes, -1)


def widened(integers_KN: Tensor, scale_N: Tensor, form: Turned) -> Tensor:
    """Return the float weight of a captured kernel that integers stand for."""
    weight_KN = integers_KN.float().mul_(scale_N)
    if form.rotation > 1:  # the matrix is its own inverse
        weight_KN = (_rotation(form.rotation) @ weight_KN.view(-1, form.rotation, len(scale_N))).view(weight_KN.shape)
    return weight_KN.T if form.is_transposed else weight_KN


@cache
def _rotation(size: int) -> Tensor:
    return torch.tensor(hadamard(size))


class NarrowLinear(nn.Module):
    """A linear layer of quantised rows, [T, K] to [..., N]."""

    def __init__(self, inputs: int, outputs: int, exact: int = 0) -> None:
        super().__init__()
        if exact:
            self.exact = nn.Parameter(torch.empty(exact, outputs))
            self.channels = nn.Parameter(torch.empty(exact, dtype=torch.int64), requires_grad=False)
        self.weight = nn.Parameter(torch.empty(inputs, outputs, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Quantised) -> Tensor:
        """Multiply, scale by output and row, add."""
        return multiply(x, "", self._parameters)
