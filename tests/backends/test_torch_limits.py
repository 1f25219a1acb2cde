"""Captured graphs of strangers: what they may not do, and beside it the nearest thing that they may."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.backends import torch_limits
from offramp.backends.torch import TorchBackend
from offramp.backends.torch_arguments import require_arguments
from offramp.backends.torch_graphs import CapturedGraph
from offramp.backends.torch_limits import LEAST_WORK, Allowance, BoundedGraph, TooLargeError
from offramp.backends.torch_operations import KINDS, OPERATIONS
from offramp.errors import StoreError
from offramp.store import Store
from tests.backends import captured, hostile

X, W = torch.tensor([[1.0, -2.0, 3.0]]), torch.eye(3)
REFUSED = (StoreError, TooLargeError, RuntimeError, ValueError, TypeError)


def v(name):
    return {"v": name}


def nodes_of(*calls):
    """Nodes n0, n1, ... of (operation, *arguments); the last argument may be one of names."""
    return [
        [f"n{i}", target, [*args[:-1]] if named else [*args], args[-1] if named else {}]
        for i, (target, *args) in enumerate(calls)
        for named in [bool(args) and isinstance(args[-1], dict) and not args[-1].keys() & {"v", "float"}]
    ]


def bounded(*calls, outputs=None, trusted=False):
    tree = {"inputs": {"r": 1, "w": 1, "c": 0}, "nodes": nodes_of(*calls), "outputs": outputs or [f"n{len(calls) - 1}"]}
    graph = CapturedGraph(json.dumps(tree).encode(), "here", trusted=trusted)
    return BoundedGraph(graph, [[(W.shape, (), W.dtype)]])


def allowance(work=0, **more):
    made = Allowance(3, X.nbytes, (W.numel(), W.nbytes), 1 << 12, **{"is_warm_up": False, **more})
    made.spend(work)
    return made


def ran(*calls, x=X, work=0, **options):
    with torch.inference_mode():
        return bounded(*calls, **options)([x, W.clone()], allowance(work))


UNLISTED = [
    (["aten._reshape_alias.default", v("r0"), [900], [1]], ["aten.reshape.default", v("r0"), [3]]),
    (["aten._reshape_alias.default", v("r0"), [1], [1]], ["aten.slice.Tensor", v("r0"), 1, 0, 1]),
    (["aten.as_strided.default", v("r0"), [9], [9]], ["aten.view.default", v("r0"), [3, 1]]),
    (["aten._sparse_csr_tensor_unsafe.default", v("r0"), v("r0"), v("r0"), [3, 3]], ["aten.diagonal.default", v("w0")]),
    (["aten._unsafe_view.default", v("r0"), [3]], ["aten.view.default", v("r0"), [3]]),
    (["aten.add.out", v("r0"), v("r0"), {"out": v("r0")}], ["aten.add.Tensor", v("r0"), v("r0")]),
    (["aten.nonzero.default", v("r0")], ["aten.ne.Scalar", v("r0"), 0]),
    (["aten.item.default", v("r0")], ["aten.sym_size.int", v("r0"), 0]),
    (["aten.masked_select.default", v("r0"), v("r0")], ["aten.masked_fill.Scalar", v("r0"), v("n0"), 0]),
    (["aten.resize_.default", v("r0"), [900]], ["aten.expand.default", v("r0"), [2, 3]]),
    (["aten.set_.source_Tensor", v("r0"), v("w0")], ["aten.clone.default", v("r0")]),
    (["aten.rand.default", [3]], ["aten.zeros.default", [3]]),
    (["aten.empty_strided.default", [3], [900]], ["aten.empty.memory_format", [3]]),
    (["aten.bincount.default", v("r0")], ["aten.cumsum.default", v("r0"), 0]),
    (["aten.repeat_interleave.Tensor", v("r0")], ["aten.repeat.default", v("r0"), [2, 2]]),
]
"""Operations outside the table, and the nearest in it."""


@pytest.mark.parametrize("call", [call for call, _ in UNLISTED], ids=lambda call: call[0])
def test_operations_outside_the_table_are_named(call):
    said = rf"operation {call[0]} is none of those that kernels may use - here - .*offramp\.stream, or with --trust-k"
    with pytest.raises(StoreError, match=said):
        bounded(call)
    if call[0] not in ("aten.item.default",):
        assert bounded(call, trusted=True)


@pytest.mark.parametrize("call", [twin for _, twin in UNLISTED], ids=lambda call: call[0])
def test_their_legal_twins_run(call):
    calls = [["aten.gt.Scalar", v("r0"), 0], call]
    outputs = ["n0"] if call[0] == "aten.sym_size.int" else None
    assert ran(*calls, outputs=outputs)


@pytest.mark.parametrize("target", ["aten.save.default", "aten.from_file.default", "aten._print.default", "os.system"])
def test_files_and_the_terminal_are_out_of_reach_of_trusted_kernels_as_well(target):
    with pytest.raises(StoreError, match=f"operation {target} is not allowed in a store"):
        bounded([target, v("r0")], trusted=True)


INT64 = {"dtype": {"dtype": "int64"}}
GROW = ["aten.cat.default", [v("r0")] * 1000]
LARGE = [
    ([["aten.full.default", [1 << 40], 1.0]], [["aten.full.default", [1 << 10], 1.0]]),
    ([["aten.zeros.default", [1 << 31, 1 << 31]]], [["aten.zeros.default", [3, 3]]]),
    ([["aten.arange.default", 1 << 50]], [["aten.arange.default", 50]]),
    ([["aten.arange.start_step", 0, 1, 1e-12]], [["aten.arange.start_step", 0, 1, 0.1]]),
    ([["aten.linspace.default", 0, 1, 1 << 40]], [["aten.linspace.default", 0, 1, 40]]),
    ([["aten.eye.default", 1 << 20]], [["aten.eye.default", 20]]),
    (
        [["aten.zeros.default", [8], INT64], ["aten.one_hot.default", v("n0"), 1 << 40]],
        [["aten.zeros.default", [8], INT64], ["aten.one_hot.default", v("n0"), 4]],
    ),
    ([["aten.expand.default", v("r0"), [1 << 40, 3]]], [["aten.expand.default", v("r0"), [4, 3]]]),
    ([["aten.repeat.default", v("r0"), [1 << 30, 1]]], [["aten.repeat.default", v("r0"), [3, 1]]]),
    ([["aten.pad.default", v("r0"), [0, 1 << 40]]], [["aten.pad.default", v("r0"), [0, 4]]]),
    ([["aten.pad.default", v("r0"), [1 << 40, -1]]], [["aten.pad.default", v("r0"), [1, -1]]]),
    ([["aten.fft_fft.default", v("r0"), 1 << 27]], [["aten.fft_fft.default", v("r0"), 8]]),
    ([["aten.fft_fft2.default", v("r0"), [1 << 14, 1 << 14]]], [["aten.fft_fft2.default", v("r0"), [2, 2]]]),
    ([["aten.fft_fftn.default", v("r0"), [1 << 27], [0]]], [["aten.fft_fftn.default", v("r0")]]),
    ([["aten.index_select.default", v("r0"), 0, v("n0")]], None),
    ([GROW, *[["aten.cat.default", [v(f"n{i}")] * 1000] for i in range(3)]], [GROW]),
    (
        [["aten.zeros.default", [1 << 18]] for _ in range(40)]
        + [["aten.cat.default", [v(f"n{i}") for i in range(40)]]],
        [["aten.zeros.default", [1 << 18]] for _ in range(40)] + [["aten.cat.default", [v(f"n{i}") for i in range(4)]]],
    ),
    (
        [["aten.unsqueeze.default", v("r0"), 2], ["aten.upsample_nearest1d.vec", v("n0"), [1 << 40], None]],
        [["aten.unsqueeze.default", v("r0"), 2], ["aten.upsample_nearest1d.vec", v("n0"), [4], None]],
    ),
    *(
        (of_nothing(1 << 16), of_nothing(3))
        for of_nothing in (
            lambda n: [["aten.zeros.default", [n * n, 0]], ["aten.sum.dim_IntList", v("n0"), [1]]],
            lambda n: [["aten.zeros.default", [0]], ["aten.pad.default", v("n0"), [n * n // 4, 0]]],
            lambda n: [["aten.zeros.default", [n, 0]], ["aten.linear.default", v("n0"), v("n0")]],
        )
    ),
    *(
        (attended(1 << 14, 0), attended(3, 1))
        for attended in (
            lambda n, width: [
                ["aten.zeros.default", [n, 1]],
                ["aten.zeros.default", [n, width]],
                ["aten.scaled_dot_product_attention.default", v("n0"), v("n0"), v("n1")],
            ],
            lambda n, _: [
                ["aten.zeros.default", [1, n, 1]],
                ["aten.zeros.default", [n, 1, 1]],
                ["aten.zeros.default", [1, 1, 1]],
                ["aten.scaled_dot_product_attention.default", v("n0"), v("n1"), v("n2")],
            ],
            lambda n, _: [
                ["aten.zeros.default", [1, 1, n, 1]],
                ["aten.zeros.default", [1, 1, n, 2]],
                ["aten.scaled_dot_product_attention.default", v("n0"), v("n0"), v("n1")],
            ],
        )
    ),
    *(
        (masked(1 << 14), masked(3))
        for masked in (
            lambda n: [
                ["aten.zeros.default", [n, 1]],
                ["aten.zeros.default", [1, n], {"dtype": {"dtype": "bool"}}],
                ["aten.masked_scatter.default", v("n0"), v("n1"), v("n0")],
            ],
        )
    ),
    ([["aten.zeros.default", [1] * 40]], [["aten.zeros.default", [1] * 8]]),
    (
        [["aten.zeros.default", [1 << 16]], ["aten.unbind.int", v("n0")], ["getitem", v("n1"), 0]],
        [["aten.zeros.default", [1 << 4]], ["aten.unbind.int", v("n0")], ["getitem", v("n1"), 0]],
    ),
    (
        [["aten.zeros.default", [1]], ["aten.tensor_split.sections", v("n0"), 1 << 40], ["getitem", v("n1"), 0]],
        [["aten.zeros.default", [1]], ["aten.tensor_split.sections", v("n0"), 4], ["getitem", v("n1"), 0]],
    ),
]
"""Graphs whose values are larger than their inputs account for, or which have too many, and nearly the same."""


@pytest.mark.parametrize("number", range(len(LARGE)))
def test_values_that_inputs_do_not_account_for_are_refused_before_they_are_made(number, monkeypatch):
    large, small = LARGE[number]
    for trusted in (False, True):
        with pytest.raises((TooLargeError, ValueError, StoreError)):
            ran(*large, trusted=trusted)
    assert small is None or ran(*small)


NUMBERS = [
    (["pow", 10, 10**9], ["pow", 10, 9]),
    (["pow", 2, 64], ["pow", 2, 62]),
    (["mul", [0], 1 << 40], ["mul", 3, 1 << 40]),
    (["mul", "a", 1 << 40], ["mul", 2.5, 2]),
    (["mod", "%099999999d", 1], ["mod", 7, 4]),
    (["add", v("r0"), 1], ["add", 2, 1]),
    (["getitem", v("r0"), 0], ["neg", 3]),
    (["max", [1, 2], [3]], ["max", 1, 2]),
    (["int", "1" * 900], ["int", 1.5]),
    (["int", {"float": "inf"}], ["float", 1]),
    (["floordiv", 1, 0], ["floordiv", 1, 2]),
    (["sum", [[1], [2]]], ["sum", [1, 2]]),
]


@pytest.mark.parametrize(("wrong", "right"), NUMBERS, ids=lambda call: str(call)[:40])
def test_operations_on_numbers_take_numbers_that_fit(wrong, right):
    with pytest.raises((*REFUSED, ArithmeticError)):
        ran(wrong, ["aten.relu.default", v("r0")])
    assert ran(right, ["aten.relu.default", v("r0")])


ARGUMENTS = [
    (["aten.cumprod.default", v("r0"), 0, {"dtype": -2}], ["aten.cumprod.default", v("r0"), 0, {"dtype": None}]),
    (["aten.zeros.default", [3], {"layout": 7}], ["aten.zeros.default", [3], {"layout": {"layout": "strided"}}]),
    (
        ["aten.zeros.default", [3], {"dtype": {"dtype": "quint4x2"}}],
        ["aten.zeros.default", [3], {"dtype": {"dtype": "int8"}}],
    ),
    (["aten.zeros.default", [3], {"device": "cuda"}], ["aten.zeros.default", [3], {"device": {"device": "cuda:7"}}]),
    (["aten.zeros.default", [3], {"layout": {"layout": "sparse_coo"}}], ["aten.zeros.default", [3]]),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "right"), ARGUMENTS, ids=str)
def test_things_of_torch_have_names(wrong, right):
    """PyTorch takes any number for a dtype: -2 hangs."""
    with pytest.raises(StoreError, match="not a captured graph"):
        bounded(wrong)
    assert ran(right)


def of(target, *numbers, **changed):
    """A call of `hostile.SEVERAL`, on zeros that the graph makes, with other arguments at some places."""
    call = [part if isinstance(part, list) else [part] for part in hostile.SEVERAL[target]]
    nodes, args = [], []
    for place, parts in enumerate(call):
        made = []
        for part in parts:
            if isinstance(part, dict):
                nodes.append(["aten.zeros.default", changed.get(f"_{place}", part["tensor"][0])])
                part = v(f"n{len(nodes) - 1}")
            made.append(part)
        args.append(made if isinstance(hostile.SEVERAL[target][place], list) else made[0])
    for place, number in zip(numbers[::2], numbers[1::2], strict=True):
        args[place] = number
    return [*nodes, [target, *args], ["aten.relu.default", v("r0")]]


UNCHECKED = [
    (of("aten.batch_norm.default", 5, True), of("aten.batch_norm.default", 3, None, 4, None, 5, True)),
    (of("aten.instance_norm.default", 5, True), of("aten.instance_norm.default", 3, None, 4, None, 5, True)),
    (of("aten._weight_norm.default", _1=[1, 1, 1]), of("aten._weight_norm.default", _0=[1, 3, 2], _1=[1, 1, 1])),
    (of("aten._weight_norm.default", _1=[4, 3, 1]), of("aten._weight_norm.default", 2, -1, _1=[1])),
    (of("aten._weight_norm.default", 2, 3), of("aten._weight_norm.default", 2, 2, _1=[1, 1, 2])),
    (of("aten._weight_norm.default", _0=[0, 3, 2], _1=[0, 1, 1]), of("aten._weight_norm.default")),
    (of("aten.lstm.input", _0=[2, 5, 9]), of("aten.lstm.input", _0=[2, 9, 3])),
    (of("aten.lstm.input", _1=[1, 2, 64]), of("aten.lstm.input")),
    (of("aten.lstm.input", _2=[16]), of("aten.lstm.input", 4, 1)),
    (of("aten.lstm.input", 4, 2), of("aten.lstm.input", 5, 0.5)),
    (of("aten.lstm.input", 7, True), of("aten.lstm.input", 7, False)),
    (of("aten.lstm.input", 3, False), of("aten.lstm.input", 3, True)),
    (of("aten.lstm.input", 8, False), of("aten.lstm.input", 8, False, _0=[5, 2, 3])),
    (of("aten.gru.input", _1=[1, 2, 64]), of("aten.gru.input")),
    (of("aten.col2im.default", 4, [0, 1 << 33]), of("aten.col2im.default", 4, [1, 1], _0=[1, 8, 25])),
    (of("aten.im2col.default", 2, [1 << 62, 1]), of("aten.im2col.default", 2, [2, 2])),
    (of("aten.conv1d.default", 5, [1 << 62]), of("aten.conv1d.default", 5, [2])),
    (of("aten.max_pool2d.default", 4, [1 << 62, 1]), of("aten.max_pool2d.default", 4, [2, 2])),
    ([["aten.pad.default", v("r0"), [1 << 62, -(1 << 62)]]], [["aten.pad.default", v("r0"), [1, -1]]]),
]
"""Arguments that PyTorch does not check before it reads, writes or loops by them, and nearly the same."""


@pytest.mark.parametrize("number", range(len(UNCHECKED)))
def test_arguments_that_torch_does_not_check_are_refused(number):
    wrong, right = UNCHECKED[number]
    for trusted in (False, True):
        with pytest.raises(ValueError, match="does not take such arguments"):
            ran(*wrong, trusted=trusted)
    assert ran(*right)


RECURRENT = [
    (torch.nn.LSTM, {}), (torch.nn.LSTM, {"proj_size": 2}), (torch.nn.LSTM, {"bias": False}),
    (torch.nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 2, "batch_first": True}),
    (torch.nn.GRU, {}), (torch.nn.GRU, {"num_layers": 2, "bidirectional": True}), (torch.nn.GRU, {"bias": False}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
def test_weights_of_recurrent_networks_are_those_that_torch_makes(kind, options):
    """Each left out, given twice, of another shape or another dtype is refused; so are states of other shapes."""
    network, rows = kind(3, 4, **options), 5
    count, batch_first = network.num_layers * (1 + network.bidirectional), network.batch_first
    states = [torch.zeros(count, rows, network.proj_size or 4), torch.zeros(count, rows, 4)]
    bound = {
        "input": torch.zeros(*((rows, 7) if batch_first else (7, rows)), 3),
        "hx": states if kind is torch.nn.LSTM else states[0], "params": list(network._flat_weights),
        "has_biases": network.bias, "num_layers": network.num_layers, "bidirectional": network.bidirectional,
        "batch_first": batch_first,
    }  # fmt: skip
    target = f"aten.{kind.__name__.lower()}.input"
    require_arguments(target, "product", bound)
    params = bound["params"]
    for place, weight in enumerate(params):
        for others in ([], [weight, weight], [weight[1:]], [weight.double()]):
            with pytest.raises(ValueError, match="weights"):
                require_arguments(target, "product", {**bound, "params": params[:place] + others + params[place + 1 :]})
    for name, other in (("input", bound["input"][0]), ("num_layers", 0), ("batch_first", not batch_first)):
        with pytest.raises(ValueError, match="weights"):
            require_arguments(target, "product", {**bound, name: other})


def test_a_division_that_ends_the_process_is_refused():
    """The least integer divided by -1: SIGFPE."""
    least = ["aten.full.default", [1], -(1 << 63), {"dtype": {"dtype": "int64"}}]
    with pytest.raises(ValueError, match="truncates"):
        ran(least, ["aten.div.Tensor_mode", v("n0"), -1, {"rounding_mode": "trunc"}])
    assert ran(least, ["aten.div.Tensor_mode", v("n0"), -1, {"rounding_mode": "floor"}])
    assert ran(["aten.div.Tensor_mode", v("r0"), -1, {"rounding_mode": "trunc"}])


@pytest.mark.parametrize("view", ["aten.view.default", "aten.reshape.default", "aten.expand.default"])
def test_operations_write_to_values_of_the_kernel_alone(view):
    x, before = X.clone(), W.clone()
    write = ["aten.add_.Tensor", v("n0"), 1]
    with pytest.raises(ValueError, match="writes to an input of the graph"):
        ran([view, v("w0"), [3, 3]], write)
    with torch.inference_mode():
        (found,) = bounded([view, v("r0"), [1, 3]], write)([x, before], allowance())
    assert torch.equal(found, X + 1) and torch.equal(x, X), "what the kernel reads is copied first"
    (found,) = ran(["aten.neg.default", v("r0")], write, ["aten.add.Tensor", v("n0"), 1])
    assert torch.equal(found, 2 - X), "and the value of the kernel has changed"


def test_a_result_in_the_memory_of_a_weight_is_copied():
    """The slot of the weight is read into again before the result is used."""
    graph, weight = (
        bounded(["aten.slice.Tensor", v("w0"), 0, 0, 1], ["aten.neg.default", v("r0")], outputs=["n0", "n1"]),
        W.clone(),
    )
    for _ in range(2):
        with torch.inference_mode():
            found, _ = graph([X, weight], allowance())
        weight.zero_()
        assert found.sum() in (0, 1) and found.untyped_storage()._cdata != weight.untyped_storage()._cdata
        weight.copy_(W)


def test_memory_that_is_not_set_is_zero():
    (found,) = ran(["aten.empty.memory_format", [1000], {"dtype": {"dtype": "int64"}}])
    assert not found.any()


MIB, PLACES, WEIGHTS = 1 << 20, 2000, 10**9
LIMITS = [
    # bytes read and bytes of weights; of a pass, or of one before there are inputs: limit, and whether it is a claim
    ((10, 10), (32 * MIB, False), (32 * MIB, False)),
    ((MIB // 4, MIB // 4), (64 * MIB, False), (64 * MIB, False)),
    ((MIB, 0), (128 * MIB, False), (128 * MIB, False)),
    ((2 * MIB, 0), (256 * MIB, False), (128 * MIB, True)),
    ((2 * MIB, MIB), (320 * MIB, False), (256 * MIB, True)),
    ((0, 3 * MIB), (320 * MIB, False), (320 * MIB, False)),
]


@pytest.mark.parametrize(("sizes", "limit", "claimed"), LIMITS)
def test_a_graph_may_take_what_its_inputs_its_weights_and_the_plan_account_for(sizes, limit, claimed):
    for is_warm_up, wanted in ((False, limit), (True, claimed)):
        made = Allowance(PLACES, 2 * MIB, (WEIGHTS, 4 * MIB), 10 * MIB, is_warm_up=is_warm_up)
        assert made.limit_of(*sizes) == wanted


def spent(work, made_bytes, *args, **options):
    """Whether a pass may take so much, and no more."""
    for more in ((0, 0), (1, 0), (0, 1)):
        allowance = Allowance(*args, **{"is_warm_up": False, **options})
        try:
            allowance.spend(work + more[0], made_bytes + more[1])
        except TooLargeError as error:
            assert more != (0, 0) and str(error).startswith("more time" if more[0] else "more memory")
        else:
            assert more == (0, 0)


def test_a_pass_may_take_what_its_inputs_and_weights_account_for():
    weights = WEIGHTS, 4 * MIB
    spent(8 * PLACES * WEIGHTS, 128 * 6 * MIB, PLACES, 2 * MIB, weights, 0)
    spent(8 * 1024 * WEIGHTS, 128 * 5 * MIB, PLACES, 2 * MIB, weights, 0, is_warm_up=True)
    spent(8 * 1000 * WEIGHTS, 128 * 4 * MIB + 128, 1000, 1, weights, 0, is_warm_up=True)
    spent(1 << 36, 32 * MIB, 1, 1, (1, 1), 0)


def pieces(count):
    return ran(["aten.zeros.default", [count]], ["aten.unbind.int", v("n0")], ["getitem", v("n1"), -1])


def axes(count):
    return ran(["aten.zeros.default", [1] * count])


@pytest.mark.parametrize(("make", "most"), [(pieces, 1024), (axes, 16)])
def test_results_have_at_most_so_many_pieces_and_axes(make, most):
    assert make(most)
    with pytest.raises(TooLargeError, match=f" {most}"):
        make(most + 1)


def test_signatures_of_inputs_are_remembered_up_to_a_number(monkeypatch):
    monkeypatch.setattr(torch_limits, "_MOST_SIGNATURES", 3)
    graph = bounded(["aten.relu.default", v("r0")])
    with torch.inference_mode():
        for rows, known in ((1, 1), (2, 2), (2, 2), (3, 3), (4, 1), (5, 2)):
            graph([torch.zeros(rows, 3), W], allowance())
            assert len(graph._known) == known


def test_work_counts_at_every_run():
    graph, product = bounded(["aten.matmul.default", v("r0"), v("w0")]), allowance()
    with torch.inference_mode():
        graph([X, W], product)
        left = product._work
        graph([X, W], product)
        assert product._work < left
        product.spend(product._work - 1)
        with pytest.raises(TooLargeError, match="more time than a pass"):
            graph([X, W], product)


@pytest.mark.parametrize(
    "calls",
    [
        [["aten.zeros.default", [1000, 1000]], *[["aten.matmul.default", v(f"n{i}"), v("n0")] for i in range(40)]],
        [["aten.zeros.default", [1, 64, 200, 200]], ["aten.zeros.default", [64, 64, 9, 9]],
         *[["aten.conv2d.default", v("n0"), v("n1"), None, [1, 1], [4, 4]] for _ in range(4)]],
        [["aten.zeros.default", [1 << 20]], *[["aten.sort.default", v("n0")] for _ in range(90)]],
        [["aten.zeros.default", [1 << 16]], ["aten.neg.default", v("n0")], ["aten.diff.default", v("n0"), 1 << 16]],
        [["aten.zeros.default", [10, 10, 10]],
         ["aten.neg.default", v("n0")], ["aten.einsum.default", "abc,def,ghi->", [v("n0"), v("n0"), v("n0")]]],
        [["aten.zeros.default", [1 << 16, 1], INT64], ["aten.zeros.default", [1, 1 << 16], INT64],
         ["aten.zeros.default", [1, 1]], ["aten.index_put.default", v("n2"), [v("n0"), v("n1")], v("n2")]],
        [["aten.zeros.default", [1000, 1000]], ["aten.linalg_norm.default", v("n0"), 2]],
    ],
    ids=["products", "convolutions", "sorting", "differences", "einsum", "broadcast indices", "singular values"],
)  # fmt: skip
def test_work_that_would_take_long_is_refused(calls):
    with pytest.raises(TooLargeError):
        ran(*calls, work=LEAST_WORK - (1 << 34))
    assert ran(*[call for call in calls[:2] if "norm" not in call[0]], ["aten.relu.default", v("r0")])


def test_the_first_run_checks_and_the_next_ones_do_not(monkeypatch):
    graph = bounded(["aten.relu.default", v("r0")])
    with torch.inference_mode():
        graph([X, W], allowance())
        monkeypatch.setattr(graph, "_checked", None)
        assert torch.equal(graph([X, W], allowance())[0], X.relu())
        with pytest.raises(TypeError):  # another shape is checked again
            graph([torch.zeros(2, 3), W], allowance())


def test_sizes_that_depend_on_data_are_checked_at_each_run(monkeypatch):
    graph = bounded(["aten.gt.Scalar", v("r0"), 0], ["aten.index.Tensor", v("r0"), [v("n0")]])
    with torch.inference_mode():
        assert torch.equal(graph([X, W], allowance())[0], X[X > 0])
        assert len(graph([-X, W], allowance())[0]) == 1
        assert not graph._known


@pytest.mark.parametrize("times", [1, 2])
def test_the_most_that_a_graph_takes_at_once_is_noted(times):
    """A copy and two sums of it live at once; the copy ends before the third sum is made."""
    calls = [("aten.clone.default", v("r0")), *[("aten.add.Tensor", v("n0"), 1)] * 2]
    calls.append(("aten.add.Tensor", v("n1"), v("n2")))
    graph, noted = bounded(*calls), []
    for _ in range(times):
        made = allowance()
        with torch.inference_mode():
            graph([X, W.clone()], made)
        noted.append(made.most_bytes)
    assert noted == [3 * X.nbytes] * times


def test_copies_that_operations_write_to_are_among_what_a_graph_takes():
    """The copy lives from the start, beside a value and its sum with itself, though it is written to at the end."""
    calls = [
        ("aten.neg.default", v("r0")),
        ("aten.add.Tensor", v("n0"), v("n0")),
        ("aten.add_.Tensor", v("r0"), v("n1")),
    ]
    made = allowance()
    with torch.inference_mode():
        (found,) = bounded(*calls)([X, W.clone()], made)
    assert torch.equal(found, -X) and made.most_bytes == 3 * X.nbytes


def test_bytes_that_depend_on_data_are_not_known(monkeypatch):
    monkeypatch.setattr(torch_limits, "depends_on_data", lambda *_: True)
    made = allowance()
    with torch.inference_mode():
        bounded(("aten.clone.default", v("r0")))([X, W.clone()], made)
    assert made.most_bytes == float("inf")


def test_entries_have_reasons_and_name_things_as_they_are_checked():
    kinds = {"ScalarType": "dtype", "MemoryFormat": "memory_format", "Layout": "layout", "Device": "device"}
    for target, operation in OPERATIONS.items():
        assert operation.kind in KINDS, target
        assert not set(target.split(".")[1].split("_")) & {"unsafe", "sparse", "strided", "resize", "save", "file"}, (
            target
        )
        for each in CapturedGraph._operation(target)._schema.arguments:
            kind = str(each.real_type).removeprefix("Optional[").rstrip("]")
            assert kinds.get(kind, each.name) == each.name, target
            assert each.alias_info is None or not each.alias_info.is_write or each.name == "self", target


SEVERAL = ("chunk", "meshgrid", "split", "topk", "unbind")


def test_calls_of_models_run():
    """Each recorded call, on other data: the bound of its result holds."""
    for target, calls in hostile.CALLS.items():
        for call in calls:
            caller, is_number = hostile.Caller(0), OPERATIONS[target].kind == "number"
            args, kwargs = map(caller.recorded, call)
            copy = ["n0", "aten.clone.default", args[:1], {}]
            writes = CapturedGraph._operation(target)._schema.is_mutable
            nodes = [copy, ["n1", target, [v("n0"), *args[1:]], kwargs]] if writes else [["n1", target, args, kwargs]]
            returns = CapturedGraph._operation(target)._schema.returns
            if len(returns) > 1 or any(part in target for part in SEVERAL):
                nodes.append(["n2", "getitem", [v("n1"), 0], {}])
            inputs = {"r": len(caller.inputs), "w": 0, "c": 0}
            tree = {"inputs": inputs, "nodes": nodes, "outputs": [] if is_number else [nodes[-1][0]]}
            graph = BoundedGraph(CapturedGraph(json.dumps(tree).encode(), target), [])
            with torch.inference_mode():
                graph(caller.inputs, allowance())


@pytest.mark.parametrize("count", [pytest.param(300, id="sample"), pytest.param(20_000, id="many")])
def test_no_hostile_call_ends_or_hangs_the_process(count):
    command = [sys.executable, "-W", "ignore", "-m", "tests.backends.hostile", "0", str(count)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    seeds = [line for line in found.stderr.splitlines() if line.isdigit()]
    assert found.returncode == 0, f"seed {seeds[-1:]}: {found.stderr[-2000:]}"
    said = json.loads(found.stdout.splitlines()[-1])
    assert said["growth_bytes"] < hostile.MOST_GROWTH_BYTES
    assert said["ends"]["ran"] > count / 4 and said["ends"]["too large"], "it tries what runs and what must not"


def spoilt(tmp_path, monkeypatch, **kernels):
    monkeypatch.setattr(captured, "TORCH", {**captured.TORCH, **kernels})
    return Store(captured.write_captured(tmp_path / "store"))


def passed(store, rows=2, **options):
    """Run the program of `tests.backends.captured` on ones."""
    backend = TorchBackend(store, 1, **options)
    x = np.ones((rows, captured.PLACES, captured.HIDDEN), np.float32)
    state = backend.begin({"x": x}, None, (rows, 1))
    from tests.backends.driver import run

    run(backend, state, backend.program.stages)
    return backend.logits(state)


def layer(*calls, outputs):
    nodes = [*captured.TORCH["layer"]["nodes"], *([f"m{i}", *rest] for i, (_, *rest) in enumerate(nodes_of(*calls)))]
    return {"inputs": {"r": 1, "w": 1, "c": 1}, "nodes": nodes, "outputs": outputs}


def test_a_store_whose_kernel_takes_much_is_refused_and_its_twin_runs(tmp_path, monkeypatch):
    large, small = (layer(["aten.zeros.default", [size]], outputs=["n1"]) for size in (1 << 40, 1 << 4))
    with spoilt(tmp_path / "a", monkeypatch, layer=large) as store:
        for trusted in (False, True):
            with pytest.raises(
                StoreError, match=r"graph 'layer' takes values of .* MiB, and may take 32\.0 MiB - .*--batch 1"
            ):
                passed(store, trust_kernels=trusted)
            with pytest.raises(StoreError, match="graph 'layer' takes values"):
                TorchBackend(store, 1, trust_kernels=trusted).warm_up(1, 8)
    with spoilt(tmp_path / "b", monkeypatch, layer=small) as store:
        assert passed(store).shape == (2, 2)


def test_a_result_without_a_row_for_each_input_is_refused(tmp_path, monkeypatch):
    flat = layer(["aten.slice.Tensor", v("n1"), 0, 0, 1], outputs=["m0"])
    with spoilt(tmp_path / "a", monkeypatch, layer=flat) as store:
        with pytest.raises(StoreError, match=r"kernel 'layer' gives \(1, 3, 4\) for 2 rows"):
            passed(store)
        assert passed(store, rows=1).shape == (1, 2)


def test_an_unlisted_operation_runs_in_a_store_that_is_trusted(tmp_path, monkeypatch):
    odd = layer(["aten.nonzero.default", v("n1")], outputs=["n1"])
    with spoilt(tmp_path / "a", monkeypatch, layer=odd) as store:
        with pytest.raises(StoreError, match=r"operation aten\.nonzero\.default is none of those"):
            passed(store)
        assert passed(store, trust_kernels=True).shape == (2, 2)
