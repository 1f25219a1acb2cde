"""The operations of PyTorch that captured kernels may use, and an upper bound of what each call takes.

The table has the operations of the architectures that `docs/results/any-model.md` exports, and no others. Each entry
was read: it has no other effect than its result, its bound holds for all arguments, and PyTorch checks its arguments
before it reads memory by them, or `torch_arguments` does. `python -m tests.checks.operations` prints the table.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.backends.torch_arguments import Bound, require_arguments

KINDS = {
    "elementwise": "as many elements as the operands, broadcast",
    "reduction": "no more elements than the operand",
    "product": "a shape that follows from shapes; multiply-adds and unrolled operands of convolutions are counted",
    "choice": "elements of the operands; their number follows from shapes and numbers",
    "made": "a shape given by numbers, held against the limit before it is made",
    "view": "the memory of the operand; torch checks that it lies within",
    "in place": "a value that the kernel has made is changed; inputs and their views are refused",
    "random": "random numbers for the elements of the operand",
    "data": "as many elements as data say, and no more than shapes allow; checked at each call",
    "number": "a number that follows from a shape",
}
"""Class of operations -> what bounds the result."""

LIGHT, HEAVY = 32, 1024
"""Multiply-adds in the time that one element takes: of a simple operation, and of one that sorts or calls functions."""
_SPEED = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 4, torch.float16: 4}
_SLOW = 16
"""Multiply-adds of float32 in the time of one of a dtype that `_SPEED` lacks."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MASKS = (torch.bool, torch.uint8)
_DIRECT = 20480
"""Elements of an operand above which torch convolves floats without unrolling them."""
_ITEM_BYTES = 8
"""Bytes of an element of a result, unless an operand has larger ones."""


class Cost(NamedTuple):
    """Upper bounds of what one call takes."""

    made_bytes: int
    """Bytes of its results."""
    work: int = 0
    """Multiply-adds in the time that it takes."""
    extra_bytes: int = 0
    """Bytes of temporary memory."""


