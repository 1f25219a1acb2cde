"""Arguments of operations by which PyTorch reads or writes memory without checking them: they are checked here.

PyTorch checks the arguments of nearly all operations of the table in `torch_operations` before it reads memory by them.
These are the others. They were found by calls on memory that may not be written and ends before a page that may not be
read: `tests/backends/hostile.py`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Bound = Mapping[str, Any]
"""Arguments of a call by name."""
_MOST_SIZE = (1 << 31) - 1
"""Largest number in arguments of windows: PyTorch counts some of their places in 32 bits."""


def _statistics(bound: Bound) -> None:
    """Refuse normalisation that writes its running statistics: its schema does not say that it writes."""
    is_training = bound.get("training", bound.get("use_input_stats"))
    if is_training and (bound.get("running_mean") is not None or bound.get("running_var") is not None):
        raise ValueError("statistics that it writes to")


def _weight_norm(bound: Bound) -> None:
    """Require a length for each row of the axis, or one for all, of the same dtype."""
    weight, lengths, axis = bound["v"], bound["g"], bound.get("dim", 0)
    if axis == -1:
        is_right = lengths.numel() == 1
    else:
        is_right = lengths.shape == tuple(size if i == axis else 1 for i, size in enumerate(weight.shape))
        is_right = is_right and 0 <= axis < weight.dim()
    if not is_right or lengths.dtype != weight.dtype or not weight.numel():
        raise ValueError(f"lengths {list(lengths.shape)} of {list(weight.shape)}")


def _recurrent(bound: Bound) -> None:
    """Require weights and states of a recurrent network whose shapes belong together: oneDNN does not compare them."""
    operand, params = bound["input"], bound["params"]
    states = [bound["hx"]] if isinstance(bound["hx"], Tensor) else bound["hx"]
    count = bound["num_layers"] * (1 + bound["bidirectional"])
    passed, hidden = states[0].shape[-1], states[-1].shape[-1]
    each = 2 + 2 * bound["has_biases"] + (passed != hidden)
    if operand.dim() != 3 or count < 1 or len(params) != count * each:
        raise ValueError(f"{len(params)} weights of {bound['num_layers']} layers")
    rows = operand.shape[0 if bound["batch_first"] else 1]
    wanted = [*_recurrent_shapes(bound, passed, hidden), *((count, rows, size) for size in (passed, hidden))]
    given = [*params, states[0], states[-1]]
    if [tuple(part.shape) for part in given] != wanted:
        raise ValueError("weights or states of other shapes")
    if any(part.dtype != operand.dtype or not part.is_floating_point() for part in given):
        raise ValueError("weights or states of another dtype")


def _recurrent_shapes(bound: Bound, passed: int, hidden: int) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of the weights, in their order. `passed`: width of the state that the next step reads."""
    width, gates = bound["input"].shape[-1], 3 if isinstance(bound["hx"], Tensor) else 4
    directions = 1 + bound["bidirectional"]
    for _ in range(bound["num_layers"]):
        for _ in range(directions):
            yield from ((gates * hidden, width), (gates * hidden, passed))
            yield from [(gates * hidden,)] * (2 * bound["has_biases"])
            yield from [(passed, hidden)] * (passed != hidden)
        width = passed * directions


def _columns(bound: Bound) -> None:
    """Require as many columns as there are windows: PyTorch compares them in 32 bits, and visits all."""
    _windows(bound)
    parts = (bound[name] for name in ("output_size", "kernel_size", "dilation", "padding", "stride"))
    places = [
        (size + 2 * pad - apart * (side - 1) - 1) // step + 1
        for size, side, apart, pad, step in zip(*parts, strict=True)
        if min(size, side, apart, step) > 0 <= pad
    ]
    if len(places) != 2 or bound["self"].shape[-1] != math.prod(places):
        raise ValueError("another number of columns than of windows")


def _windows(bound: Bound) -> None:
    """Refuse numbers beyond 32 bits."""
    for part in bound.values():
        for each in part if isinstance(part, Sequence) else [part]:
            if isinstance(each, int) and abs(each) > _MOST_SIZE:
                raise ValueError(f"the number {each}")


_CHECKS: dict[str, Callable[[Bound], None]] = {
    "aten.batch_norm.default": _statistics,
    "aten.instance_norm.default": _statistics,
    "aten._weight_norm.default": _weight_norm,
    "aten.lstm.input": _recurrent,
    "aten.gru.input": _recurrent,
    "aten.col2im.default": _columns,
    "aten.im2col.default": _windows,
    "aten.pad.default": _windows,
    "aten.constant_pad_nd.default": _windows,
}
"""Operation -> function that raises ValueError, or what Python raises, for arguments that it must not have."""


def require_arguments(target: str, kind: str, bound: Bound) -> None:
    """Raise ValueError, or what Python raises, for arguments that an operation of a kind must not have."""
    check = _CHECKS.get(target, _windows if kind == "product" else None)
    if check is not None:
        check(bound)
