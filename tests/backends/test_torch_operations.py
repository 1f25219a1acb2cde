"""What calls of PyTorch's operations cost: elements, multiply-adds and temporary memory, by hand from shapes."""

import pytest
import torch

from offramp.backends.torch_graphs import CapturedGraph
from offramp.backends.torch_operations import HEAVY, LIGHT, Cost, cost_of, depends_on_data, num_pieces

ITEM_BYTES = 8


def f(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def i(*shape):
    return f(*shape, dtype=torch.int64)


def b(*shape):
    return f(*shape, dtype=torch.bool)


def d(*shape):
    return f(*shape, dtype=torch.float64)


def bound_of(target, *args, **more):
    """The arguments of a call by their names."""
    names = [each.name for each in CapturedGraph._operation(target)._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **more}


def light(read, made):
    """An operation that takes a simple step for each element that it reads or makes."""
    return made, LIGHT * (read + made), 0


def heavy(read, made):
    return made, HEAVY * (read + made), 0


def products(made, work, extra=0):
    """An operation whose multiply-adds are counted, and a step for each element that it makes."""
    return made, work + LIGHT * made, extra


SCORES = 2 * 5 * 7
"""Scores of attention of two heads, five queries and seven keys."""
SMALL, LARGE = 20480, 20481
"""Elements of an operand that is convolved by unrolling it, and of one that is not."""
CALLS = [
    # elementwise, reductions, views
    (["add.Tensor", f(2, 1), f(3)], light(5, 6)),
    (["pow.Tensor_Tensor", f(2, 1), f(3)], heavy(5, 6)),
    (["softmax.int", f(2, 3), 1], light(6, 6)),
    (["cumsum.default", f(2, 3), 1], heavy(6, 6)),
    (["floor_divide.default", f(2, 1), f(3)], heavy(5, 6)),
    (["roll.default", f(2, 3), [1, 2], [0, 1]], products(6, 2 * LIGHT * 6, 6)),
    (["roll.default", f(2, 3), 1], products(6, LIGHT * 6, 6)),
    (["fft_fft.default", f(4, 6)], heavy(24, 2 * 24)),
    (["fft_fft.default", f(4, 6), 8], heavy(24, 2 * 4 * 8)),
    (["fft_fft.default", f(4, 6), 3], heavy(24, 2 * 24)),
    (["fft_fft.default", f(4, 6), 8, 0], heavy(24, 2 * 8 * 6)),
    (["fft_fft2.default", f(4, 6), [8, 2]], heavy(24, 2 * 8 * 6)),
    (["fft_fftn.default", f(4, 6), [9], [0]], heavy(24, 2 * 9 * 6)),
    (["sum.default", f(4, 5)], light(20, 20)),
    (["max.dim", f(4, 5), 0], light(20, 40)),
    (["sort.default", f(4, 5)], heavy(20, 40)),
    (["view.default", f(4, 5), [20]], (0, 0, 0)),
    (["add_.Tensor", f(4, 5), f(5)], light(25, 0)),
    (["normal_.default", f(4, 5)], heavy(20, 0)),
    (["sym_size.int", f(4, 5), 0], (0, 0, 0)),
    # products
    (["linear.default", f(2, 3, 4), f(5, 4), f(5)], products(30, 30 * 4)),
    (["linear.default", f(2, 3, 4), f(4)], products(6, 6 * 4)),
    (["addmm.default", f(6), f(2, 3), f(3, 6)], products(12, 12 * 3)),
    (["baddbmm.default", f(6), f(4, 2, 3), f(4, 3, 6)], products(48, 48 * 3)),
    (["mm.default", f(2, 3), f(3, 4)], products(8, 8 * 3)),
    (["matmul.default", f(1, 2, 3), f(4, 3, 5)], products(40, 40 * 3, 4 * 2 * 3)),
    (["matmul.default", f(4, 2, 3), f(3, 5)], products(40, 40 * 3, 4 * 3 * 5)),
    (["matmul.default", f(2, 1, 2, 3), f(4, 3, 5)], products(80, 80 * 3, 8 * 2 * 3 + 8 * 3 * 5)),
    (["matmul.default", f(3), f(3, 5)], products(5, 5 * 3)),
    (["matmul.default", f(2, 3), f(3)], products(2, 2 * 3)),
    (["bmm.default", d(2, 2, 3), d(2, 3, 4)], products(16, 2 * 16 * 3)),
    (["bmm.default", *[f(2, 2, 2, dtype=torch.bfloat16)] * 2], products(8, 4 * 8 * 2)),
    (["bmm.default", *[f(2, 2, 2, dtype=torch.float16)] * 2], products(8, 4 * 8 * 2)),
    (["bmm.default", i(2, 2, 2), i(2, 2, 2)], products(8, 16 * 8 * 2)),
    (["einsum.default", "ij,jk->ik", [f(2, 3), f(3, 4)]], products(8, 24)),
    (["einsum.default", "ij, jk", [f(2, 3), f(3, 4)]], products(24, 24)),
    (["einsum.default", "ij,jk->", [f(2, 3), f(1, 4)]], products(1, 24)),
    (["einsum.default", "ij,jk,kl->il", [f(2, 3), f(3, 4), f(4, 5)]], products(10, 120, 120)),
    (["einsum.default", "...ij,...jk->...ik", [f(7, 2, 3), f(7, 3, 4)]], products(56, 7 * 24)),
    (["einsum.default", "a...,...->a", [f(2, 5, 3), f(5, 3)]], products(2 * 15, 2 * 15)),
    (["scaled_dot_product_attention.default", f(1, 2, 5, 4), f(1, 2, 7, 4), f(1, 2, 7, 4)],
     products(40, SCORES * (4 + 4))),
    (["scaled_dot_product_attention.default", f(1, 2, 5, 4), f(1, 2, 7, 4), f(1, 2, 7, 6)],
     products(60, SCORES * (4 + 6), 3 * SCORES)),
    (["scaled_dot_product_attention.default", f(2, 5, 4), f(2, 7, 4), f(2, 7, 6)],
     products(60, SCORES * (4 + 6), 3 * SCORES)),
    (["scaled_dot_product_attention.default", f(1, 2, 5, 4), f(1, 2, 7, 4), f(1, 2, 7, 4), None, 0.5],
     products(40, SCORES * (4 + 4), 3 * SCORES)),
    (["scaled_dot_product_attention.default", d(1, 2, 5, 4), d(1, 2, 7, 4), d(1, 2, 7, 4)],
     products(40, 2 * SCORES * (4 + 4), 3 * SCORES)),
    # windows
    (["conv2d.default", f(1, 3, 6, 6), f(4, 3, 3, 3), f(4), [1, 1], [1, 1]], products(4 * 81, 4 * 81 * 27, 81 * 27)),
    (["conv2d.default", f(1, 3, 6, 6), f(4, 3, 3, 3), None, [2, 4], [1, 0]], products(40, 40 * 27, 10 * 27)),
    (["conv2d.default", f(3, 6, 6), f(4, 3, 3, 3)], products(4 * 49, 4 * 49 * 27, 49 * 27)),
    (["conv1d.default", f(2, 4, 9), f(6, 2, 3), None, [1], [0], [1], 2], products(120, 120 * 6)),
    (["conv1d.default", d(2, 4, 9), d(6, 2, 3), None, [1], [0], [1], 2], products(120, 2 * 120 * 6, 20 * 6 * 2)),
    (["conv1d.default", f(1, 1, SMALL), f(1, 1, 1)], products(SMALL + 1, SMALL + 1, SMALL + 1)),
    (["conv1d.default", f(1, 1, LARGE), f(1, 1, 1)], products(LARGE + 1, LARGE + 1)),
    (["conv1d.padding", f(1, 1, 8), f(1, 1, 3), None, [1], "same"], products(9, 9 * 3, 9 * 3)),
    (["conv_transpose1d.default", f(1, 2, 5), f(2, 3, 3)], products(24, 10 * 9, 45)),
    (["conv_transpose1d.default", f(2, 4, 5), f(4, 3, 3), None, [2], [0], [1], 2, [3]], products(240, 40 * 9, 90)),
    (["avg_pool2d.default", f(1, 2, 6, 6), [2, 3]], products(40, LIGHT * 40 * 6)),
    (["avg_pool2d.default", f(1, 2, 6, 6), [2, 3], [1, 2], [1, 0]], products(2 * 10 * 5, LIGHT * 100 * 6)),
    (["avg_pool1d.default", f(2, 8), [3]], products(8, LIGHT * 8 * 3)),
    (["avg_pool3d.default", f(1, 1, 4, 4, 4), 2], products(64, LIGHT * 64 * 8)),
    (["adaptive_avg_pool2d.default", f(2, 3, 8, 8), [4, 2]], light(384, 48)),
    (["adaptive_avg_pool1d.default", f(2, 3, 8), 5], light(48, 30)),
    (["upsample_nearest1d.vec", f(1, 2, 4), [10], None], heavy(8, 20)),
    (["upsample_nearest1d.vec", f(1, 2, 4), None, [2.3]], heavy(8, 20)),
    (["upsample_nearest2d.vec", f(1, 2, 4, 3), None, [2.0, 1.0]], heavy(24, 48)),
    (["grid_sampler.default", f(2, 3, 4, 4), f(2, 5, 6, 2), 0, 0, False], heavy(96 + 120, 2 * 5 * 6 * 3)),
    (["im2col.default", f(1, 2, 4, 4), [2, 3], [1, 1], [1, 0], [1, 2]], light(32, 2 * 7 * 3 * 6)),
    (["col2im.default", f(1, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]], light(72, 32)),
    (["lstm.input", f(2, 5, 3), [f(1, 2, 4), f(1, 2, 4)], [f(16, 3), f(16, 4), f(16), f(16)], True, 1, 0.0, False,
      False, True], products(10 * 64, 10 * 144)),
    # choices
    (["cat.default", [f(2, 3), f(4, 3)]], light(18, 18)),
    (["diff.default", f(10), 3], products(10, 3 * HEAVY * 10, 20)),
    (["diff.default", f(10)], products(10, HEAVY * 10, 20)),
    (["embedding.default", f(7, 4), i(2, 3)], light(34, 24)),
    (["index.Tensor", f(5, 6, 7), [i(2, 3)]], light(216, 6 * 42)),
    (["index.Tensor", f(5, 6, 7), [None, i(4)]], light(214, 5 * 4 * 7)),
    (["index.Tensor", f(5, 6, 7), [i(2, 1), i(3)]], light(215, 6 * 7)),
    (["index.Tensor", f(5, 6, 7), [b(5, 6)]], light(240, 30 * 7)),
    (["index.Tensor", f(5, 6, 7), [b(5), None, i(4)]], light(219, 5 * 6 * 4)),
    (["index_select.default", f(4, 5), 1, i(3)], light(23, 12)),
    (["index_select.default", f(), 0, i(1)], light(2, 1)),
    (["gather.default", f(4, 5), 0, i(2, 3)], light(26, 6)),
    (["scatter_add.default", f(4, 5), 0, i(2, 3), f(2, 3)], heavy(32, 20)),
    (["repeat.default", f(2, 3), [4, 1, 2]], light(6, 48)),
    (["repeat_interleave.self_int", f(2, 3), 3], light(6, 18)),
    (["tile.default", f(2, 3), [2]], light(6, 12)),
    (["pad.default", f(2, 3), [1, 2]], light(6, 2 * 6)),
    (["pad.default", f(2, 3), [1, 2, 3, 4]], light(6, 6 * 9)),
    (["constant_pad_nd.default", f(2, 3), [-4, 0]], light(6, 0)),
    # made of numbers
    (["arange.default", 7], light(0, 7)),
    (["arange.start", 3, 3], light(0, 0)),
    (["arange.start", 3, 1], light(0, 0)),
    (["arange.start_step", 1, 10, 2.5], light(0, 4)),
    (["linspace.default", 0, 1, 40], light(0, 40)),
    (["eye.default", 5], light(0, 25)),
    (["eye.m", 5, 3], light(0, 15)),
    (["full.default", [2, 3], 1.0], light(0, 6)),
    (["scalar_tensor.default", 1.0], light(0, 1)),
    (["new_zeros.default", f(4), [2, 3]], light(4, 6)),
    (["nonzero.default", f(4, 5)], (0, HEAVY * 20, 0)),
]  # fmt: skip
"""Call -> elements of its results, work, elements of temporary memory."""


@pytest.mark.parametrize(("call", "cost"), CALLS, ids=lambda part: part[0] if isinstance(part, list) else "")
def test_a_call_costs_what_its_shapes_say(call, cost):
    target, *args = call
    made, work, extra = cost
    target = f"aten.{target}"
    assert cost_of(target, bound_of(target, *args)) == Cost(made * ITEM_BYTES, work, extra * ITEM_BYTES)


def test_elements_take_the_bytes_of_the_largest_type():
    wide = {"dtype": torch.complex128}
    assert cost_of("aten.zeros.default", bound_of("aten.zeros.default", [3], **wide)).made_bytes == 3 * 16
    assert cost_of("aten.zeros.default", bound_of("aten.zeros.default", [3], dtype=torch.int8)).made_bytes == 3 * 8
    wide = f(2, 2, **wide)
    found = cost_of("aten.matmul.default", bound_of("aten.matmul.default", wide.expand(5, 2, 2), wide))
    assert found == Cost(20 * 16, 16 * 20 * 2 + LIGHT * 20, 20 * 16)


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match="negative"):
        cost_of("aten.zeros.default", bound_of("aten.zeros.default", [3, -1]))
    assert cost_of("aten.zeros.default", bound_of("aten.zeros.default", [3, 0])).made_bytes == 0