def tensors_in(part: Any) -> Iterator[Tensor]:
    """Yield the tensors of arguments or results."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, (list, tuple)):
        for each in part:
            yield from tensors_in(each)


def _broadcast(bound: Bound) -> int:
    return math.prod(torch.broadcast_shapes(*(each.shape for each in tensors_in(list(bound.values())))))


def _first(bound: Bound) -> int:
    return next(tensors_in(list(bound.values()))).numel()


def _twice(bound: Bound) -> int:
    return 2 * _first(bound)


def _transformed(bound: Bound) -> int:
    """Return twice the elements of a Fourier transform, which pads its axes to the sizes that it is given."""
    shape, sizes, axes = list(bound["self"].shape), bound.get("n", bound.get("s")), bound.get("dim")
    sizes = [] if sizes is None else sizes if isinstance(sizes, Sequence) else [sizes]
    axes = range(-len(sizes), 0) if axes is None else axes if isinstance(axes, Sequence) else [axes]
    for axis, size in zip(axes, sizes, strict=False):
        shape[axis] = max(shape[axis], size)
    return 2 * math.prod(shape)


def _all(bound: Bound) -> int:
    return sum(each.numel() for each in tensors_in(list(bound.values())))


def _divided(bound: Bound) -> int:
    """Return the elements of a division. The least of integers divided by -1 and truncated would end the process."""
    if bound.get("rounding_mode") == "trunc" and not any(
        each.is_floating_point() for each in tensors_in(list(bound.values()))
    ):
        raise ValueError("a division of integers that truncates")
    return _broadcast(bound)


def _none(bound: Bound) -> int:
    return 0


def _sized(bound: Bound) -> int:
    """Return the product of a size, or of the rows and columns of a diagonal; 1 for a number."""
    if "n" in bound:
        return bound["n"] * bound.get("m", bound["n"])
    return math.prod(bound.get("size", ()))


def _ranged(bound: Bound) -> int:
    if "steps" in bound:
        return bound["steps"]
    return max(math.ceil((bound["end"] - bound.get("start", 0)) / bound.get("step", 1)), 0)


def _one_hot(bound: Bound) -> int:
    """Return the elements of one row of classes for each label. Without a number of classes, data would decide it."""
    if bound.get("num_classes", -1) < 0:
        raise ValueError("the number of classes depends on data")
    return bound["self"].numel() * bound["num_classes"]


def _looked_up(bound: Bound) -> int:
    return bound["indices"].numel() * math.prod(bound["weight"].shape[1:])


def _indexed(bound: Bound) -> int:
    """Return the most elements that indices take: a mask takes no more places than it has."""
    operand, axis, rows, shapes = bound["self"], 0, 1, []
    for each in bound["indices"]:
        if each is None:
            rows *= operand.shape[axis]
        elif each.dtype in _MASKS:
            rows *= each.numel()
        else:
            shapes.append(each.shape)
        axis += each.dim() if each is not None and each.dtype in _MASKS else 1
    return rows * math.prod(torch.broadcast_shapes(*shapes)) * math.prod(operand.shape[axis:])


def _masked(bound: Bound) -> int:
    return math.prod(torch.broadcast_shapes(bound["self"].shape, bound["mask"].shape))


def _as_index(bound: Bound) -> int:
    return bound["index"].numel()


def _along(bound: Bound) -> int:
    """Return the elements of rows, along one axis, that an index takes."""
    sizes = list(bound["self"].shape) or [1]
    del sizes[bound["dim"]]
    return math.prod(sizes) * bound["index"].numel()


def _repeated(bound: Bound) -> int:
    repeats = bound.get("repeats", bound.get("dims"))
    return _first(bound) * (math.prod(repeats) if isinstance(repeats, Sequence) else repeats)


def _before(operand: Tensor, num_axes: int) -> int:
    """Return the product of the sizes before the last axes. Of axes of size 0, operations may make larger ones."""
    return math.prod(operand.shape[: max(operand.dim() - num_axes, 0)])


def _padded(bound: Bound) -> int:
    operand, pads = bound["self"], bound["pad"]
    around = [pads[i] + pads[i + 1] for i in range(0, len(pads) - 1, 2)]
    inner = operand.shape[operand.dim() - len(around) :]
    sizes = [max(size + more, 0) for size, more in zip(inner, reversed(around), strict=True)]
    return _before(operand, len(around)) * math.prod(sizes)


def _at(part: Any, index: int) -> int:
    """Return one number of an argument that has one for each axis, or one for all."""
    return part[min(index, len(part) - 1)] if isinstance(part, Sequence) else part


def _convolved(bound: Bound) -> int:
    """Return the elements of a convolution. `same` and `valid` keep no more places than there are."""
    operand, weight, padding = bound["input"], bound["weight"], bound.get("padding", 0)
    axes = operand.shape[operand.dim() - weight.dim() + 2 :]
    stride, padding = bound.get("stride", 1), 0 if isinstance(padding, str) else padding
    places = [(size + 2 * _at(padding, i)) // max(_at(stride, i), 1) + 1 for i, size in enumerate(axes)]
    return _images(operand, axes) * weight.shape[0] * math.prod(places)


def _convolved_back(bound: Bound) -> int:
    operand, weight = bound["input"], bound["weight"]
    axes, sides = operand.shape[operand.dim() - weight.dim() + 2 :], weight.shape[2:]
    stride, dilation, more = (
        bound.get(name, least) for name, least in (("stride", 1), ("dilation", 1), ("output_padding", 0))
    )
    places = [size * _at(stride, i) + _at(dilation, i) * sides[i] + _at(more, i) for i, size in enumerate(axes)]
    return _images(operand, axes) * weight.shape[1] * bound.get("groups", 1) * math.prod(places)


def _images(operand: Tensor, axes: Sequence[int]) -> int:
    """Return the number of feature maps with channels among the axes before the last."""
    return _before(operand, len(axes) + 1)


def _pooled(bound: Bound) -> int:
    operand, size = bound["self"], bound["kernel_size"]
    stride = bound.get("stride") or size
    num_axes = max(len(size) if isinstance(size, Sequence) else 1, operand.dim() - 2, 1)
    axes = operand.shape[-num_axes:]
    places = [(side + 2 * _at(bound.get("padding", 0), i)) // max(_at(stride, i), 1) + 2 for i, side in enumerate(axes)]
    return _before(operand, num_axes) * math.prod(places)


def _adapted(bound: Bound) -> int:
    operand, size = bound["self"], bound["output_size"]
    size = size if isinstance(size, Sequence) else [size]
    return _before(operand, len(size)) * math.prod(size)


def _scaled(bound: Bound) -> int:
    operand = bound["input"]
    axes = operand.shape[2:]
    factors = bound.get("scale_factors") or [1] * len(axes)
    size = bound.get("output_size") or [math.ceil(side * each) for side, each in zip(axes, factors, strict=True)]
    return _before(operand, len(axes)) * math.prod(size)


def _sampled(bound: Bound) -> int:
    operand, grid = bound["input"], bound["grid"]
    return operand.shape[1] * grid.numel() // max(grid.shape[-1], 1)


def _unrolled(bound: Bound) -> int:
    """Return the elements of windows of a kernel around each place."""
    sides = bound["kernel_size"]
    operand = bound["self"]
    axes = operand.shape[-2:]
    places = [
        (size + 2 * _at(bound["padding"], i)) // max(_at(bound["stride"], i), 1) + 1 for i, size in enumerate(axes)
    ]
    return _before(operand, 2) * math.prod(places) * _at(sides, 0) * _at(sides, 1)


def _rolled_up(bound: Bound) -> int:
    """Return the elements of images that windows of a kernel add up to."""
    operand, sides = bound["self"], math.prod(_at(bound["kernel_size"], i) for i in range(2))
    return _before(operand, 1) // max(sides, 1) * math.prod(bound["output_size"])


def _recurrent_size(bound: Bound) -> int:
    """Return the elements of gates and outputs: each weight matrix has a row for each of them."""
    operand = bound["input"]
    rows = sum(each.shape[0] for each in bound["params"])
    return _before(operand, 1) * rows


def _linear_size(bound: Bound) -> int:
    operand, weight = bound["input"], bound["weight"]
    return _before(operand, 1) * (weight.shape[0] if weight.dim() > 1 else 1)


def _product_size(bound: Bound) -> int:
    one, other = _factors(bound)
    batches = torch.broadcast_shapes(one.shape[:-2], other.shape[:-2])
    return math.prod(batches) * _rows(one) * _columns(other)


def _factors(bound: Bound) -> tuple[Tensor, Tensor]:
    """Return the two operands of a product of matrices."""
    names = (("batch1", "batch2"), ("mat1", "mat2"), ("self", "mat2"), ("self", "other"), ("self", "vec"))
    one, other = next(pair for pair in names if all(name in bound for name in pair))
    return bound[one], bound[other]


def _rows(one: Tensor) -> int:
    return one.shape[-2] if one.dim() > 1 else 1


def _columns(other: Tensor) -> int:
    return other.shape[-1] if other.dim() > 1 else 1


def _letters(bound: Bound) -> tuple[dict[str, int], list[str]]:
    """Return the size of each letter of an equation of `einsum`, and the letters of the result."""
    given, _, result = bound["equation"].replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, tensor in zip(given.split(","), bound["tensors"], strict=True):
        before, dots, after = term.partition("...")
        rest = tensor.dim() - len(before) - len(after) if dots else 0
        for axis, size in zip([*before, *(f".{rest - i}" for i in range(rest)), *after], tensor.shape, strict=True):
            sizes[axis] = max(sizes.get(axis, 1), size)
    return sizes, [axis for axis in sizes if axis[0] == "." or axis in result or "->" not in bound["equation"]]


def _einsum_size(bound: Bound) -> int:
    sizes, result = _letters(bound)
    return math.prod(sizes[axis] for axis in result)


def _queries(bound: Bound) -> int:
    """Return the most queries of attention: axes before the last two are broadcast, or heads that share keys."""
    batches = [bound[name].shape[:-2] for name in ("query", "key", "value", "attn_mask") if bound.get(name) is not None]
    num_axes = max(map(len, batches))
    sizes = [(1,) * (num_axes - len(each)) + tuple(each) for each in batches]
    return math.prod(map(max, zip(*sizes, strict=True))) * bound["query"].shape[-2]


def _attention_size(bound: Bound) -> int:
    return _queries(bound) * bound["value"].shape[-1]


def _of_linear(bound: Bound, made: int) -> tuple[int, int]:
    return made * bound["input"].shape[-1], 0


def _of_product(bound: Bound, made: int) -> tuple[int, int]:
    """Return the work of a product of batches. Operands that are broadcast are copied."""
    one, other = _factors(bound)
    inner = one.shape[-1] if one.dim() else 1
    batches = made // max(_rows(one) * _columns(other), 1)
    copied = (one, batches * _rows(one) * inner), (other, batches * inner * _columns(other))
    return made * inner, sum(size for operand, size in copied if size > operand.numel())


def _of_einsum(bound: Bound, made: int) -> tuple[int, int]:
    """Return the product of the sizes of all letters; of three operands or more, values may have any of them."""
    work = math.prod(_letters(bound)[0].values())
    return work, work if len(bound["tensors"]) > 2 else 0


def _of_attention(bound: Bound, made: int) -> tuple[int, int]:
    """Return the work of attention. Without the fused kernel it keeps scores three times."""
    query, key, value = bound["query"], bound["key"], bound["value"]
    scores = _queries(bound) * key.shape[-2]
    is_fused = query.dtype in _FLOATS and not bound.get("dropout_p") and _are_alike(query, key, value)
    return scores * (query.shape[-1] + value.shape[-1]), 0 if is_fused else 3 * scores


def _are_alike(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether the fused kernel of attention takes these: others are computed with all scores in memory."""
    operands = (query, key, value)
    has_form = all(each.dim() == 4 and each.numel() and each.stride(-1) == 1 for each in operands)
    return has_form and len({(*each.shape[:2], each.shape[3]) for each in operands}) == 1


