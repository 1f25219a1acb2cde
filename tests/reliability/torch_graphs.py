"""Hostile captured graphs for PyTorch: `graphs/KERNEL.json` of a store with operations that no honest graph has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .attacks import FREE, Attack, changed, drawn, mutations
from .sealed import RAW, Sealed, plain_json
from .verbs import TORCH_VERBS

VALUE, LAST = {"v": "r0"}, {"v": "@last"}
"""Hidden states that the kernel reads, and its first output."""
Nodes = list[list[Any]]
Directed = tuple[str, Nodes | Callable[[], Nodes], bool]
"""Name, nodes or what makes them, and whether the last one takes the place of the first output."""


def attacks(honest: Path, number: int) -> Iterator[Attack]:
    """Yield the directed graphs, so many drawn from all operations of PyTorch, and so many edits of single keys."""
    for name, nodes, is_live in DIRECTED:
        for base in ("captured", "arrays"):
            yield Attack("torch graph", name, base, _added(nodes, is_live), verbs=TORCH_VERBS)
    for name, nodes, is_live in LEGAL:
        for base in ("captured", "arrays"):
            yield Attack("torch graph", name, base, _added(nodes, is_live), verbs=TORCH_VERBS, is_legal=True)
    for name, node in drawn(_every_operation(), number, "operations"):
        yield Attack("torch operation", name, "captured", _added([node], False), verbs=("run-torch",))
    for name, make in drawn(_edits(honest), number // 2, "torch keys"):
        yield Attack("torch graph key", name, "captured", make, verbs=TORCH_VERBS, answers=FREE)


def graph_of(sealed: Sealed) -> str:
    """Return the name of the kernel that is called second: it reads hidden states."""
    return list(sealed.steps())[1]["kernel"]


def _added(given: Nodes | Callable[[], Nodes], is_live: bool) -> Callable[[Path], None]:
    """Return the edit that adds nodes to a graph; live ones take the place of its first output."""

    def make(place: Path) -> None:
        with Sealed(place / "store") as sealed:
            file = f"graphs/{graph_of(sealed)}.json"
            tree = json.loads(sealed.read(file))
            nodes = given() if callable(given) else given
            text = json.dumps(nodes).replace('"@last"', json.dumps(tree["outputs"][0]))
            tree["nodes"] += json.loads(text)
            if is_live:
                tree["outputs"][0] = nodes[-1][0]
            sealed.write(file, plain_json(tree))

    return make


def _edits(honest: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    store = honest / "captured/store"
    for file in sorted((store / "graphs").glob("*.json")):
        for name, path, value in mutations(json.loads(file.read_bytes())):

            def make(place: Path, file: str = f"graphs/{file.name}", path: Any = path, value: Any = value) -> None:
                with Sealed(place / "store") as sealed:
                    sealed.write(file, plain_json(changed(json.loads(sealed.read(file)), path, value)))

            yield f"{file.stem[-4:]}/{name}", make


def _calls(*names: str, args: list[Any], name: str = "x", **kwargs: Any) -> Iterator[tuple[str, Nodes, bool]]:
    for target in names:
        yield f"{target} {json.dumps(args)[:60]}", [[name, target, args, kwargs]], False


def _live(target: str, *args: Any, **kwargs: Any) -> tuple[str, Nodes, bool]:
    return f"{target} {json.dumps(args)[:60]} live", [["x", target, list(args), kwargs]], True


def _filled(tree: Any, before: Any) -> Any:
    """Return the arguments with `before` in place of each `@`."""
    if isinstance(tree, list):
        return [_filled(each, before) for each in tree]
    return before if tree == "@" else tree


def _chain(target: str, count: int, *args: Any) -> Directed:
    """Return so many nodes, each of which takes the one before as `@`; they are made when they are asked for."""

    def make() -> Nodes:
        nodes: Nodes = []
        for index in range(count):
            before = {"v": f"x{index - 1}"} if index else VALUE
            nodes.append([f"x{index}", target, _filled(list(args), before), {}])
        return nodes

    return f"{count} x {target}", make, False


_PART_OF_WEIGHT: Nodes = [
    ["f", "aten.view.default", [{"v": "w0"}, [-1]], {}],
    ["w", "aten.slice.Tensor", [{"v": "f"}, 0, 0, 8], {}],
]


def _statistics(kind: str, is_training: bool) -> tuple[str, Nodes, bool]:
    """Return a normalisation whose running statistics are a weight: in training it writes to them."""
    weight = {"v": "w"}
    nodes: Nodes = [
        *_PART_OF_WEIGHT,
        ["x", "aten.expand.default", [weight, [2, -1]], {}],
        ["y", "aten.unsqueeze.default", [{"v": "x"}, -1], {}],
        ["z", f"aten.{kind}.default", [{"v": "y"}, None, None, weight, weight, is_training, 0.5, 1e-5, False], {}],
    ]
    return f"{kind} {is_training}", nodes, False


def _lengths(weight: list[int], lengths: list[int]) -> tuple[str, Nodes, bool]:
    nodes: Nodes = [
        ["x", "aten.ones.default", [weight], {}],
        ["y", "aten.ones.default", [lengths], {}],
        ["z", "aten._weight_norm.default", [{"v": "x"}, {"v": "y"}, 0], {}],
    ]
    return f"_weight_norm {weight} {lengths}", nodes, False


def _recurrent(kind: str, hidden: int, weight: Any) -> tuple[str, Nodes, bool]:
    """Return a recurrent network of this width whose weights are all one value, or of the right shapes."""
    gates = (4 if kind == "lstm" else 3) * hidden
    sizes = [[gates, 8], [gates, hidden], [gates], [gates]]
    made: Nodes = [[f"p{i}", "aten.zeros.default", [size], {}] for i, size in enumerate(sizes)]
    state = {"v": "h"}
    states, params = [state, state] if kind == "lstm" else state, [weight or {"v": f"p{i}"} for i in range(4)]
    nodes: Nodes = [
        *(_PART_OF_WEIGHT if weight else made),
        ["x", "aten.zeros.default", [[1, 3, 8]], {}],
        ["h", "aten.zeros.default", [[1, 1, hidden]], {}],
        ["y", f"aten.{kind}.input", [{"v": "x"}, states, params, True, 1, 0.0, False, False, True], {}],
    ]
    return f"{kind} {hidden}", nodes, False


def _differences(size: int, number: int) -> tuple[str, Nodes, bool]:
    nodes: Nodes = [
        ["x", "aten.arange.default", [size], {}],
        ["y", "aten.diff.default", [{"v": "x"}, number], {}],
    ]
    return f"diff {size} {number}", nodes, False


def _windows(kind: str, shape: list[int], *args: Any) -> tuple[str, Nodes, bool]:
    nodes: Nodes = [
        ["x", "aten.zeros.default", [shape], {}],
        ["y", f"aten.{kind}.default", [{"v": "x"}, *args], {}],
    ]
    return f"{kind} {json.dumps(args)}", nodes, False


HUGE = 2**35
DIRECTED: list[Directed] = [
    _live("aten._reshape_alias.default", LAST, [4096, 4096], [4096, 1]),
    _live("aten._reshape_alias.default", LAST, [2, 16], [1, 1]),
    _live("aten.as_strided.default", LAST, [1 << 20, 16], [1 << 20, 1]),
    _live("aten.as_strided.default", LAST, [2, 16], [0, 0], 1 << 40),
    _live("aten.as_strided_.default", LAST, [1, 16], [0, 1]),
    _live("aten.set_.source_Tensor", LAST, VALUE),
    _live("aten.resize_.default", LAST, [1 << 33]),
    _live("aten.resize_.default", LAST, [1]),
    _live("aten._resize_output_.default", LAST, [1 << 33], {"device": "cpu"}),
    _live("aten.mul_.Tensor", LAST, 1.0),
    _live("aten.detach.default", LAST),
    *(item for target in ("aten.mul_.Tensor", "aten.add_.Tensor") for item in _calls(target, args=[VALUE, 3.0])),
    *_calls("aten.mul_.Tensor", args=[{"v": "w0"}, 0.0]),
    *_calls("aten.copy_.default", args=[{"v": "w0"}, VALUE]),
    *_calls("aten.zero_.default", args=[{"v": "w0"}]),
    *_calls("aten.relu_.default", args=[{"v": "w1"}]),
    *_calls("aten.fill_.Scalar", args=[VALUE, 0.0]),
    *_calls("aten.squeeze_.default", args=[VALUE]),
    (
        "a view written in place",
        [["x", "aten.view.default", [VALUE, [-1]], {}], ["y", "aten.mul_.Tensor", [{"v": "x"}, 0.0], {}]],
        False,
    ),
    (
        "a transposed weight written in place",
        [["x", "aten.t.default", [{"v": "w0"}], {}], ["y", "aten.zero_.default", [{"v": "x"}], {}]],
        False,
    ),
    ("an out= of an input", [["x", "aten.add.out", [VALUE, VALUE], {"out": VALUE}]], False),
    ("an out= of a weight", [["x", "aten.mul.out", [{"v": "w0"}, {"v": "w0"}], {"out": {"v": "w0"}}]], False),
    (
        "sparse, unsafe",
        [
            ["i", "aten.arange.default", [3], {}],
            ["x", "aten._sparse_csr_tensor_unsafe.default", [{"v": "i"}, {"v": "i"}, VALUE, [9, 9]], {}],
            ["y", "aten.to_dense.default", [{"v": "x"}], {}],
        ],
        False,
    ),
    *_calls("aten.save.default", "aten.from_file.default", args=["../canary/secret.bin", True, 64]),
    *_calls("aten._print.default", "aten._assert_async.msg", "aten._assert_scalar.default", args=[VALUE, "x"]),
    *_calls(
        "aten.empty.memory_format",
        "aten.zeros.default",
        "aten.ones.default",
        "aten.rand.default",
        "aten.empty_permuted.default",
        args=[[HUGE]],
    ),
    *_calls("aten.zeros.default", "aten.ones.default", "aten.rand.default", "aten.randn.default", args=[[1 << 28]]),
    *_calls("aten.full.default", args=[[1 << 28], 1.0]),
    *_calls("aten.full.default", args=[[HUGE], 1]),
    *_calls("aten.arange.default", args=[1 << 28]),
    *_calls("aten.arange.default", args=[RAW + "1e18"]),
    *_calls("aten.eye.default", args=[1 << 15]),
    *_calls("aten.linspace.default", args=[0, 1, 1 << 28]),
    *_calls("aten.randperm.default", args=[1 << 28]),
    *_calls("aten.tril_indices.default", args=[1 << 14, 1 << 14]),
    *_calls("aten.hann_window.default", "aten.blackman_window.default", args=[1 << 28]),
    *_calls("aten.new_zeros.default", "aten.new_ones.default", "aten.new_empty.default", args=[VALUE, [1 << 28]]),
    *_calls("aten.repeat.default", args=[VALUE, [1 << 12, 1 << 12, 1]]),
    *_calls("aten.tile.default", args=[VALUE, [1 << 22, 1]]),
    (
        "expand and clone",
        [
            ["x", "aten.sum.default", [VALUE], {}],
            ["y", "aten.expand.default", [{"v": "x"}, [1 << 29]], {}],
            ["z", "aten.clone.default", [{"v": "y"}], {}],
        ],
        False,
    ),
    (
        "expand and multiply",
        [
            ["x", "aten.sum.default", [VALUE], {}],
            ["y", "aten.expand.default", [{"v": "x"}, [20000, 20000]], {}],
            ["z", "aten.mm.default", [{"v": "y"}, {"v": "y"}], {}],
        ],
        False,
    ),
    (
        "outer product",
        [
            ["x", "aten.arange.default", [1 << 15], {}],
            ["y", "aten.unsqueeze.default", [{"v": "x"}, 1], {}],
            ["z", "aten.mul.Tensor", [{"v": "x"}, {"v": "y"}], {}],
        ],
        False,
    ),
    (
        "cartesian product",
        [["x", "aten.arange.default", [2000], {}], ["y", "aten.cartesian_prod.default", [[{"v": "x"}] * 3], {}]],
        False,
    ),
    *_calls("aten.combinations.default", args=[{"v": "w1"}, 8]),
    *_calls("aten.constant_pad_nd.default", args=[VALUE, [1 << 28, 0]]),
    *_calls("aten.pad.default", args=[VALUE, [0, 1 << 26], "constant"]),
    *_calls("aten.one_hot.default", args=[{"v": "n1"}, 1 << 28]),
    *_calls("aten.upsample_nearest1d.default", args=[VALUE, [1 << 26]]),
    *_calls("aten.upsample_linear1d.default", args=[VALUE, [1 << 26], False]),
    *_calls("aten.adaptive_avg_pool1d.default", "aten.adaptive_max_pool1d.default", args=[VALUE, [1 << 26]]),
    *_calls("aten.repeat_interleave.self_int", args=[VALUE, 1 << 22]),
    *_calls("aten.nonzero.default", "aten.unique_dim.default", args=[VALUE]),
    *_calls("aten.masked_select.default", args=[VALUE, VALUE]),
    *_calls("aten.item.default", args=[VALUE]),
    *_calls("aten.histc.default", args=[VALUE, 1 << 28]),
    *_calls("aten.bincount.default", args=[VALUE, None, 1 << 28]),
    *_calls("aten.fft_fft.default", args=[VALUE, 1 << 27]),
    *_calls("aten.fft_rfft.default", args=[VALUE, 1 << 27]),
    *_calls("aten.bernoulli.default", "aten.normal_.default", "aten.random_.default", args=[VALUE]),
    *_calls("aten.dropout.default", args=[VALUE, 0.5, True]),
    *_calls("aten.rrelu.default", args=[VALUE, 0.1, 0.3, True]),
    *_calls("aten._unsafe_index.Tensor", args=[VALUE, [None, {"v": "n1"}]]),
    *_calls("aten._index_put_impl_.default", args=[VALUE, [VALUE], VALUE, False, True]),
    _statistics("batch_norm", True),
    _statistics("instance_norm", True),
    _lengths([1 << 20, 2], [1, 1]),
    _lengths([0, 2], [0, 1]),
    _recurrent("lstm", 512, {"v": "w"}),
    _recurrent("gru", 512, {"v": "w"}),
    _differences(1 << 18, 1 << 18),
    _windows("col2im", [1, 1, 8], [2, 4], [1, 1], [1, 1], [0, 1 << 33], [1, 1]),
    _windows("im2col", [1, 1, 4, 4], [2, 2], [1 << 62, 1], [0, 0], [1, 1]),
    _windows("max_pool2d", [1, 1, 9, 9], [5, 5], [1, 1], [0, 0], [1 << 62, 1 << 62]),
    *_calls("aten.embedding.default", args=[{"v": "w0"}, VALUE]),
    *_calls("aten.embedding_renorm_.default", args=[{"v": "w0"}, {"v": "w0"}, 1.0, 2.0]),
    *_calls("aten.gather.default", args=[VALUE, 0, VALUE]),
    *_calls("aten.take.default", args=[VALUE, VALUE]),
    (
        "index far outside",
        [
            ["i", "aten.full.default", [[4], 1 << 40], {"dtype": {"dtype": "int64"}}],
            ["x", "aten.index_select.default", [VALUE, 0, {"v": "i"}], {}],
        ],
        False,
    ),
    (
        "gather far outside",
        [
            ["i", "aten.full.default", [[1, 1, 1], 1 << 40], {"dtype": {"dtype": "int64"}}],
            ["x", "aten.gather.default", [VALUE, 0, {"v": "i"}], {}],
        ],
        False,
    ),
    (
        "embedding far outside",
        [
            ["i", "aten.full.default", [[4], 1 << 40], {"dtype": {"dtype": "int64"}}],
            ["x", "aten.embedding.default", [{"v": "w0"}, {"v": "i"}], {}],
        ],
        False,
    ),
    (
        "bag far outside",
        [
            ["i", "aten.full.default", [[4], 1 << 40], {"dtype": {"dtype": "int64"}}],
            ["x", "aten.embedding_bag.default", [{"v": "w0"}, {"v": "i"}, {"v": "i"}], {}],
        ],
        False,
    ),
    *_calls("aten.max_unpool2d.default", args=[VALUE, VALUE, [1 << 20, 1 << 20]]),
    *_calls("aten.conv1d.default", args=[VALUE, VALUE, None, [1], [1 << 26]]),
    *_calls("aten.conv_transpose1d.default", args=[VALUE, VALUE, None, [1 << 24], [0]]),
    *_calls("aten.unfold.default", args=[VALUE, 1, 1, 0]),
    *_calls("aten.im2col.default", args=[VALUE, [1, 1], [1, 1], [1 << 20, 1 << 20], [1, 1]]),
    *_calls("aten.linalg_svd.default", "aten.linalg_eig.default", "aten.linalg_matrix_exp.default", args=[VALUE]),
    *_calls("aten.matrix_power.default", args=[VALUE, 1 << 40]),
    *_calls("aten.to.device", args=[VALUE, {"device": "cuda"}, {"dtype": "float32"}]),
    *_calls("aten.cuda.default", "aten.pin_memory.default", "aten.is_pinned.default", args=[VALUE]),
    *_calls("aten.quantize_per_tensor.default", args=[VALUE, 0.0, 0, {"dtype": "qint8"}]),
    *_calls("aten.view.dtype", args=[VALUE, {"dtype": "int64"}]),
    *_calls("aten.view.dtype", args=[VALUE, {"dtype": "complex128"}]),
    _chain("aten.cat.default", 40, ["@", "@"]),
    _chain("aten.stack.default", 40, ["@", "@"]),
    _chain("aten.add.Tensor", 100000, "@", 1.0),
    _chain("aten.repeat.default", 30, "@", [2, 1, 1]),
    _chain("aten.unsqueeze.default", 80, "@", 0),
    _chain("aten.kron.default", 10, "@", "@"),
    _chain("aten.matmul.default", 4000, "@", "@"),
    *_calls("pow", args=[10, 10**9]),
    *_calls("pow", args=[9, RAW + "9" * 4000]),
    *_calls("mul", args=[[0], 10**10]),
    *_calls("mul", args=["x", 10**10]),
    *_calls("int", args=["9" * 10**6]),
    *_calls("float", args=["\x1b[2J"]),
    ("powers of powers", [["a", "pow", [10, 10**4], {}], ["b", "pow", [{"v": "a"}, 10**4], {}]], False),
    (
        "growing list",
        [
            ["a", "mul", [[0], 1 << 15], {}],
            ["b", "mul", [[{"v": "a"}], 1 << 15], {}],
            ["c", "sum", [{"v": "b"}, []], {}],
        ],
        False,
    ),
    *_calls("getitem", args=[VALUE, 1 << 40]),
    *_calls("getitem", args=["abc", {"v": "n1"}]),
    *_calls("aten.view.default", args=[VALUE, [1 << 40, 1 << 40]]),
    *_calls("aten.reshape.default", args=[VALUE, [0, -1]]),
    *_calls(
        "prim.device.default",
        "builtins.eval",
        "aten.__class__",
        "aten.add.__init__",
        "os.system",
        "aten.add",
        "aten..",
        "",
        "aten.add.Tensor.x",
        "\x1b[2J",
        args=["echo x"],
    ),
    *_calls("aten.to.dtype", args=[VALUE, {"dtype": "load"}]),
    *_calls("aten.to.dtype", args=[VALUE, {"dtype": "__name__"}]),
    *_calls("aten.add.Tensor", args=[[[[[[[[[[[[[[[[[[[VALUE]]]]]]]]]]]]]]]]]], 1]),
    ("a value made twice", [["n0", "aten.add.Tensor", [VALUE, 1.0], {}]], False),
    ("a value never made", [["x", "aten.add.Tensor", [{"v": "nope"}, 1.0], {}]], False),
]
"""Name, nodes that are added, and whether the last one takes the place of the first output."""

LEGAL: list[tuple[str, Nodes, bool]] = [
    ("nothing added", [], False),
    _live("aten.mul.Tensor", LAST, 1.0),
    _live("aten.add.Tensor", LAST, 0.0),
    _live("aten.contiguous.default", LAST),
    _live("aten.clone.default", LAST),
    (
        "a value of its own written in place",
        [["x", "aten.mul.Tensor", [LAST, 2.0], {}], ["y", "aten.mul_.Tensor", [{"v": "x"}, 0.5], {}]],
        True,
    ),
    (
        "views and back",
        [["x", "aten.transpose.int", [LAST, 0, 1], {}], ["y", "aten.transpose.int", [{"v": "x"}, 0, 1], {}]],
        True,
    ),
    (
        "a small constant",
        [["x", "aten.zeros.default", [[1]], {}], ["y", "aten.add.Tensor", [LAST, {"v": "x"}], {}]],
        True,
    ),
    (
        "cat and slice",
        [["x", "aten.cat.default", [[LAST, LAST], -1], {}], ["y", "aten.slice.Tensor", [{"v": "x"}, -1, 0, 16], {}]],
        False,
    ),
    _statistics("batch_norm", False),
    _lengths([1 << 10, 2], [1 << 10, 1]),
    _recurrent("lstm", 4, None),
    _recurrent("gru", 4, None),
    _differences(16, 3),
    _windows("col2im", [1, 1, 8], [2, 4], [1, 1], [1, 1], [0, 0], [1, 1]),
    _windows("max_pool2d", [1, 1, 9, 9], [5, 5], [1, 1], [0, 0], [2, 2]),
    (
        "a hundred sums",
        [
            ["x0", "aten.add.Tensor", [LAST, 0.0], {}],
            *([f"x{n}", "aten.add.Tensor", [{"v": f"x{n - 1}"}, 0.0], {}] for n in range(1, 100)),
        ],
        True,
    ),
]
"""Near-identical graphs that are legal and give the honest answer."""


def _every_operation() -> Iterator[tuple[str, list[Any]]]:
    """Yield a call of each operation of the namespace `aten` with small, huge, negative and large sizes."""
    import torch

    for schema in torch._C._jit_get_all_schemas():
        if not schema.name.startswith("aten::"):
            continue
        target = f"aten.{schema.name[6:]}.{schema.overload_name or 'default'}"
        for size in (1, 2**40, -3, 2**28):
            args = [_argument(str(each.type), size) for each in schema.arguments if not each.kwarg_only]
            needed = [each for each in schema.arguments if each.kwarg_only and not each.has_default_value()]
            kwargs = {each.name: _argument(str(each.type), size) for each in needed}
            yield f"{target} {size}", ["x", target, args, kwargs]


def _argument(kind: str, size: int) -> Any:
    if kind.startswith(("List", "Optional[List")) or kind.endswith("[]"):
        return [VALUE, VALUE] if "Tensor" in kind else [size, size]
    if kind == "Tensor":
        return VALUE
    if kind.startswith("Optional"):
        return None
    known = {"bool": True, "str": "../canary/secret.bin", "Device": {"device": "cpu"}, "float": 1e30}
    return known.get(kind, size)
