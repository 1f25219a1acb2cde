"""The ONNX operators that kernels of captured programs may have, each with the shapes of its results and its work.

A rule is given the dtypes and shapes of an operation's inputs, and the numbers of those that are known before a run:
constants, and what is computed from sizes. It returns the same of the results, without computing values: a graph from
an untrusted store must not say with its first result that it takes a terabyte. Where a shape depends on other numbers,
or a parameter is one that ONNX Runtime does not check (a stride of 0 ends the process), the operation is refused.

Operators whose results depend on the system (files, random numbers), that run other graphs, or that have sequences or
strings, are left out. So are those that no graph needs that `offramp divide` has written so far.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from offramp.backends.onnx_reader import DTYPES, Node
from offramp.program.checks import WrongError

MOST_EXACT = 1 << 53
"""Integers below this are exact as float64, by which ONNX Runtime counts; this may be a larger one, rounded."""
_WHOLE = ((1 << 31) - 1, (1 << 63) - 1)
"""Ends of a slice that mean the whole axis, in both directions."""
MOST_KNOWN = 4096
"""Most elements of a value whose numbers are computed: sizes of axes, indices, masks of small windows."""
Shape = Tuple[int, ...]


class Known(NamedTuple):
    """Facts about a value that are known before a run."""

    dtype: str
    shape: Shape
    numbers: Optional[np.ndarray] = None
    """None: they are known when the operation has run."""

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return product(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in memory."""
        return self.num_elements * np.dtype(self.dtype).itemsize


class Call(NamedTuple):
    """An operation with what is known of its inputs. One that is left out is None."""

    node: Node
    args: Sequence[Optional[Known]]

    def given(self, index: int) -> Known:
        """Return an input. Raises WrongError where it is left out."""
        found = self.optional(index)
        if found is None:
            raise WrongError(f"{self.node.operator} lacks an input")
        return found

    def optional(self, index: int) -> Optional[Known]:
        """Return an input, or None where it is left out."""
        return self.args[index] if index < len(self.args) else None

    def attribute(self, name: str, default: Any) -> Any:
        """Return an attribute of the type of `default`. Tuples are of integers."""
        found = self.node.attributes.get(name, default)
        of_integers = not isinstance(found, tuple) or all(isinstance(each, int) for each in found)
        if type(found) is not type(default) or not of_integers:
            raise WrongError(f"{self.node.operator}: the attribute {name!r} has another type")
        return found

    def flag(self, name: str, default: int = 0) -> bool:
        """Return an attribute that is 0 or 1. What other numbers mean depends on the operation."""
        found = self.attribute(name, default)
        self.require(found in (0, 1), f"{name} {found}")
        return bool(found)

    def integers(self, index: int, name: str) -> Tuple[int, ...]:
        """Return the integers of an input that must be known before a run."""
        found = self.given(index)
        self.require(len(found.shape) < 2 and np.dtype(found.dtype).kind in "iu", f"{name} {found.dtype} {found.shape}")
        if found.numbers is None:
            raise WrongError(f"{self.node.operator}: {name} depends on the values of inputs")
        return tuple(int(each) for each in found.numbers.reshape(-1))

    def axis(self, rank: int, default: int = 0) -> int:
        """Return the axis of an array of `rank` axes that the attribute says, counted from the first."""
        return self.axes_of((self.attribute("axis", default),), rank)[0]

    def axes_of(self, axes: Sequence[int], rank: int) -> Tuple[int, ...]:
        """Return distinct axes of an array of `rank` axes, counted from the first."""
        self.require(all(-rank <= axis < rank for axis in axes), f"axes {axes} of {rank}")
        found = tuple(axis % rank for axis in axes)
        self.require(len(set(found)) == len(found), f"axes {axes} twice")
        return found

    def require(self, is_right: bool, what: object) -> None:
        """Raise WrongError unless a condition holds; `what` is what does not fit."""
        if not is_right:
            raise WrongError(f"{self.node.operator} does not take {what}")


Numbers = Callable[[Call, Shape, Sequence[np.ndarray]], Any]
"""Function of (call, shape of the first result, numbers of each input that is given) -> numbers of the result; of
several results a list."""


class Operator(NamedTuple):
    """A row of the table."""

    rule: Callable[[Call], Sequence[Known]]
    """Results, also those that are left out; after them, arrays that the operation needs meanwhile."""
    attributes: str = ""
    """Names of attributes; others are refused."""
    numbers: Optional[Numbers] = None
    """None: numbers of the result are not computed."""
    work: Optional[Callable[[Call, Sequence[Known]], int]] = None
    """Function of (call, results) -> multiply-adds; None: only those of reading and writing the elements."""


def product(sizes: Sequence[int]) -> int:
    """Return the product of sizes."""
    found = 1
    for size in sizes:
        found *= size
    return found


def broadcast(call: Call, shapes: Sequence[Shape]) -> Shape:
    """Return the shape of several arrays together."""
    rank = max(map(len, shapes), default=0)
    aligned = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    found = []
    for sizes in zip(*aligned):
        others = {size for size in sizes if size != 1}
        call.require(len(others) < 2, f"shapes {shapes}")
        found.append(others.pop() if others else 1)
    return tuple(found)


# Rules: elementwise, and others that keep a shape.


