"""Checks of the ONNX graphs of captured programs: their operators when they are loaded, their sizes before they run.

A graph comes from a store, and a store from anywhere. Its file is small, but what it computes need not be: 486 bytes
can say a terabyte, and an operation cannot be interrupted. So the shapes of all values of a kernel are computed first,
once for each shape of its inputs, and are compared with what its model took when it was divided.
"""

from __future__ import annotations

from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from offramp.backends.onnx_operators import MOST_EXACT, MOST_KNOWN, OPERATORS, Call, Known, known, product
from offramp.backends.onnx_reader import MAX_RANK, Declared, Graph, Model, Node, read_model
from offramp.program.checks import WrongError
from offramp.units import format_size

MOST_NODES = 4096
"""Most operations of a kernel, with those of inner graphs."""
MOST_ELEMENTS = 1 << 40
"""Most elements of a value whose size is compared with others."""
MOST_PLACES = 1 << 26
"""Largest product of the sizes of a value without elements, those of 0 left out."""
MOST_STORE_NODES = 4 * MOST_NODES
"""Most operations of all kernels of a store: ONNX Runtime takes up to 0.4 ms to load one."""
OPSETS: Mapping[str, Tuple[int, int]] = {"": (13, 18), "com.microsoft": (1, 1)}
"""Domain of operators -> the first and last version whose meaning the table knows. `offramp divide` writes 18."""
MOST_INNER_BYTES = 32 << 20
"""Bytes of the values of a kernel that are always allowed: small models take more than their example says."""
INNER_FACTOR = 32
"""Most bytes of all values of a kernel, of those that lived at once in the example of its model. Values of a kernel
are summed, whether they live at once or not: their order of execution is the library's."""
WEIGHT_FACTOR = 4
"""Most bytes of the values of a kernel, of its weights and constants: they may be transposed and converted."""
MOST_FREE_WORK = 1 << 29
"""Multiply-adds of a pass that are always allowed: 10 to 500 ms on one core, by the operation."""
WORK_FACTOR = 8
"""Most multiply-adds of a kernel, of those of a product of its weights and values with each place of its input."""
INEXACT_ON_FLOATS = frozenset(("Pow", "Mod", "Range", "ReduceSum", "ReduceProd"))
"""Operators whose results for floats depend on who computes them."""
MAY_OVERFLOW = frozenset(("Abs", "Add", "Mul", "Neg", "Pow", "Range", "ReduceProd", "ReduceSum", "Sub"))
"""Operators whose results for integers may not fit their type: what then comes out depends on who computes them."""
ELEMENT_WORK = 16
"""Multiply-adds that take as long as reading, computing or writing an element."""


class UnlistedError(WrongError):
    """A kernel needs an operator, or a version of the operators, outside the table."""


class TooLargeError(WrongError):
    """A kernel takes more memory or time than its model did."""


class Sizes(NamedTuple):
    """Memory and work of a kernel for inputs of some shapes."""

    values: Mapping[str, Optional[Known]]
    """All values by name. None: made by an operator outside the table, which is trusted."""
    num_bytes: int
    """Bytes of the results of all operations, and of arrays that they need meanwhile."""
    made_bytes: int
    """Bytes of the results."""
    work: int
    """Multiply-adds."""


def checked_model(data: bytes, *, trusted: bool = False) -> Model:
    """Return the model of a kernel. Raises WrongError for one that is not allowed, naming the operator or the reason.

    Args:
        trusted: the operators need not be those of the table; their number and inner graphs are limited nevertheless.
    """
    model = read_model(data)
    nodes = list(operations(model.graph))
    if len(nodes) > MOST_NODES:
        raise WrongError(f"it has {len(nodes)} operations, more than {MOST_NODES}")
    if trusted:
        return model
    for domain, version in model.opsets.items():
        least, most = OPSETS.get(domain, (1, 0))
        if not least <= version <= most:
            raise UnlistedError(f"it needs version {version} of the operators {domain or 'ai.onnx'!r}")
    for node in nodes:
        lacks = _lacks(node)
        if lacks:
            raise UnlistedError(f"it needs {lacks}, which a store may not contain")
    return model


def operations(graph: Graph) -> Iterable[Node]:
    """Yield the operations of a graph and of graphs inside them."""
    for node in graph.nodes:
        yield node
        for inner in node.attributes.values():
            if isinstance(inner, Graph):
                yield from operations(inner)


