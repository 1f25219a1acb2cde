"""Limits of what captured graphs take, checked before each operation runs: bytes of values, and work.

The first run of a graph for a signature of its inputs checks every operation by its bound (`torch_operations`), before
PyTorch allocates anything for it. Later runs with the same signature take the same, and run without checks, unless
sizes depend on data. PyTorch cannot be interrupted, so the work of a pass is bounded as well: in multiply-adds, counted
from shapes.

What a graph may take follows from its inputs and weights, and from the plan, never from a number in it.
"""

import math
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.backends.torch_graphs import CapturedGraph, Node, filled, storage_of
from offramp.backends.torch_operations import cost_of, depends_on_data, num_pieces, tensors_in
from offramp.errors import said
from offramp.units import format_size

LEAST_BYTES = 32 << 20
"""Bytes that the values of any graph may take."""
BYTES_FACTOR = 128
"""Bytes of values that a graph may take for each byte of its inputs and weights. Models take up to 56."""
PLAN_FACTOR = 32
"""Bytes of values that a graph may take for each byte of values in the plan. Models take up to 16: bounds are for
the largest dtype, and count buffers that torch rarely needs."""
WARM_UP_BYTES, WARM_UP_PLACES = 1 << 20, 1 << 10
"""Bytes of values that a graph reads, and places of inputs, that count in a warm-up pass: the store claims them."""
LEAST_WORK = 1 << 36
"""Multiply-adds that any pass may take: some seconds of one core."""
WORK_FACTOR = 8
"""Multiply-adds that a pass may take for each weight and each place of its inputs. Models take 1 to 2."""
CALL_WORK = 1 << 17
"""Multiply-adds in the time of one call of an operation."""
_MOST_AXES = 16
_LARGEST_ITEM_BYTES = 8
"""Bytes of an element of what is made from a tensor without elements."""
_MOST_PIECES = 1 << 10
"""Most tensors that one operation may return."""
_MOST_SIGNATURES = 256
"""Signatures of inputs that are remembered for each graph."""
_NUMBER_BITS = 63

Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of a tensor."""


class TooLargeError(Exception):
    """A graph takes more memory or work than its inputs and weights account for."""


class ClaimError(Exception):
    """A graph takes more than it may for inputs that are not there yet, and whose size the store claims."""


class Allowance:
    """The rest of the limits of one pass: multiply-adds, bytes of values between its steps, bytes of values in a step.

    Args:
        num_places: rows x tokens, or numbers of the largest input.
        input_bytes: bytes of the inputs.
        weights: number of weights of the program, and their bytes.
        planned_bytes: bytes of values in the plan.
        is_warm_up: the inputs are not there yet.
    """

    def __init__(
        self, num_places: int, input_bytes: int, weights: tuple[int, int], planned_bytes: float, *, is_warm_up: bool
    ) -> None:
        self._is_warm_up, self._planned_bytes = is_warm_up, PLAN_FACTOR * planned_bytes
        if is_warm_up:
            num_places, input_bytes = min(num_places, WARM_UP_PLACES), min(input_bytes, WARM_UP_BYTES)
        self._work = max(LEAST_WORK, WORK_FACTOR * num_places * weights[0])
        self._made_bytes = max(LEAST_BYTES, BYTES_FACTOR * (input_bytes + weights[1]))
        self.most_bytes = 0.0
        """Most bytes that a graph of this pass has taken beside what it reads; infinite if they depend on data."""

    def limit_of(self, read_bytes: int, weight_bytes: int) -> tuple[float, bool]:
        """Return the bytes of values that a graph may take, and whether it may take more once the inputs are there."""
        counted = min(read_bytes, WARM_UP_BYTES) if self._is_warm_up else read_bytes
        limit = min(BYTES_FACTOR * (counted + weight_bytes), self._planned_bytes)
        return max(LEAST_BYTES, limit), counted < read_bytes

    def spend(self, work: int, made_bytes: int = 0) -> None:
        """Subtract work, and bytes of values that a graph returns. Raises TooLargeError where less is left."""
        self._work -= work
        self._made_bytes -= made_bytes
        if self._work < 0:
            raise TooLargeError("more time than a pass with these inputs and weights may take")
        if self._made_bytes < 0:
            raise TooLargeError("more memory than a pass with these inputs and weights may take")

    def note(self, num_bytes: float) -> None:
        """Note the bytes that a graph takes."""
        self.most_bytes = max(self.most_bytes, num_bytes)


class Known(NamedTuple):
    """Facts about a graph that its first run for a signature has shown."""

    work: int
    made_bytes: int
    """Bytes of its results."""
    borrowed: frozenset[int]
    """Indices of results that share memory with weights."""
    most_bytes: float
    """Most bytes that it takes at once beside what it reads; infinite if they depend on data."""


class BoundedGraph:
    """A captured graph that runs within limits.

    Args:
        calls: the weights and constants of each of its calls.
    """

    def __init__(self, graph: CapturedGraph, calls: Sequence[Sequence[Spec]]) -> None:
        self.inputs, self._graph = graph.inputs, graph
        self._num_reads = sum(name[0] == "r" for name in graph.inputs)
        self._num_keyed = self._num_reads if all(each == calls[0] for each in calls) else len(graph.inputs)
        self._weight_bytes = min((sum(map(num_bytes, weights)) for weights in calls), default=0)
        self._known: dict[tuple[Spec, ...], Known] = {}

    def __call__(self, given: Sequence[Tensor], allowance: Allowance) -> Sequence[Tensor]:
        """Run the graph. Results that share the memory of a weight are copied: other weights are read there later.

        Raises TooLargeError, ClaimError, and what operations raise for inputs that they do not take.
        """
        signature = tuple([spec_of(each) for each in given[: self._num_keyed]])
        known = self._known.get(signature)
        if known is None:
            results, known = self._checked(given, signature, allowance)
        else:
            allowance.spend(known.work, known.made_bytes)
            results = self._graph(*given)
        allowance.note(known.most_bytes)
        if not known.borrowed:
            return results
        return [each.clone() if i in known.borrowed else each for i, each in enumerate(results)]

    def _checked(
        self, given: Sequence[Tensor], signature: tuple[Spec, ...], allowance: Allowance
    ) -> tuple[list[Tensor], Known]:
        """Run the graph with all checks, and remember what it takes unless that depends on data."""
        limit_bytes, is_claim = allowance.limit_of(
            sum(map(num_bytes, signature[: self._num_reads])), self._weight_bytes
        )
        meter = _Meter(given, limit_bytes, allowance)
        try:
            for each in given:
                if not each.numel():
                    meter.require_extent(each)
            results = self._run(given, meter)
        except TooLargeError as error:
            raise (ClaimError() if is_claim else error) from None
        made_bytes = sum(num_bytes(spec_of(each)) for each in results)
        allowance.spend(0, made_bytes)
        held = set(map(storage_of, given[self._num_reads :]))
        borrowed = frozenset(i for i, each in enumerate(results) if storage_of(each) in held)
        most_bytes = math.inf if meter.depends_on_data else meter.most_bytes + (made_bytes if borrowed else 0)
        known = Known(meter.work, made_bytes, borrowed, most_bytes)
        if not meter.depends_on_data:
            if len(self._known) >= _MOST_SIGNATURES:
                self._known.clear()
            self._known[signature] = known
        return results, known

    def _run(self, given: Sequence[Tensor], meter: "_Meter") -> list[Tensor]:
        values = self._graph.start(given)
        meter.add_copies(values.values())
        for index, node in enumerate(self._graph.nodes):
            values[node.name] = meter.call(node, filled(node.args, values), filled(node.kwargs, values))
            for ended in self._graph.last.get(index, ()):
                del values[ended]
        results = [values[name] for name in self._graph.outputs]
        if not all(isinstance(each, Tensor) for each in results):
            raise TypeError("a result is no tensor")
        return results


class _Meter:
    """Runs the operations of one graph, each within what is left of the limits."""

    def __init__(self, given: Sequence[Tensor], limit_bytes: float, allowance: Allowance) -> None:
        self._given, self._holders = set(map(storage_of, given)), Counter[int]()
        self._limit_bytes, self._allowance = limit_bytes, allowance
        self._live_bytes = self.work = self.most_bytes = 0
        self.depends_on_data = False

    def call(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operation. Raises TooLargeError before it runs, where its bound is above the limit."""
        self._spend(CALL_WORK)
        if node.schema is None:
            return _number(node, args)
        bound = {**dict(zip([each.name for each in node.schema.arguments], args, strict=False)), **kwargs}
        try:
            cost, pieces = cost_of(node.target, bound), num_pieces(node.target, bound)
            self.depends_on_data |= depends_on_data(node.target, bound)
        except Exception as error:  # arguments of any type may come
            raise ValueError(f"{node.target} does not take such arguments ({said(error)})") from error
        if pieces > _MOST_PIECES:
            raise TooLargeError(f"more than {_MOST_PIECES} results of {node.target}")
        self._require(self._live_bytes + cost.made_bytes + cost.extra_bytes)
        self._spend(cost.work)
        found = node.function(*args, **kwargs)
        for tensor in tensors_in(found):
            self._add(tensor)
        self._require(self._live_bytes)
        self.most_bytes = max(self.most_bytes, self._live_bytes + cost.extra_bytes)
        return found

    def add_copies(self, values: Iterable[Tensor]) -> None:
        """Count those values before the first operation that are no inputs: copies, which operations write to."""
        for tensor in values:
            if storage_of(tensor) not in self._given:
                self._add(tensor)
        self._require(self._live_bytes)

    def _spend(self, work: int) -> None:
        self.work += work
        self._allowance.spend(work)

    def _require(self, size: int) -> None:
        if size > self._limit_bytes:
            raise TooLargeError(f"values of {format_size(size)}, and may take {format_size(self._limit_bytes)}")

    def _add(self, tensor: Tensor) -> None:
        """Count a result until it is freed."""
        if tensor.dim() > _MOST_AXES:
            raise TooLargeError(f"values of {tensor.dim()} axes, and may take {_MOST_AXES}")
        self.require_extent(tensor)  # a view may have more elements than its memory
        storage, size = storage_of(tensor), tensor.untyped_storage().nbytes()
        if storage not in self._given:
            self._live_bytes += 0 if self._holders[storage] else size
            self._holders[storage] += 1
            weakref.finalize(tensor, self._drop, storage, size)

    def require_extent(self, tensor: Tensor) -> None:
        """Raise TooLargeError for a tensor that is too large, or of which a sum along an axis of size 0 may be."""
        if tensor.numel():
            self._require(num_bytes(spec_of(tensor)))
        else:
            self._require(_LARGEST_ITEM_BYTES * math.prod(size for size in tensor.shape if size))

    def _drop(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        self._live_bytes -= 0 if self._holders[storage] else size


def _number(node: Node, args: list[Any]) -> Any:
    """Run an operation on numbers, or take a value from a list. Raises ValueError for others."""
    operands = args[0] if node.target == "sum" and args else args
    if node.target == "getitem":
        if not (len(args) == 2 and isinstance(args[0], (list, tuple)) and type(args[1]) is int):
            raise ValueError("getitem takes a value from several by its number")
        return args[0][args[1]]
    if not isinstance(operands, list) or not all(isinstance(each, (int, float)) for each in operands):
        raise ValueError(f"{node.target} takes numbers")
    if node.target == "pow" and len(args) == 2 and all(isinstance(each, int) for each in args):
        _require_small(args[1] * (args[0].bit_length() - 1))
    found = node.function(*args)
    if not isinstance(found, (int, float)):
        raise ValueError(f"{node.target} gives no number")
    _require_small(found.bit_length() if isinstance(found, int) else 0)
    return found


def _require_small(num_bits: int) -> None:
    if num_bits > _NUMBER_BITS:
        raise ValueError("a number that does not fit 64 bits")


def spec_of(tensor: Tensor) -> Spec:
    """Return shape, strides and dtype of a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype


def num_bytes(spec: Spec) -> int:
    """Return the bytes of a copy of a tensor."""
    return math.prod(spec[0]) * spec[2].itemsize