def _together(call: Call, dtype: Optional[str] = None, like: int = 0) -> List[Known]:
    """All inputs are broadcast; the result has the dtype of one of them, or another one."""
    shapes = [each.shape for each in call.args if each is not None]
    return [Known(dtype or call.given(like).dtype, broadcast(call, shapes))]


def _like_first(call: Call) -> List[Known]:
    first = call.given(0)
    if first.shape and ("axis" in call.node.attributes):
        call.axis(len(first.shape))
    return [Known(first.dtype, first.shape)]


def _clip(call: Call) -> List[Known]:
    call.require(all(each is None or not each.shape for each in call.args[1:]), "limits that are not numbers")
    return _like_first(call)


def _divided(call: Call) -> List[Known]:
    """Refuse integer divisions that might divide by 0, or overflow: the processor ends the process."""
    divisor = call.given(1)
    if np.dtype(divisor.dtype).kind in "iu" and divisor.num_elements:
        if divisor.numbers is None:
            raise WrongError(f"{call.node.operator}: an integer divisor depends on the values of inputs")
        call.require(not np.isin(divisor.numbers, (0, -1)).any(), "an integer divisor of 0 or -1")
    return _together(call)


def _cast(call: Call) -> List[Known]:
    first, dtype = call.given(0), DTYPES.get(call.attribute("to", 0), "")
    call.require(dtype != "", "this element type")
    return [Known(dtype, first.shape)]


def _layer_norm(call: Call) -> List[Known]:
    first = call.given(0)
    axis = call.axis(len(first.shape), -1)
    kept = (*first.shape[:axis], *(1 for _ in first.shape[axis:]))
    for scale in call.args[1:]:
        call.require(scale is not None and broadcast(call, [scale.shape, first.shape[axis:]]) == first.shape[axis:], 0)
    return [Known(first.dtype, first.shape), Known("float32", kept), Known("float32", kept)]


def _channel_norm(call: Call) -> List[Known]:
    """Scales, means and variances have one number for each channel."""
    first = call.given(0)
    call.require(len(first.shape) > 1 and not call.flag("training_mode"), f"{first.shape}")
    for other in call.args[1:]:
        call.require(other is not None and other.shape == first.shape[1:2], "parameters of another number of channels")
    return [Known(first.dtype, first.shape)]


# Rules: sizes and constants.


def _shape(call: Call) -> List[Known]:
    rank = len(call.given(0).shape)
    sizes = call.given(0).shape[call.attribute("start", 0) : call.attribute("end", rank)]
    return [Known("int64", (len(sizes),), np.array(sizes, np.int64))]


def _size(call: Call) -> List[Known]:
    return [Known("int64", (), np.array(call.given(0).num_elements, np.int64))]


def _constant(call: Call) -> List[Known]:
    call.require(len(call.node.attributes) == 1, "several values")
    ((name, value),) = call.node.attributes.items()
    dtypes = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}
    return [known(value if name == "value" else np.array(value, dtypes[name]))]


def known(numbers: np.ndarray) -> Known:
    """Return what is known of a constant: all, unless it is large."""
    return Known(numbers.dtype.name, numbers.shape, numbers if numbers.size <= MOST_KNOWN else None)


def _filled(call: Call) -> List[Known]:
    value = call.node.attributes.get("value", np.zeros(1, np.float32))
    call.require(isinstance(value, np.ndarray) and value.size == 1, "a value of another size than 1")
    return [Known(value.dtype.name, call.integers(0, "the shape"))]


def _range(call: Call) -> List[Known]:
    limits = [call.given(index).numbers for index in range(3)]
    found = [each.item() for each in limits if each is not None and each.size == 1]
    if len(found) < 3:
        raise WrongError("Range: the limits depend on the values of inputs")
    first, last, step = found
    call.require(step != 0 and all(abs(float(each)) < np.inf for each in found), "a step of 0")
    length, dtype = Fraction(last) - Fraction(first), np.dtype(call.given(0).dtype).type
    number = math.ceil(length / Fraction(step))
    with np.errstate(all="ignore"):
        rounded = float(dtype(last) - dtype(first))
    is_exact = rounded == length and math.ceil(rounded / step) == number and abs(step) < MOST_EXACT
    call.require(is_exact and abs(length) < MOST_EXACT, f"the range from {first} to {last} by {step}")
    return [Known(call.given(0).dtype, (max(number, 0),))]


# Rules: other shapes of the same elements.


def _reshape(call: Call) -> List[Known]:
    first, sizes = call.given(0), list(call.integers(1, "the shape"))
    if not call.flag("allowzero"):
        call.require(all(size or index < len(first.shape) for index, size in enumerate(sizes)), f"the shape {sizes}")
        sizes = [size or first.shape[index] for index, size in enumerate(sizes)]
    call.require(all(size >= -1 for size in sizes) and sizes.count(-1) < 2, f"the shape {sizes}")
    if -1 in sizes:
        others = product([size for size in sizes if size != -1])
        call.require(others > 0 and first.num_elements % others == 0, f"{first.shape} as {sizes}")
        sizes[sizes.index(-1)] = first.num_elements // others
    call.require(product(sizes) == first.num_elements, f"{first.shape} as {sizes}")
    return [Known(first.dtype, tuple(sizes))]