def _lacks(node: Node) -> str:
    """Return the part of an operation that the table lacks, or ""."""
    row = OPERATORS.get(node.operator)
    if row is None:
        return f"the operator {node.operator}"
    unknown = sorted(set(node.attributes) - set(row.attributes.split()))
    return f"the attribute {unknown[0]!r} of {node.operator}" if unknown else ""


def sizes_of(model: Model, inputs: Mapping[str, Known]) -> Sizes:
    """Return the sizes of all values of a kernel for inputs of these dtypes and shapes.

    Raises WrongError where the inputs are not those of the graph, or an operation does not take them.
    """
    graph, work = model.graph, 0
    values: Dict[str, Optional[Known]] = {name: known(array) for name, array in graph.constants.items()}
    for name, declared in graph.inputs.items():
        if name not in inputs:
            raise WrongError(f"the graph has an input {name!r}")
        _require_declared(name, inputs[name], declared)
        _require_extent(inputs[name])
        values[name] = inputs[name]
    num_bytes = made_bytes = 0
    for node in graph.nodes:
        results, extra = _results(node, values)
        num_bytes += sum(result.num_bytes for result in results if result is not None)
        values.update(zip(node.outputs, results))
        work += extra
    for name, declared in graph.outputs.items():
        if name not in values:
            raise WrongError(f"the output {name!r} is not made")
        result = values[name]
        if result is not None:
            _require_declared(name, result, declared)
            made_bytes += result.num_bytes
    return Sizes(values, num_bytes, made_bytes, work)


def _require_declared(name: str, value: Known, declared: Declared) -> None:
    """Raise WrongError unless a value has the dtype and the fixed sizes that the graph declares."""
    dtype, dims = declared[0], value.shape if declared[1] is None else declared[1]
    same = len(value.shape) == len(dims) and all(
        size == dim for size, dim in zip(value.shape, dims) if isinstance(dim, int)
    )
    if value.dtype != dtype or not same:
        wanted = [dim if isinstance(dim, int) else "?" for dim in dims]
        raise WrongError(f"{name!r} is {value.dtype} {list(value.shape)}, and declared as {dtype} {wanted}")


def _results(node: Node, values: Mapping[str, Optional[Known]]) -> Tuple[List[Optional[Known]], int]:
    """Return what is known of the results of an operation, and its multiply-adds."""
    lost = [name for name in node.inputs if name and name not in values]
    if lost:
        raise WrongError(f"value {lost[0]!r} is used before it is made")
    args = [values[name] if name else None for name in node.inputs]
    unknown = any(arg is None for arg, name in zip(args, node.inputs) if name)
    if unknown or _lacks(node):  # trusted
        return [None] * len(node.outputs), 0
    row, call = OPERATORS[node.operator], Call(node, args)
    try:
        results = list(row.rule(call))
    except WrongError:
        raise
    except (ValueError, ArithmeticError, TypeError, LookupError) as error:  # inputs that no rule thought of
        raise WrongError(f"{node.operator} does not take its inputs ({type(error).__name__})") from None
    if len(node.outputs) > len(results):
        raise WrongError(f"{node.operator} has {len(results)} results, not {len(node.outputs)}")
    for result in results:
        _require_extent(result)
        if result.num_elements > MOST_ELEMENTS:
            raise TooLargeError(f"{node.operator} makes {result.num_elements:.1e} numbers")
        if len(result.shape) > MAX_RANK or min(result.shape, default=0) < 0:
            raise WrongError(f"{node.operator} makes {len(result.shape)} axes, or a negative size")
    elements = sum(each.num_elements for each in (*args, *results) if each is not None)
    work = ELEMENT_WORK * elements + (0 if row.work is None else row.work(call, results))
    return [*_with_numbers(row.numbers, call, results)], work


def _require_extent(value: Known) -> None:
    """Raise TooLargeError for a value without elements whose other axes an operation would take long to go through."""
    if not value.num_elements and product([size for size in value.shape if size]) > MOST_PLACES:
        raise TooLargeError(f"a value of the shape {list(value.shape)}")


def _with_numbers(numbers: Any, call: Call, results: List[Known]) -> List[Known]:
    """Return results with their numbers, where those of all inputs are known, and few."""
    given = [arg for arg in call.args if arg is not None]
    if numbers is None or results[0].num_elements > MOST_KNOWN or any(arg.numbers is None for arg in given):
        return results
    try:
        with np.errstate(all="ignore"):
            found = numbers(call, results[0].shape, [arg.numbers for arg in given])
            found = found if isinstance(found, list) else [found]
            made = [np.asarray(each).astype(result.dtype) for each, result in zip(found, results)]
    except (ValueError, ArithmeticError, TypeError, IndexError):  # the operation itself will fail
        return results
    if any(array.shape != result.shape for array, result in zip(made, results)):
        return results
    if not _is_exact(
        call.node.operator, [each.numbers for each in given if each.numbers is not None], made, numbers, call
    ):
        return results
    return [result._replace(numbers=array) for array, result in zip(made, results)]


