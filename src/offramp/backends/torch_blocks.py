"""Kernels that compute blocks of outputs in PyTorch (`offramp.program.blocks`), as functions of their inputs.

The operations are those of `torch_modules`, on tokens in one axis.

Shapes: B rows, S tokens, T = B S, H hidden, R outputs of a block.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from offramp.backends.torch_modules import ACTIVATIONS, Attend
from offramp.backends.torch_narrow import multiply, quantise
from offramp.program.encoder import parts_of
from offramp.program.narrow import plain
from offramp.program.program import Kernel
from offramp.runtime.backend import State

Inputs = Mapping[str, Any]
Run = Callable[[State, Inputs], tuple[Tensor]]


def block_kernel(kernel: Kernel, attend: Attend) -> Run:
    """Return the function of a kernel whose template is one of those of blocks."""
    sizes: Mapping[str, Any] = kernel.attributes
    linear_of = _floats if plain(kernel.template) == kernel.template else _integers

    def heads(state: State, inputs: Inputs) -> tuple[Tensor]:
        shape = (state.num_rows, state.length, -1, sizes["head_size"])
        linear = linear_of(inputs["hidden"], inputs, sizes)
        query, key, value = (linear(role).view(shape).transpose(1, 2) for role in "qkv")
        context = attend(query, key, value, inputs["mask"], sizes["head_size"] ** -0.5)
        return (context.transpose(1, 2).reshape(len(inputs["hidden"]), -1),)

    def product(state: State, inputs: Inputs) -> tuple[Tensor]:
        result = linear_of(inputs["x"], inputs, sizes)("product")
        return (result if sizes["activation"] is None else ACTIVATIONS[sizes["activation"]](result),)

    def join_norm(state: State, inputs: Inputs) -> tuple[Tensor]:
        total = torch.cat(parts_of(inputs), 1) + inputs["hidden"]
        weight, bias = inputs["norm.weight"], inputs["norm.bias"]
        return (functional.layer_norm(total, total.shape[1:], weight, bias, sizes["norm_epsilon"]),)

    def join(state: State, inputs: Inputs) -> tuple[Tensor]:
        return (torch.cat(parts_of(inputs), 1),)

    def pick(state: State, inputs: Inputs) -> tuple[Tensor]:
        return (inputs["hidden"][:: state.length].clone(),)

    templates = {"heads": heads, "product": product, "join-norm": join_norm, "join": join, "first": pick}
    return templates[plain(kernel.template)]


def _floats(x: Tensor, inputs: Inputs, sizes: Mapping) -> Callable[[str], Tensor]:
    """Return a function of a role that computes its linear layer."""
    return lambda role: functional.linear(x, inputs[role + ".weight"], inputs[role + ".bias"])


def _integers(x: Tensor, inputs: Inputs, sizes: Mapping) -> Callable[[str], Tensor]:
    """Quantise the rows of x once, for the linear layers of any roles."""
    integers = quantise(x, sizes)
    return lambda role: multiply(integers, f"{role}.", inputs)