def _flatten(call: Call) -> List[Known]:
    first = call.given(0)
    axis = call.attribute("axis", 1)
    call.require(-len(first.shape) <= axis <= len(first.shape), f"axis {axis}")
    axis += len(first.shape) if axis < 0 else 0
    return [Known(first.dtype, (product(first.shape[:axis]), product(first.shape[axis:])))]


def _axes(call: Call) -> Optional[Tuple[int, ...]]:
    """Return axes from an attribute or, since version 13, an input; None: not given."""
    if "axes" in call.node.attributes:
        return call.attribute("axes", ())
    return None if call.optional(1) is None else call.integers(1, "axes")


def _unsqueeze(call: Call) -> List[Known]:
    first, axes = call.given(0), _axes(call) or ()
    found, sizes = set(call.axes_of(axes, len(first.shape) + len(axes))), iter(first.shape)
    shape = tuple(1 if axis in found else next(sizes) for axis in range(len(first.shape) + len(axes)))
    return [Known(first.dtype, shape)]


def _squeeze(call: Call) -> List[Known]:
    first, axes = call.given(0), _axes(call)
    if not axes:
        axes = [axis for axis, size in enumerate(first.shape) if size == 1]
    found = call.axes_of(axes, len(first.shape))
    call.require(all(first.shape[axis] == 1 for axis in found), f"axes {found} of {first.shape}")
    return [Known(first.dtype, tuple(size for axis, size in enumerate(first.shape) if axis not in found))]


def _permutation(call: Call) -> Tuple[int, ...]:
    rank = len(call.given(0).shape)
    found = call.attribute("perm", tuple(reversed(range(rank))))
    call.require(sorted(found) == list(range(rank)), f"the permutation {found} of {rank} axes")
    return found


def _transpose(call: Call) -> List[Known]:
    first = call.given(0)
    return [Known(first.dtype, tuple(first.shape[axis] for axis in _permutation(call)))]


# Rules: repeated, joined and cut.


def _expand(call: Call) -> List[Known]:
    first, sizes = call.given(0), call.integers(1, "the shape")
    call.require(all(size >= 0 for size in sizes), f"the shape {sizes}")
    return [Known(first.dtype, broadcast(call, [first.shape, sizes]))]


def _tile(call: Call) -> List[Known]:
    first, repeats = call.given(0), call.integers(1, "the repeats")
    call.require(len(repeats) == len(first.shape) and all(each >= 0 for each in repeats), f"repeats {repeats}")
    return [Known(first.dtype, tuple(size * each for size, each in zip(first.shape, repeats)))]


def _concat(call: Call) -> List[Known]:
    first = call.given(0)
    axis = call.axis(len(first.shape))
    rests = {(*each.shape[:axis], *each.shape[axis + 1 :]) for each in call.args if each is not None}
    same = all(each is not None and len(each.shape) == len(first.shape) for each in call.args)
    call.require(len(rests) == 1 and same, f"shapes {sorted(rests)}")
    joined = sum(each.shape[axis] for each in call.args if each is not None)
    return [Known(first.dtype, (*first.shape[:axis], joined, *first.shape[axis + 1 :]))]


