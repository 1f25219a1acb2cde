"""Integer weights: their representation, and the ports of the kernels that take them.

weight[i, o] ~ integer[i, o] * scale[o]. A kernel quantises its activations itself, each token row by its own scale:
activation[t, i] ~ (integer[t, i] - ZERO_POINT) * scale[t], with integers from ZERO_POINT - LARGEST_ACTIVATION to
ZERO_POINT + LARGEST_ACTIVATION, so that a row never depends on its batch companions.

The ranges make every product exact on every processor. x86 without VNNI adds the products of two neighbours in 16 bits
and saturates (`vpmaddubsw`); here their sum is at most 2 * 255 * 64 = 32640 < 2^15.
"""

from __future__ import annotations

from typing import Dict, Tuple, TypeVar

INTEGER = "I8"
"""Dtype of the integers, as safetensors names it."""
LARGEST_WEIGHT = 64
"""Integers of weights are from -64 to 64."""
ZERO_POINT, LARGEST_ACTIVATION = 128, 127
"""Unsigned integers of activations are from 1 to 255; ZERO_POINT stands for 0."""
LEAST_MAGNITUDE = 1e-30
"""Largest magnitude that a row is taken to have at least, so that a row of zeros has a scale."""
SUFFIX = "-int8"
"""End of the names of templates whose kernels take integer weights: `attention-int8`, `up-int8`, `down-int8`."""
Size = TypeVar("Size", int, str)


def plain(template: str) -> str:
    """Return the template with float weights that computes the same, or the template itself."""
    return template[: -len(SUFFIX)] if template.endswith(SUFFIX) else template


def narrow_shapes(role: str, outputs: Size, inputs: Size) -> Dict[str, Tuple[Size, ...]]:
    """Return the shapes of the integers, scales and bias of a linear layer, from sizes or their names.

    The integers are [inputs, outputs], the layout that `MatMulInteger` takes.
    """
    return {f"{role}.weight": (inputs, outputs), f"{role}.scale": (outputs,), f"{role}.bias": (outputs,)}
