"""Integer weights: their representation, and the ports of the kernels that take them.

weight[i, o] ~ integer[i, o] * scale[o]. A kernel quantises its activations itself, each token row by its own scale:
activation[t, i] ~ (integer[t, i] - zero point) * scale[t], with integers from 0 to LARGEST_ACTIVATION and a constant
zero point, so that a row never depends on its batch companions.

The ranges make every product exact on every processor. x86 without VNNI adds the products of two neighbours in 16 bits
and saturates (`vpmaddubsw`); here their sum is at most LARGEST_ACTIVATION * LARGEST_PAIR = 32640 < 2^15.

Attributes of kernels keep the steps fine:

- `zero_point`: the integer of activations that stands for 0. Most of the range is above it where they have a low bound.
- `rotation`: rows are multiplied by `hadamard`, `rotation` inputs at a time, before they are quantised, and weights are
  stored for rotated rows, as in QuaRot (Ashkboos et al., 2024). A large input is spread over its neighbours.
- `exact`: the number of inputs that are also multiplied by float weights, as in LLM.int8() (Dettmers et al., 2022).
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple, TypeVar

from offramp.program.dtypes import FLOAT
from offramp.program.program import CAPTURED, Kernel

INTEGER = "I8"
"""Dtype of the integers, as safetensors names it."""
INDEX = "I64"
"""Dtype of the numbers of exact inputs."""
LARGEST_WEIGHT, LARGEST_PAIR = 127, 128
"""Integers of weights are from -127 to 127; magnitudes of those from inputs 2k and 2k + 1 to an output add up to at
most 128."""
LARGEST_ACTIVATION = 255
LEAST_MAGNITUDE = 1e-30
"""Largest magnitude that a row is taken to have at least, so that a row of zeros has a scale."""
SUFFIX = "-int8"
"""End of the names of templates whose kernels take integer weights: `attention-int8`, `up-int8`, `down-int8`."""
ZERO_POINT, ROTATION, EXACT = "zero_point", "rotation", "exact"
DEFAULTS: Mapping[str, int] = {ZERO_POINT: 128, ROTATION: 1, EXACT: 0}
"""Attributes that a kernel may have -> what it is taken to have without them: as many steps below 0 as above, rows that
are not rotated, no exact inputs."""
LOW_ZERO_POINT, BOUNDED = 16, ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")
"""Zero point of `down` in the stores that are written, after these activations: none gives less than -0.28."""
ROTATED = ("q.weight", "k.weight", "v.weight", "up.weight", "product.weight")
"""Matrices that multiply rotated rows, in a kernel with a rotation: not `o`, whose rows are sums over tokens."""
MOST_ROTATED, MOST_EXACT = 64, 16
"""Largest rotation, and most exact inputs."""
SCALE, TURNED, TRANSPOSED = ".scale", ".rotation", ".transposed"
"""Endings of the input of a captured kernel that takes the scales of integers, and of its attributes about them."""
CHOSEN_EXACT = 4
"""Exact inputs of `down` in the stores that are written."""
Size = TypeVar("Size", int, str)


def plain(template: str) -> str:
    """Return the template with float weights that computes the same, or the template itself."""
    return template[: -len(SUFFIX)] if template.endswith(SUFFIX) else template


def has_integers(kernel: Kernel) -> bool:
    """Return whether a kernel takes integer weights."""
    return kernel.template.endswith(SUFFIX) or (kernel.template == CAPTURED and bool(kernel.attributes))


def rounding_of(kernel: Kernel) -> Dict[str, Tuple[int, ...]]:
    """Return how a kernel rounds, by the port of its integers: zero point, rotation and exact inputs, or `Turned`.

    Ports of templates that have the values of DEFAULTS, as in the first stores of integers, are left out.
    """
    if kernel.template == CAPTURED:
        return {
            port: (turned.rotation, int(turned.is_transposed)) for port, turned in turned_of(kernel.attributes).items()
        }
    found = {}
    for port in (*ROTATED, "down.weight"):
        own = {name: option(kernel.attributes, name) for name in (ZERO_POINT, ROTATION, EXACT)}
        if port not in ROTATED:
            own[ROTATION] = DEFAULTS[ROTATION]
        if own != DEFAULTS:
            found[port] = tuple(own.values())
    return found


def narrow_shapes(role: str, outputs: Size, inputs: Size) -> Dict[str, Tuple[Size, ...]]:
    """Return the shapes of the integers, scales and bias of a linear layer, from sizes or their names.

    The integers are [inputs, outputs], the layout that `MatMulInteger` takes.
    """
    return {f"{role}.weight": (inputs, outputs), f"{role}.scale": (outputs,), f"{role}.bias": (outputs,)}


def exact_shapes(role: str, outputs: str) -> Dict[str, Tuple[str, ...]]:
    """Return the shapes of the weights of exact inputs, whose integers are 0, and of the numbers of these inputs."""
    return {f"{role}.exact": (EXACT, outputs), f"{role}.channels": (EXACT,)}


def option(sizes: Mapping[str, Any], name: str) -> int:
    """Return an optional attribute among those of a kernel."""
    return sizes.get(name, DEFAULTS[name])


def steps_of(sizes: Mapping[str, Any]) -> Tuple[int, int]:
    """Return how many integers of activations are below the zero point of a kernel, and how many above."""
    zero = option(sizes, ZERO_POINT)
    return min(zero, LARGEST_ACTIVATION - zero), LARGEST_ACTIVATION - zero


def rotation_of(width: int) -> int:
    """Return the rotation of rows of a width in the stores that are written: the largest that divides it."""
    size = MOST_ROTATED
    while width % size:
        size //= 2
    return size


def hadamard(size: int) -> List[List[float]]:
    """Return the orthogonal matrix [size, size] of a rotation by a power of two; it is its own inverse."""
    unit = size**-0.5
    return [[-unit if bin(row & column).count("1") % 2 else unit for column in range(size)] for row in range(size)]


class Turned(NamedTuple):
    """Form of integers [inputs, outputs] that a captured kernel takes in place of a weight."""

    rotation: int
    is_transposed: bool
    """The weight is [outputs, inputs] in the kernel's graph for PyTorch."""

    @property
    def attributes(self) -> Dict[str, int]:
        """Attributes of the kernel, by their endings."""
        return {TURNED: self.rotation, TRANSPOSED: int(self.is_transposed)}