def _parts(call: Call) -> Tuple[int, List[int]]:
    """Return the axis of a Split and the sizes of its parts."""
    first, number = call.given(0), len(call.node.outputs)
    axis = call.axis(len(first.shape))
    size = first.shape[axis]
    if call.optional(1) is not None:
        sizes = list(call.integers(1, "the sizes"))
    else:
        call.require(call.attribute("num_outputs", number) == number, "another number of parts")
        each = -(-size // number)
        sizes = [each] * (number - 1) + [size - each * (number - 1)]
    call.require(len(sizes) == number and sum(sizes) == size and min(sizes, default=0) >= 0, f"parts {sizes} of {size}")
    return axis, sizes


def _split(call: Call) -> List[Known]:
    first, (axis, sizes) = call.given(0), _parts(call)
    return [Known(first.dtype, (*first.shape[:axis], size, *first.shape[axis + 1 :])) for size in sizes]


def _slices(call: Call) -> List[range]:
    """Return the indices of each axis that a Slice takes. Starts and ends are limited as ONNX says."""
    shape, starts, ends = call.given(0).shape, call.integers(1, "starts"), call.integers(2, "ends")
    given = call.integers(3, "axes") if call.optional(3) is not None else tuple(range(len(starts)))
    steps = call.integers(4, "steps") if call.optional(4) is not None else (1,) * len(starts)
    axes = call.axes_of(given, len(shape))
    call.require(len(starts) == len(ends) == len(axes) == len(steps) and 0 not in steps, "such slices")
    found = [range(size) for size in shape]
    for axis, start, end, step in zip(axes, starts, ends, steps):
        size, back = shape[axis], int(step < 0)
        call.require(not back or end not in _WHOLE, f"the end {end} of a slice backwards")
        first, last = (place + size if place < 0 else place for place in (start, end))
        first, last = min(max(first, 0), size - back), min(max(last, -back), size - back)
        found[axis] = range(first, last, step) if size else range(0)
    return found


def _slice(call: Call) -> List[Known]:
    return [Known(call.given(0).dtype, tuple(map(len, _slices(call))))]


def _pad(call: Call) -> List[Known]:
    first, pads = call.given(0), call.integers(1, "the pads")
    given = call.integers(3, "axes") if call.optional(3) is not None else tuple(range(len(first.shape)))
    axes, sizes = call.axes_of(given, len(first.shape)), list(first.shape)
    call.require(len(pads) == 2 * len(axes), f"pads {pads}")
    for axis, before, after in zip(axes, pads, pads[len(axes) :]):
        if call.attribute("mode", "constant") != "constant":
            call.require(0 <= min(before, after) <= max(before, after) < max(sizes[axis], 1), f"pads {pads}")
        call.require(min(before, 0) + min(after, 0) >= -sizes[axis], f"pads {pads}")
        sizes[axis] += before + after
    return [Known(first.dtype, tuple(sizes))]


# Rules: indices.


def _gather(call: Call) -> List[Known]:
    first, indices = call.given(0), call.given(1)
    axis = call.axis(len(first.shape))
    return [Known(first.dtype, (*first.shape[:axis], *indices.shape, *first.shape[axis + 1 :]))]


def _gather_elements(call: Call) -> List[Known]:
    first, indices = call.given(0), call.given(1)
    axis = call.axis(len(first.shape))
    call.require(len(indices.shape) == len(first.shape), f"indices {indices.shape} of {first.shape}")
    sizes = zip(indices.shape, first.shape)
    call.require(all(a <= b for place, (a, b) in enumerate(sizes) if place != axis), f"indices {indices.shape}")
    return [Known(first.dtype, indices.shape)]


def _gather_nd(call: Call) -> List[Known]:
    first, indices, batch = call.given(0), call.given(1), call.attribute("batch_dims", 0)
    least = min(len(first.shape), len(indices.shape))
    call.require(0 <= batch < least and first.shape[:batch] == indices.shape[:batch], f"batch_dims {batch}")
    depth = indices.shape[-1]
    call.require(0 < depth <= len(first.shape) - batch, f"indices {indices.shape} of {first.shape}")
    return [Known(first.dtype, (*indices.shape[:-1], *first.shape[batch + depth :]))]


def _scatter_nd(call: Call) -> List[Known]:
    first, indices, updates = call.given(0), call.given(1), call.given(2)
    call.require(bool(indices.shape) and 0 < indices.shape[-1] <= len(first.shape), f"indices {indices.shape}")
    wanted = (*indices.shape[:-1], *first.shape[indices.shape[-1] :])
    call.require(updates.shape == wanted, f"updates {updates.shape}, not {wanted}")
    return [Known(first.dtype, first.shape)]


def _scatter_elements(call: Call) -> List[Known]:
    first, indices, updates = call.given(0), call.given(1), call.given(2)
    call.axis(len(first.shape))
    call.require(indices.shape == updates.shape and len(indices.shape) == len(first.shape), f"updates {updates.shape}")
    return [Known(first.dtype, first.shape)]


def _one_hot(call: Call) -> List[Known]:
    indices, values = call.given(0), call.given(2)
    depth, *others = call.integers(1, "the depth")
    rank = len(indices.shape) + 1
    call.require(not others and depth >= 0 and values.shape == (2,), "such a depth")
    axis = call.axis(rank, -1) if "axis" in call.node.attributes else rank - 1
    return [Known(values.dtype, (*indices.shape[:axis], depth, *indices.shape[axis:]))]


# Rules: along axes.


def _reduce(call: Call) -> List[Known]:
    first, axes, keeps = call.given(0), _axes(call), call.flag("keepdims", 1)
    rank = len(first.shape)
    if not axes:
        axes = () if call.flag("noop_with_empty_axes") else tuple(range(rank))
    found = call.axes_of(axes, rank)
    shape = (1 if axis in found else size for axis, size in enumerate(first.shape) if keeps or axis not in found)
    return [Known(first.dtype, tuple(shape))]


def _arg(call: Call) -> List[Known]:
    first = call.given(0)
    axis, kept = call.axis(len(first.shape)), (1,) if call.flag("keepdims", 1) else ()
    call.require(first.shape[axis] > 0, "an empty axis")
    return [Known("int64", (*first.shape[:axis], *kept, *first.shape[axis + 1 :]))]


def _top_k(call: Call) -> List[Known]:
    first = call.given(0)
    axis, (number, *others) = call.axis(len(first.shape), -1), call.integers(1, "the number")
    call.require(not others and 0 <= number <= first.shape[axis], f"the first {number} of {first.shape}")
    shape = (*first.shape[:axis], number, *first.shape[axis + 1 :])
    return [Known(first.dtype, shape), Known("int64", shape)]


# Rules: products.


def _matmul(call: Call) -> List[Known]:
    one, other = call.given(0), call.given(1)
    a, b = one.shape, other.shape
    call.require(bool(a) and bool(b) and a[-1] == b[max(len(b) - 2, 0)], f"shapes {a} and {b}")
    batch = broadcast(call, [a[:-2], b[:-2]])
    return [Known(one.dtype, (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ())))]


def _gemm(call: Call) -> List[Known]:
    one, other, bias = call.given(0), call.given(1), call.optional(2)
    call.require(len(one.shape) == len(other.shape) == 2, f"shapes {one.shape} and {other.shape}")
    a = one.shape[::-1] if call.flag("transA") else one.shape
    b = other.shape[::-1] if call.flag("transB") else other.shape
    shape = (a[0], b[1])
    fits = bias is None or broadcast(call, [shape, bias.shape]) == shape
    call.require(a[1] == b[0] and fits, f"shapes {one.shape} and {other.shape}")
    return [Known(one.dtype, shape)]