def _of_convolution(bound: Bound, made: int) -> tuple[int, int]:
    """Return the work of a convolution. Its operand is unrolled, unless it is large and of floats."""
    operand, weight, groups = bound["input"], bound["weight"], max(bound.get("groups", 1), 1)
    each = math.prod(weight.shape[1:])
    is_direct = operand.dtype in _FLOATS and (operand.numel() > _DIRECT or groups > 1)
    return made * each, 0 if is_direct else made // max(weight.shape[0], 1) * each * groups


def _of_convolution_back(bound: Bound, made: int) -> tuple[int, int]:
    operand, weight = bound["input"], bound["weight"]
    work = operand.numel() * math.prod(weight.shape[1:])
    return work, work // max(weight.shape[0], 1)


def _of_pool(bound: Bound, made: int) -> tuple[int, int]:
    size = bound["kernel_size"]
    sides = [_at(size, i) for i in range(max(bound["self"].dim() - 2, 1))]
    return LIGHT * made * math.prod(sides), 0


def _of_recurrent(bound: Bound, made: int) -> tuple[int, int]:
    weights = sum(each.numel() for each in bound["params"])
    return _before(bound["input"], 1) * weights, 0


def _of_put(bound: Bound, made: int) -> tuple[int, int]:
    """Return the work of writing to places. Indices are broadcast: they may name more places than they have numbers."""
    return HEAVY // _SLOW * (bound["self"].numel() + _indexed(bound)), 0