PIECES = [
    (["split.Tensor", f(10), 3], 4),
    (["split.Tensor", f(2, 9), 3, 1], 3),
    (["split.sizes", f(9), [1, 8]], 9),
    (["chunk.default", f(10), 5], 5),
    (["unbind.int", f(7, 2)], 7),
    (["unbind.int", f(7, 2), 1], 2),
    (["tensor_split.sections", f(7), 4], 4),
    (["tensor_split.indices", f(7), [1, 2]], 3),
    (["relu.default", f(7)], 1),
]


@pytest.mark.parametrize(("call", "pieces"), PIECES, ids=lambda part: part[0] if isinstance(part, list) else "")
def test_a_call_returns_no_more_pieces_than_said(call, pieces):
    target = f"aten.{call[0]}"
    assert num_pieces(target, bound_of(target, *call[1:])) == pieces
    assert depends_on_data(target, bound_of(target, *call[1:])) is False


def test_only_masks_and_unlisted_operations_give_sizes_that_depend_on_data():
    masks, places = ([*which, i(3)] for which in ([b(5)], [None]))
    assert depends_on_data("aten.index.Tensor", bound_of("aten.index.Tensor", f(5, 6), masks))
    assert not depends_on_data("aten.index.Tensor", bound_of("aten.index.Tensor", f(5, 6), places))
    assert depends_on_data("aten.nonzero.default", bound_of("aten.nonzero.default", f(5)))