def _gemm_work(call: Call, results: Sequence[Known]) -> int:
    return results[0].num_elements * call.given(0).shape[0 if call.flag("transA") else 1]


def _matmul_work(call: Call, results: Sequence[Known]) -> int:
    return results[0].num_elements * call.given(0).shape[-1]


def _quantised(call: Call) -> List[Known]:
    """Unsigned bytes with a scale for each place of an axis, or one scale; zero points are given, of the same shape."""
    first, scale, zero = call.given(0), call.given(1), call.given(2)
    call.require(
        len(call.args) == 3 and first.dtype == scale.dtype == "float32" and zero.dtype == "uint8", "such types"
    )
    axis = call.axis(len(first.shape), 1) if scale.shape else 0
    fits = scale.shape in ((), first.shape[axis : axis + 1]) and zero.shape == scale.shape
    call.require(fits, f"scales {scale.shape} and zero points {zero.shape} for {first.shape}")
    return [Known("uint8", first.shape)]


def _integer_product(call: Call) -> List[Known]:
    """Unsigned rows times signed weights: one scale and zero point of the rows, a scale for each output."""
    one, other, scale, scales, zero = (call.given(index) for index in range(5))
    call.require(len(call.args) == 5, "zero points of weights, or a bias")
    dtypes = [each.dtype for each in (one, other, scale, scales, zero)]
    call.require(dtypes == ["uint8", "int8", "float32", "float32", "uint8"], f"types {dtypes}")
    fits = len(one.shape) == len(other.shape) == 2 and one.shape[1] == other.shape[0] > 0
    call.require(fits, f"shapes {one.shape} and {other.shape}")
    call.require(scale.shape == zero.shape == () and scales.shape == other.shape[1:], f"scales {scales.shape}")
    return [Known("float32", (one.shape[0], other.shape[1]))]