def turned_of(attributes: Mapping[str, Any]) -> Dict[str, Turned]:
    """Return the inputs of a captured kernel that take integers, each with the form of these."""
    ports = [name[: -len(TURNED)] for name in attributes if name.endswith(TURNED)]
    return {port: Turned(attributes[port + TURNED], bool(attributes[port + TRANSPOSED])) for port in ports}


def wrong_turned(attributes: Mapping[str, Any]) -> Optional[str]:
    """Return what is wrong with the attributes of a captured kernel, or None."""
    ports = {name[: -len(TURNED)] for name in attributes if name.endswith(TURNED)}
    known = {port + end for port in ports for end in (TURNED, TRANSPOSED)}
    if known != set(attributes):
        return f"{CAPTURED} takes the attributes {sorted(known)}, not {sorted(attributes)}"
    for name, value in sorted(attributes.items()):
        choices = (0, 1) if name.endswith(TRANSPOSED) else tuple(1 << power for power in range(7))
        if type(value) is not int or value not in choices:
            return f"{name} is {value!r}"
    return None


def wrong_integers(attributes: Mapping[str, Any], weights: Mapping[str, Tuple[str, Tuple[int, ...]]]) -> Optional[str]:
    """Return what is wrong with the weights of a step of a captured kernel, input -> (dtype, shape), or None."""
    for port, turned in turned_of(attributes).items():
        dtype, shape = weights.get(port, ("", ()))
        if dtype != INTEGER or len(shape) != 2 or not shape[0] or shape[0] % turned.rotation:
            return f"{port} is {dtype} {list(shape)}, the kernel takes {INTEGER} [inputs, outputs]"
        if weights.get(port + SCALE) != (FLOAT, shape[1:]):
            return f"{port + SCALE} is {weights.get(port + SCALE)}, the kernel takes {(FLOAT, shape[1:])}"
    return None