def _is_exact(operator: str, given: Sequence[np.ndarray], made: Sequence[np.ndarray], numbers: Any, call: Call) -> bool:
    """Return whether ONNX Runtime must find the same numbers.

    One number that it finds otherwise decides, by a comparison, about any size: integers that overflow, sums in another
    order, what a minimum says of NaN.
    """
    arrays = (*given, *made)
    if any(each.dtype == np.float16 or not np.isfinite(each).all() for each in arrays):
        return False
    if operator in INEXACT_ON_FLOATS and given[0].dtype.kind == "f":
        return False
    if operator == "Cast" and made[0].dtype.kind in "iu":
        return np.array_equal(made[0].astype(np.float64), np.trunc(given[0].astype(np.float64)))
    if operator not in MAY_OVERFLOW or made[0].dtype.kind not in "iu":
        return True
    wide = [each.astype(np.float64) for each in given]
    with np.errstate(all="ignore"):
        found = np.asarray(numbers(call, made[0].shape, wide))
    return all(np.abs(each).max(initial=0) < MOST_EXACT for each in (*wide, found)) and np.array_equal(found, made[0])


class Taken(NamedTuple):
    """Part of its allowance that one call of a kernel takes, and what is left."""

    free_work: int
    """Multiply-adds for which the inputs do not account."""
    made_bytes: int
    """Bytes of the results."""
    spare_bytes: int
    """Bytes that other values of the program may take at the same time."""


class Allowance:
    """Limits of a kernel, in proportion to the example of its model and to its inputs.

    Values grow with the square of the inputs at most, as the scores of attention do.
    """

    def __init__(self, example: Mapping[str, int], activation_bytes: int) -> None:
        self.example, self.activation_bytes = example, activation_bytes
        """Bytes of each value that the kernel reads, and of all values that lived at once, in the example."""

    def taken(self, sizes: Sizes, inputs: Mapping[str, Known]) -> Taken:
        """Return what a kernel takes. Raises TooLargeError where its values take more than allowed."""
        read = {name: each for name, each in inputs.items() if name in self.example}
        weights = [each for name, each in inputs.items() if name not in self.example]
        growth = max((each.num_bytes / max(self.example[name], 1) for name, each in read.items()), default=1.0)
        allowed = MOST_INNER_BYTES + INNER_FACTOR * self.activation_bytes * max(growth, 1.0) ** 2
        allowed += WEIGHT_FACTOR * sum(each.num_bytes for each in weights)
        if sizes.num_bytes > allowed:
            made, most = format_size(sizes.num_bytes), format_size(allowed)
            raise TooLargeError(f"its values take {made}, more than {most}, which its inputs account for")
        places = max((_places(each.shape) for each in read.values()), default=1)
        elements = sum(each.num_elements for each in (*read.values(), *weights))
        free_work = max(sizes.work - WORK_FACTOR * elements * places, 0)
        return Taken(free_work, sizes.made_bytes, int(allowed) - sizes.num_bytes)


def require_allowed(data: bytes, inputs: Mapping[str, Known], read: Iterable[str], activation_bytes: int) -> None:
    """Raise WrongError with the reason where a store may not contain a graph.

    Args:
        inputs: the inputs of the kernel in the example of its model.
        read: those that are values; the others are weights and constants.
        activation_bytes: bytes of all values of the model that lived at once in the example.
    """
    allowance = Allowance({name: inputs[name].num_bytes for name in read}, activation_bytes)
    require_time(allowance.taken(sizes_of(checked_model(data), inputs), inputs).free_work)


def require_time(work: int) -> None:
    """Raise TooLargeError for more multiply-adds, for which inputs do not account, than a pass may have."""
    if work > MOST_FREE_WORK:
        raise TooLargeError(f"it needs {work:.1e} multiply-adds more than its inputs account for")


def _places(shape: Sequence[int]) -> int:
    """Return an upper bound on the places of an array: its tokens or pixels."""
    return product(shape) // max(min(shape[1:]), 1) if len(shape) > 2 else product(shape)