def _of_norm(bound: Bound, made: int) -> tuple[int, int]:
    """Return the work of a norm. That of a matrix may need its singular values."""
    operand, axes = bound["self"], bound.get("dim")
    axes = range(operand.dim()) if axes is None else axes if isinstance(axes, Sequence) else [axes]
    is_matrix = len(axes) == 2 and bound.get("ord") is not None
    steps = HEAVY * min(operand.shape[axis] for axis in axes) if is_matrix else HEAVY
    return steps * operand.numel(), 4 * operand.numel() if is_matrix else 0


def _of_roll(bound: Bound, made: int) -> tuple[int, int]:
    shifts = bound["shifts"]
    return LIGHT * made * (len(shifts) if isinstance(shifts, Sequence) else 1), made


def _of_diff(bound: Bound, made: int) -> tuple[int, int]:
    """Return the work of differences of differences: PyTorch computes each from the last."""
    return HEAVY * made * max(bound.get("n", 1), 1), 2 * made


_Elements = Callable[[Bound], int]
_Work = Callable[[Bound, int], tuple[int, int]]


class Operation(NamedTuple):
    """One operation of the table."""

    kind: str
    """A key of KINDS."""
    elements: _Elements
    """Upper bound of the elements of its results."""
    work: int | _Work = LIGHT
    """Multiply-adds in the time that one element of its operands and its results takes, or multiply-adds and the
    elements that it keeps for a time, from the arguments and the elements of its results."""