def _sizes_of_letters(call: Call) -> Tuple[List[str], Dict[str, int]]:
    """Return the terms of an Einsum, the result's last, and the size of each letter. An ellipsis is refused."""
    equation = call.attribute("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms, sizes = left.split(","), {}
    call.require(bool(arrow) and (left + right).replace(",", "").isalpha() and len(terms) == len(call.args), equation)
    for index, term in enumerate(terms):
        shape = call.given(index).shape
        call.require(len(term) == len(shape), f"{shape} as {term!r}")
        for letter, size in zip(term, shape):
            call.require(sizes.setdefault(letter, size) == size, f"{shape} as {term!r}")
    call.require(set(right) <= set(sizes) and len(set(right)) == len(right), equation)
    return [*terms, right], sizes


def _einsum(call: Call) -> List[Known]:
    terms, sizes = _sizes_of_letters(call)
    dtype, made = call.given(0).dtype, tuple(sizes[letter] for letter in terms[-1])
    return [Known(dtype, made), *(Known(dtype, tuple(sizes.values())) for _ in terms[3:])]  # products of pairs


def _einsum_work(call: Call, results: Sequence[Known]) -> int:
    return product(list(_sizes_of_letters(call)[1].values())) * max(len(call.args) - 1, 1)


# Rules: windows over places [N, C, ...].


class _Window(NamedTuple):
    kernel: Shape
    strides: Shape
    dilations: Shape
    before: Shape
    after: Shape


def _window(call: Call, places: Shape, kernel: Shape) -> _Window:
    """Return the window of a convolution or pooling over `places`, checked: ONNX Runtime divides by strides."""
    rank = len(places)
    kernel = call.attribute("kernel_shape", kernel)
    strides = call.attribute("strides", (1,) * rank)
    dilations = call.attribute("dilations", (1,) * rank)
    pads = call.attribute("pads", (0,) * 2 * rank)
    call.require(1 <= rank <= 3 and len(kernel) == len(strides) == len(dilations) == rank, f"windows {kernel}")
    call.require(len(pads) == 2 * rank and min(pads) >= 0, f"pads {pads}")
    call.require(min(*kernel, *strides, *dilations) > 0, f"windows {kernel} by {strides}, {dilations} apart")
    mode = call.attribute("auto_pad", "NOTSET")
    call.require(mode == "NOTSET" or (mode == "VALID" and not any(pads)), f"auto_pad {mode} of {pads}")
    return _Window(kernel, strides, dilations, pads[:rank], pads[rank:])


def _windows(call: Call, places: Shape, window: _Window, *, rounds_up: int = 0) -> Shape:
    """Return how many windows fit along each axis."""
    found = []
    for size, kernel, stride, dilation, before, after in zip(places, *window):
        padded, extent = size + before + after, (kernel - 1) * dilation + 1
        call.require(extent <= padded and (not rounds_up or size > 0), f"windows of {extent} in {padded} places")
        number = (padded - extent) // stride + 1
        if rounds_up and (padded - extent) % stride and number * stride < size + before:
            number += 1  # a last window that is cut, if it begins inside
        found.append(number)
    return tuple(found)


def _conv(call: Call) -> List[Known]:
    first, weight, bias, group = call.given(0), call.given(1), call.optional(2), call.attribute("group", 1)
    call.require(len(first.shape) == len(weight.shape) > 2 and group > 0, f"weights {weight.shape} of {first.shape}")
    (num_rows, channels, *places), (made, taken, *kernel) = first.shape, weight.shape
    window = _window(call, tuple(places), tuple(kernel))
    call.require(list(window.kernel) == kernel, f"kernels {kernel}")
    call.require(channels == taken * group and made % group == 0, f"weights {weight.shape} of {first.shape}")
    call.require(bias is None or bias.shape == (made,), "a bias of another size")
    return [Known(first.dtype, (num_rows, made, *_windows(call, tuple(places), window)))]


def _conv_work(call: Call, results: Sequence[Known]) -> int:
    return results[0].num_elements * product(call.given(1).shape[1:])


def _conv_transpose(call: Call) -> List[Known]:
    first, weight, bias, group = call.given(0), call.given(1), call.optional(2), call.attribute("group", 1)
    call.require(len(first.shape) == len(weight.shape) > 2 and group > 0, f"weights {weight.shape} of {first.shape}")
    (num_rows, channels, *places), (taken, made, *kernel) = first.shape, weight.shape
    window, rank = _window(call, tuple(places), tuple(kernel)), len(places)
    more = call.attribute("output_padding", (0,) * rank)
    call.require(list(window.kernel) == kernel and len(more) == rank and min(more) >= 0, f"kernels {kernel}")
    call.require(channels == taken and channels % group == 0, f"weights {weight.shape} of {first.shape}")
    call.require(bias is None or bias.shape == (made * group,), "a bias of another size")
    sizes = []
    for size, extent, stride, dilation, before, after, extra in zip(places, *window, more):
        call.require(size > 0 and extra < max(stride, dilation), f"output_padding {more}")
        sizes.append((size - 1) * stride + (extent - 1) * dilation + 1 - before - after + extra)
    call.require(min(sizes) > 0, f"pads {window.before}")
    columns = Known(first.dtype, (made, *kernel, *places))
    return [Known(first.dtype, (num_rows, made * group, *sizes)), columns]


def _conv_transpose_work(call: Call, results: Sequence[Known]) -> int:
    return call.given(0).num_elements * product(call.given(1).shape[1:])


def _pool(call: Call) -> List[Known]:
    first = call.given(0)
    call.require(len(first.shape) > 2 and not call.flag("storage_order"), f"{first.shape}")
    window = _window(call, first.shape[2:], call.attribute("kernel_shape", ()))
    call.require(all(pad < size for pad, size in zip((*window.before, *window.after), window.kernel * 2)), "such pads")
    shape = _windows(call, first.shape[2:], window, rounds_up=call.flag("ceil_mode"))
    shape = (*first.shape[:2], *shape)
    return [Known(first.dtype, shape), Known("int64", shape)][: max(len(call.node.outputs), 1)]


def _pool_work(call: Call, results: Sequence[Known]) -> int:
    return 8 * results[0].num_elements * product(call.attribute("kernel_shape", ()))


def _global_pool(call: Call) -> List[Known]:
    first = call.given(0)
    call.require(len(first.shape) > 2 and first.num_elements > 0, f"{first.shape}")
    return [Known(first.dtype, (*first.shape[:2], *(1 for _ in first.shape[2:])))]


def _resize(call: Call) -> List[Known]:
    first, scales, sizes = call.given(0), call.optional(2), call.optional(3)
    rank = len(first.shape)
    axes = call.axes_of(call.attribute("axes", tuple(range(rank))), rank)
    call.require(call.attribute("keep_aspect_ratio_policy", "stretch") == "stretch", "this keep_aspect_ratio_policy")
    call.require(call.attribute("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize", "a crop")
    call.require(first.num_elements > 0, f"{first.shape}")
    found = list(first.shape)
    if sizes is not None and sizes.shape != (0,):
        new = call.integers(3, "the sizes")
    else:
        if scales is None or scales.numbers is None:
            raise WrongError("Resize: the scales depend on the values of inputs")
        factors = scales.numbers.reshape(-1).astype(np.float32)
        call.require(
            len(factors) == len(axes) and bool((factors > 0).all() and (factors < 1 << 20).all()), "such scales"
        )
        new = tuple(int(np.floor(np.float32(first.shape[axis]) * each)) for axis, each in zip(axes, factors))
    call.require(len(new) == len(axes) and min(new, default=1) > 0, f"sizes {new}")
    for axis, size in zip(axes, new):
        found[axis] = size
    return [Known(first.dtype, tuple(found))]


def _many_steps(call: Call, results: Sequence[Known]) -> int:
    """Interpolating and sorting take many steps for an element."""
    return 64 * (results[0].num_elements + call.given(0).num_elements)


def _depth_to_space(call: Call) -> List[Known]:
    first, block = call.given(0), call.attribute("blocksize", 0)
    call.require(len(first.shape) == 4 and block > 0 and first.shape[1] % (block * block) == 0, f"{first.shape}")
    rows, channels, height, width = first.shape
    return [Known(first.dtype, (rows, channels // (block * block), height * block, width * block))]


def _space_to_depth(call: Call) -> List[Known]:
    first, block = call.given(0), call.attribute("blocksize", 0)
    call.require(len(first.shape) == 4 and block > 0, f"{first.shape}")
    rows, channels, height, width = first.shape
    call.require(height % block == 0 and width % block == 0, f"{first.shape}")
    return [Known(first.dtype, (rows, channels * block * block, height // block, width // block))]


def _grid_sample(call: Call) -> List[Known]:
    first, grid = call.given(0), call.given(1)
    call.require(
        len(first.shape) == len(grid.shape) == 4 and grid.shape[-1] == 2 and first.num_elements > 0, f"{first.shape}"
    )
    call.require(first.shape[0] == grid.shape[0], f"{grid.shape}")
    return [Known(first.dtype, (*first.shape[:2], *grid.shape[1:3]))]


# Numbers that are known before a run: sizes, and what is computed from them.


def _by(function: Callable[..., Any]) -> Numbers:
    """Return the numbers of an operation that a function of NumPy computes."""
    return lambda call, shape, arrays: function(*arrays)


def _over(function: Callable[..., Any]) -> Numbers:
    """Return the numbers of a reduction."""

    def reduce(call: Call, shape: Shape, arrays: Sequence[np.ndarray]) -> Any:
        axes = _axes(call) or (() if call.flag("noop_with_empty_axes") else tuple(range(arrays[0].ndim)))
        return function(arrays[0], axis=axes).reshape(shape)

    return reduce


def _quotient(one: np.ndarray, other: np.ndarray) -> Any:
    return (one - np.fmod(one, other)) // other if one.dtype.kind in "iu" else one / other


def _remainder(call: Call, shape: Shape, arrays: Sequence[np.ndarray]) -> Any:
    return (np.fmod if call.attribute("fmod", 0) else np.mod)(*arrays)


def _taken(call: Call, shape: Shape, arrays: Sequence[np.ndarray]) -> Any:
    return np.take(*arrays[:2], axis=call.axis(arrays[0].ndim))


def _cut(call: Call, shape: Shape, arrays: Sequence[np.ndarray]) -> Any:
    return arrays[0][np.ix_(*_slices(call))]


def _joined(call: Call, shape: Shape, arrays: Sequence[np.ndarray]) -> Any:
    return np.concatenate(arrays, call.axis(arrays[0].ndim))


def _in_parts(call: Call, shape: Shape, arrays: Sequence[np.ndarray]) -> Any:
    axis, sizes = _parts(call)
    return np.split(arrays[0], np.cumsum(sizes)[:-1], axis)


def _full(call: Call, shape: Shape, arrays: Sequence[np.ndarray]) -> Any:
    return np.full(shape, call.node.attributes.get("value", np.zeros(1, np.float32)).reshape(()))


def _steps(call: Call, shape: Shape, arrays: Sequence[np.ndarray]) -> Any:
    return arrays[0] + arrays[2] * np.arange(shape[0], dtype=arrays[0].dtype)


def _of_shape(function: Callable[..., Any]) -> Numbers:
    """Return the numbers of an operation that gives its first input another shape."""
    return lambda call, shape, arrays: function(arrays[0], shape)


def _permuted(call: Call, shape: Shape, arrays: Sequence[np.ndarray]) -> Any:
    return arrays[0].transpose(_permutation(call))


_BOOL = partial(_together, dtype="bool")
_SAME = _of_shape(np.reshape)

_FUNCTIONS = (
    "Cos", "Erf", "Exp", "HardSwish", "Log", "Mish", "Not", "Reciprocal", "Relu", "Sigmoid", "Sin", "Softplus",
    "Softsign", "Tanh",
)  # fmt: skip
"""Elementwise functions without attributes, whose numbers no size depends on."""
OPERATORS: Mapping[str, Operator] = {
    # elementwise
    **dict.fromkeys(_FUNCTIONS, Operator(_together)),
    "Abs": Operator(_together, "", _by(np.abs)),
    "Neg": Operator(_together, "", _by(np.negative)),
    "Ceil": Operator(_together, "", _by(np.ceil)),
    "Floor": Operator(_together, "", _by(np.floor)),
    "Round": Operator(_together, "", _by(np.rint)),
    "Sign": Operator(_together, "", _by(np.sign)),
    "Sqrt": Operator(_together),
    "Identity": Operator(_together, "", _by(np.array)),
    "Elu": Operator(_together, "alpha"),
    "LeakyRelu": Operator(_together, "alpha"),
    "HardSigmoid": Operator(_together, "alpha beta"),
    "Selu": Operator(_together, "alpha gamma"),
    "com.microsoft.Gelu": Operator(_together),
    "com.microsoft.QuickGelu": Operator(_together, "alpha"),
    "Clip": Operator(_clip),
    "Add": Operator(_together, "", _by(np.add)),
    "Sub": Operator(_together, "", _by(np.subtract)),
    "Mul": Operator(_together, "", _by(np.multiply)),
    "Pow": Operator(_together, "", _by(np.power)),
    "Min": Operator(_together, "", lambda call, shape, arrays: np.minimum.reduce(np.broadcast_arrays(*arrays))),
    "Max": Operator(_together, "", lambda call, shape, arrays: np.maximum.reduce(np.broadcast_arrays(*arrays))),
    "PRelu": Operator(_together),
    "Sum": Operator(_together),
    "Mean": Operator(_together),
    "Div": Operator(_divided, "", _by(_quotient)),
    "Mod": Operator(_divided, "fmod", _remainder),
    "Equal": Operator(_BOOL, "", _by(np.equal)),
    "Greater": Operator(_BOOL, "", _by(np.greater)),
    "GreaterOrEqual": Operator(_BOOL, "", _by(np.greater_equal)),
    "Less": Operator(_BOOL, "", _by(np.less)),
    "LessOrEqual": Operator(_BOOL, "", _by(np.less_equal)),
    "And": Operator(_BOOL, "", _by(np.logical_and)),
    "Or": Operator(_BOOL, "", _by(np.logical_or)),
    "Xor": Operator(_BOOL, "", _by(np.logical_xor)),
    "IsNaN": Operator(_BOOL),
    "IsInf": Operator(_BOOL, "detect_negative detect_positive"),
    "Where": Operator(partial(_together, like=1), "", _by(np.where)),
    "Cast": Operator(_cast, "to", _by(np.array)),
    "CastLike": Operator(lambda call: [Known(call.given(1).dtype, call.given(0).shape)]),
    "CumSum": Operator(_like_first, "exclusive reverse"),
    "Trilu": Operator(_like_first, "upper"),
    "Softmax": Operator(_like_first, "axis"),
    "LogSoftmax": Operator(_like_first, "axis"),
    "LayerNormalization": Operator(_layer_norm, "axis epsilon stash_type"),
    "BatchNormalization": Operator(_channel_norm, "epsilon momentum training_mode"),
    "InstanceNormalization": Operator(_channel_norm, "epsilon"),
    # sizes and constants
    "Shape": Operator(_shape, "start end"),
    "Size": Operator(_size),
    "Constant": Operator(_constant, "value value_float value_floats value_int value_ints"),
    "ConstantOfShape": Operator(_filled, "value", _full),
    "Range": Operator(_range, "", _steps),
    # other shapes of the same elements
    "Reshape": Operator(_reshape, "allowzero", _SAME),
    "Flatten": Operator(_flatten, "axis", _SAME),
    "Squeeze": Operator(_squeeze, "axes", _SAME),
    "Unsqueeze": Operator(_unsqueeze, "axes", _SAME),
    "Transpose": Operator(_transpose, "perm", _permuted),
    "DepthToSpace": Operator(_depth_to_space, "blocksize mode"),
    "SpaceToDepth": Operator(_space_to_depth, "blocksize"),
    # repeated, joined and cut
    "Expand": Operator(_expand, "", _of_shape(np.broadcast_to)),
    "Tile": Operator(_tile),
    "Concat": Operator(_concat, "axis", _joined),
    "Split": Operator(_split, "axis num_outputs", _in_parts),
    "Slice": Operator(_slice, "", _cut),
    "Pad": Operator(_pad, "mode"),
    # by indices
    "Gather": Operator(_gather, "axis", _taken),
    "GatherElements": Operator(_gather_elements, "axis"),
    "GatherND": Operator(_gather_nd, "batch_dims"),
    "ScatterElements": Operator(_scatter_elements, "axis reduction"),
    "ScatterND": Operator(_scatter_nd, "reduction"),
    "OneHot": Operator(_one_hot, "axis"),
    # along axes
    "ReduceSum": Operator(_reduce, "axes keepdims noop_with_empty_axes", _over(np.sum)),
    "ReduceProd": Operator(_reduce, "axes keepdims noop_with_empty_axes", _over(np.prod)),
    "ReduceMax": Operator(_reduce, "axes keepdims noop_with_empty_axes", _over(np.max)),
    "ReduceMin": Operator(_reduce, "axes keepdims noop_with_empty_axes", _over(np.min)),
    **dict.fromkeys(
        ["ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"],
        Operator(_reduce, "axes keepdims noop_with_empty_axes"),
    ),
    "ArgMax": Operator(_arg, "axis keepdims select_last_index"),
    "ArgMin": Operator(_arg, "axis keepdims select_last_index"),
    "TopK": Operator(_top_k, "axis largest sorted", None, _many_steps),
    # products
    "MatMul": Operator(_matmul, "", None, _matmul_work),
    "Gemm": Operator(_gemm, "alpha beta transA transB", None, _gemm_work),
    "QuantizeLinear": Operator(_quantised, "axis"),
    "com.microsoft.MatMulIntegerToFloat": Operator(_integer_product, "", None, _matmul_work),
    "Einsum": Operator(_einsum, "equation", None, _einsum_work),
    # over places
    "Conv": Operator(_conv, "auto_pad dilations group kernel_shape pads strides", None, _conv_work),
    "ConvTranspose": Operator(
        _conv_transpose, "auto_pad dilations group kernel_shape output_padding pads strides", None, _conv_transpose_work
    ),
    "AveragePool": Operator(
        _pool, "auto_pad ceil_mode count_include_pad dilations kernel_shape pads strides", None, _pool_work
    ),
    "MaxPool": Operator(
        _pool, "auto_pad ceil_mode dilations kernel_shape pads storage_order strides", None, _pool_work
    ),
    "GlobalAveragePool": Operator(_global_pool),
    "GlobalMaxPool": Operator(_global_pool),
    "Resize": Operator(
        _resize,
        "antialias axes coordinate_transformation_mode cubic_coeff_a exclude_outside extrapolation_value"
        " keep_aspect_ratio_policy mode nearest_mode",
        None,
        _many_steps,
    ),
    "GridSample": Operator(_grid_sample, "align_corners mode padding_mode", None, _many_steps),
}
"""The operators, each read one by one. All others are refused."""