_TABLE: tuple[tuple[Operation, str], ...] = (
    (
        Operation("elementwise", _broadcast),
        "__and__.Tensor __and__.Scalar __or__.Tensor __or__.Scalar abs.default add.Scalar add.Tensor addcmul.default"
        " bitwise_and.Scalar bitwise_and.Tensor bitwise_not.default bitwise_or.Tensor ceil.default clamp.Tensor"
        " clamp.default clamp_max.default clamp_min.default clip.default complex.default cos.default div.Scalar"
        " div.Tensor divide.Tensor"
        " dropout.default elu.default eq.Scalar eq.Tensor erf.default exp.default expm1.default floor.default"
        " ge.Scalar ge.Tensor gelu.default gt.Scalar gt.Tensor hardsigmoid.default hardswish.default hardtanh.default"
        " isfinite.default isinf.default isnan.default le.Scalar le.Tensor leaky_relu.default log.default log1p.default"
        " log2.default log_sigmoid.default logical_and.default logical_not.default logical_or.default"
        " logical_xor.default lt.Scalar lt.Tensor masked_fill.Scalar masked_fill.Tensor max.other maximum.default"
        " min.other minimum.default mish.default mse_loss.default mul.Scalar mul.Tensor multiply.Tensor"
        " nan_to_num.default ne.Scalar ne.Tensor"
        " neg.default pow.Tensor_Scalar reciprocal.default relu.default relu6.default round.default"
        " rsqrt.default rsub.Scalar sigmoid.default sign.default silu.default sin.default softplus.default"
        " sqrt.default square.default sub.Scalar sub.Tensor subtract.Tensor tanh.default trunc.default"
        " where.Scalar where.ScalarOther"
        " where.ScalarSelf where.self",
    ),
    (Operation("elementwise", _broadcast, HEAVY), "atan2.default pow.Scalar pow.Tensor_Tensor polar.default"),
    (
        Operation("elementwise", _divided, HEAVY),
        "div.Tensor_mode floor_divide.default fmod.Scalar remainder.Scalar remainder.Tensor",
    ),
    (
        Operation("elementwise", _first),
        "_weight_norm.default batch_norm.default bernoulli.default clone.default contiguous.default flatten.using_ints"
        " full_like.default glu.default group_norm.default instance_norm.default layer_norm.default"
        " lift_fresh_copy.default log_softmax.int ones_like.default pixel_shuffle.default pixel_unshuffle.default"
        " prelu.default reshape.default rms_norm.default softmax.int to.device to.dtype to.dtype_layout to.other"
        " tril.default triu.default type_as.default unflatten.int zeros_like.default",
    ),
    (
        Operation("elementwise", _first, HEAVY),
        "bucketize.Tensor cumprod.default cumsum.default flip.default logcumsumexp.default",
    ),
    (Operation("elementwise", _first, _of_roll), "roll.default"),
    (Operation("elementwise", _transformed, HEAVY), "fft_fft.default fft_fft2.default fft_fftn.default"),
    (
        Operation("reduction", _first),
        "all.default all.dim amax.default amin.default any.default any.dim argmax.default argmin.default"
        " linalg_vector_norm.default logsumexp.default max.default mean.default mean.dim min.default norm.ScalarOpt_dim"
        " prod.dim_int std.correction std.dim sum.default sum.dim_IntList var.correction var.dim",
    ),
    (Operation("reduction", _first, _of_norm), "linalg_norm.default"),
    (Operation("reduction", _twice), "max.dim min.dim"),
    (Operation("reduction", _twice, HEAVY), "argsort.default sort.default topk.default"),
    (Operation("product", _linear_size, _of_linear), "linear.default"),
    (
        Operation("product", _product_size, _of_product),
        "addmm.default baddbmm.default bmm.default matmul.default mm.default",
    ),
    (Operation("product", _einsum_size, _of_einsum), "einsum.default"),
    (Operation("product", _attention_size, _of_attention), "scaled_dot_product_attention.default"),
    (
        Operation("product", _convolved, _of_convolution),
        "conv1d.default conv1d.padding conv2d.default conv2d.padding conv3d.default conv3d.padding",
    ),
    (
        Operation("product", _convolved_back, _of_convolution_back),
        "conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input",
    ),
    (
        Operation("product", _pooled, _of_pool),
        "avg_pool1d.default avg_pool2d.default avg_pool3d.default max_pool1d.default max_pool2d.default"
        " max_pool3d.default",
    ),
    (
        Operation("product", _adapted),
        "adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default",
    ),
    (
        Operation("product", _scaled, HEAVY),
        "_upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.vec upsample_bicubic2d.vec upsample_bilinear2d.vec"
        " upsample_linear1d.vec upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec"
        " upsample_trilinear3d.vec",
    ),
    (Operation("product", _sampled, HEAVY), "grid_sampler.default"),
    (Operation("product", _recurrent_size, _of_recurrent), "gru.input lstm.input"),
    (Operation("choice", _all), "cat.default concat.default concatenate.default stack.default"),
    (Operation("choice", _all, _of_diff), "diff.default"),
    (Operation("choice", _looked_up), "embedding.default"),
    (Operation("choice", _indexed), "index.Tensor"),
    (Operation("choice", _along), "index_select.default"),
    (Operation("choice", _as_index), "gather.default"),
    (
        Operation("choice", _first, HEAVY),
        "index_add.default index_copy.default scatter.src scatter.value scatter_add.default scatter_reduce.two",
    ),
    (Operation("choice", _first, _of_put), "index_put.default"),
    (Operation("choice", _masked, HEAVY), "masked_scatter.default"),
    (Operation("choice", _first), "select_scatter.default slice_scatter.default"),
    (Operation("choice", _repeated), "repeat.default repeat_interleave.self_int tile.default"),
    (Operation("choice", _padded), "constant_pad_nd.default pad.default"),
    (Operation("choice", _unrolled), "im2col.default"),
    (Operation("choice", _rolled_up), "col2im.default"),
    (Operation("made", _one_hot), "one_hot.default"),
    (Operation("made", _ranged), "arange.default arange.start arange.start_step linspace.default"),
    (
        Operation("made", _sized),
        "empty.memory_format eye.default eye.m full.default new_empty.default new_full.default new_ones.default"
        " new_zeros.default ones.default scalar_tensor.default zeros.default",
    ),
    (
        Operation("view", _none, 0),
        "alias.default broadcast_tensors.default broadcast_to.default chunk.default detach.default detach_.default"
        " diagonal.default expand.default expand_as.default imag.default meshgrid.default meshgrid.indexing"
        " movedim.int movedim.intlist moveaxis.int moveaxis.intlist narrow.default numpy_T.default"
        " permute.default real.default"
        " reshape_as.default select.int"
        " slice.Tensor split.Tensor split.sizes split_with_sizes.default squeeze.default squeeze.dim squeeze.dims"
        " swapaxes.default swapdims.default t.default tensor_split.indices tensor_split.sections transpose.int"
        " unbind.int"
        " unfold.default unsqueeze.default view.default view_as.default view_as_complex.default view_as_real.default",
    ),
    (
        Operation("in place", _none),
        "__iand__.Tensor __ior__.Tensor add_.Scalar add_.Tensor clamp_.default clamp_min_.default copy_.default"
        " div_.Scalar div_.Tensor dropout_.default elu_.default exp_.default fill_.Scalar fill_.Tensor"
        " hardsigmoid_.default hardswish_.default hardtanh_.default leaky_relu_.default masked_fill_.Scalar"
        " masked_fill_.Tensor mul_.Scalar mul_.Tensor relu6_.default relu_.default sigmoid_.default silu_.default"
        " sub_.Scalar sub_.Tensor tanh_.default zero_.default",
    ),
    (
        Operation("in place", _none, HEAVY),
        "floor_divide_.Tensor index_add_.default index_copy_.default scatter_.src scatter_.value scatter_add_.default",
    ),
    (Operation("in place", _none, _of_put), "index_put_.default"),
    (Operation("random", _none, HEAVY), "normal_.default uniform_.default"),
    (Operation("number", _none, 0), "sym_size.int sym_numel.default"),
)
OPERATIONS: dict[str, Operation] = {f"aten.{name}": operation for operation, names in _TABLE for name in names.split()}
"""Name of an operation and of its overload -> its entry."""


def cost_of(target: str, bound: Bound) -> Cost:
    """Return upper bounds of what a call takes, from its arguments by name; of results, 0 for unlisted operations."""
    operands = list(tensors_in(list(bound.values())))
    elements = sum(each.numel() for each in operands)
    operation = OPERATIONS.get(target)
    if operation is None:
        return Cost(0, HEAVY * elements)
    require_arguments(target, operation.kind, bound)
    made = math.ceil(operation.elements(bound))  # NaN and infinite sizes raise
    if made < 0:
        raise ValueError("a negative size")
    dtypes = [each for each in bound.values() if isinstance(each, torch.dtype)]
    item_bytes = max([_ITEM_BYTES, *(each.itemsize for each in (*dtypes, *(operand.dtype for operand in operands)))])
    if isinstance(operation.work, int):
        return Cost(made * item_bytes, operation.work * (elements + made))
    work, extra = operation.work(bound, made)
    factor = max((_SPEED.get(each.dtype, _SLOW) for each in operands), default=1)
    return Cost(made * item_bytes, work * factor + LIGHT * made, extra * item_bytes)


def depends_on_data(target: str, bound: Bound) -> bool:
    """Return whether a result may have another size for other data of the same shapes."""
    operation = OPERATIONS.get(target)
    if operation is None or operation.kind == "data":
        return True
    return "indices" in bound and any(each.dtype in _MASKS for each in tensors_in(bound["indices"]))


def num_pieces(target: str, bound: Bound) -> int:
    """Return the most tensors that a call returns, from its arguments by name."""
    name = target.split(".")[1]
    if name not in ("split", "unsafe_split", "chunk", "unbind", "tensor_split"):
        return 1
    operand, axis = bound["self"], bound.get("dim", 0)
    if name in ("chunk", "tensor_split"):
        parts = next(bound[key] for key in ("chunks", "sections", "indices") if key in bound)
        return parts if isinstance(parts, int) else len(parts) + 1
    size, each = operand.shape[axis] if operand.dim() else 0, bound.get("split_size", 1)
    return -(-size // each) if isinstance(each, int) and each > 0 else size
