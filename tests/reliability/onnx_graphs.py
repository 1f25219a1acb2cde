"""Hostile ONNX graphs: kernels of a store with operators, sizes and messages that no honest graph has."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .attacks import FREE, Attack, drawn
from .sealed import Sealed
from .torch_graphs import graph_of
from .trial import ROOT
from .verbs import ONNX_VERBS

OLD_STORE = ROOT / "tests/store/format3/encoder.zip"
FLOAT, INT64, STRING = 1, 7, 8
HUGE = 1 << 28
Nodes = list[Any]
Change = Callable[[Any, str, str], None]
"""Change of a model, given the names of its hidden input and of its first output."""


def attacks(number: int) -> Iterator[Attack]:
    """Yield the directed graphs, so many of all operators, and the legal twins."""
    for base in ("captured", "names"):
        for name, change in directed():
            yield Attack("onnx graph", name, base, _changed(change), verbs=ONNX_VERBS)
        for name, change in legal():
            yield Attack("onnx graph", name, base, _changed(change), verbs=ONNX_VERBS, is_legal=True)
    for name, change in drawn(every_operator(), number, "operators"):
        yield Attack("onnx operator", name, "captured", _changed(change), verbs=("run",))
    for name, data in garbage():
        for base in ("captured", "names"):
            yield Attack("onnx bytes", name, base, _bytes(data), verbs=ONNX_VERBS, answers=FREE)


def _file(sealed: Sealed) -> tuple[str, str]:
    """Return the file of the graph that is changed, and the name of its hidden input.

    A store of text encoders gets a graph of its attention, as stores of earlier versions have: it must have no effect.
    """
    kernel = graph_of(sealed)
    if sealed.program["kernels"][kernel]["template"] == "captured":
        return sealed.tree["graphs"][kernel]["file"], "r0"
    if "attention" not in sealed.tree["graphs"]:
        with zipfile.ZipFile(OLD_STORE) as archive:
            for file in (name for name in archive.namelist() if name.endswith(".onnx")):
                sealed.tree["graphs"][Path(file).stem] = {"file": file, "opset": 17, "ir": 8, "bytes": 0, "sha256": ""}
                sealed.write(file, archive.read(file))
    return sealed.tree["graphs"]["attention"]["file"], "hidden"


def _changed(change: Change) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        import onnx

        with Sealed(place / "store") as sealed:
            file, hidden = _file(sealed)
            model = onnx.load_from_string(sealed.read(file))
            change(model, hidden, model.graph.output[0].name)
            sealed.write(file, model.SerializeToString())

    return make


def _bytes(data: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        with Sealed(place / "store") as sealed:
            file, _ = _file(sealed)
            sealed.write(file, data(sealed.read(file)))

    return make


def node(kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> Any:
    """Return a node."""
    from onnx import helper

    return helper.make_node(kind, inputs, outputs, domain=domain, **attributes)


def constant(name: str, values: list[Any], kind: int = INT64, shape: list[int] | None = None) -> Any:
    """Return a node that holds a constant."""
    from onnx import helper

    tensor = helper.make_tensor(name, kind, [len(values)] if shape is None else shape, values)
    return node("Constant", [], [name], value=tensor)


def live(make: Callable[[str], Nodes]) -> Change:
    """Return the change that adds nodes whose last output counts: nothing times its size is added to the output."""

    def change(model: Any, hidden: str, output: str) -> None:
        nodes = make(hidden)
        for each in model.graph.node:
            each.output[:] = ["inner" if name == output else name for name in each.output]
        nodes += [
            node("Shape", [nodes[-1].output[0]], ["z1"]),
            node("Cast", ["z1"], ["z2"], to=FLOAT),
            node("ReduceSum", ["z2"], ["z3"], keepdims=0),
            constant("z4", [0.0], FLOAT, []),
            node("Mul", ["z3", "z4"], ["z5"]),
            node("Add", ["inner", "z5"], [output]),
        ]
        model.graph.node.extend(nodes)

    return change


def _loop(hidden: str, count: int = 1 << 62) -> Nodes:
    from onnx import helper

    values = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", INT64), ("c", 9), ("s", FLOAT))]
    outs = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("c2", 9), ("s2", FLOAT))]
    body = helper.make_graph([node("Identity", ["c"], ["c2"]), node("Add", ["s", "s"], ["s2"])], "body", values, outs)
    nodes = [constant("n", [count], INT64, []), constant("t", [1], 9, []), constant("s0", [1.0], FLOAT, [])]
    return [*nodes, node("Loop", ["n", "t", "s0"], ["x"], body=body)]


def _scan(hidden: str) -> Nodes:
    from onnx import helper

    one = [helper.make_tensor_value_info("e", FLOAT, None)]
    body = helper.make_graph(
        [node("Identity", ["e"], ["f"])], "b", one, [helper.make_tensor_value_info("f", FLOAT, None)]
    )
    return [node("Scan", [hidden], ["x"], body=body, num_scan_inputs=1)]


def _branch(hidden: str) -> Nodes:
    from onnx import helper

    out = helper.make_tensor_value_info("f", FLOAT, None)
    body = helper.make_graph([node("Identity", [hidden], ["f"])], "b", [], [out])
    return [constant("t", [1], 9, []), node("If", ["t"], ["x"], then_branch=body, else_branch=body)]


def _functions(model: Any, hidden: str, output: str, depth: int = 30) -> None:
    """Add functions that call one another twice: 2^depth nodes."""
    from onnx import helper

    opset = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    for level in range(depth):
        kind, domain = ("Identity", "") if not level else (f"F{level - 1}", "f")
        nodes = [node(kind, ["a"], ["b"], domain), node(kind, ["b"], ["c"], domain)]
        model.functions.append(helper.make_function("f", f"F{level}", ["a"], ["c"], nodes, opset))
    model.opset_import.append(helper.make_opsetid("f", 1))
    live(lambda hidden: [node(f"F{depth - 1}", [hidden], ["x"], "f")])(model, hidden, output)


def _external(location: str) -> Change:
    def change(model: Any, hidden: str, output: str) -> None:
        import onnx

        tensor = onnx.TensorProto(name="ext", data_type=FLOAT, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", "0"), ("length", "16")):
            tensor.external_data.add(key=key, value=value)
        model.graph.initializer.append(tensor)
        live(lambda hidden: [node("Identity", ["ext"], ["x"])])(model, hidden, output)

    return change


def _noise(text: str) -> Change:
    """Return the change that brings a text into what ONNX Runtime says, as the name of a node that fails."""

    def change(model: Any, hidden: str, output: str) -> None:
        bad = [constant("i", [1 << 40]), node("Gather", [hidden, "i"], ["x"], name=text)]
        live(lambda hidden: bad)(model, hidden, output)

    return change


def _unknown(kind: str, domain: str = "") -> Change:
    def change(model: Any, hidden: str, output: str) -> None:
        from onnx import helper

        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))
        live(lambda hidden: [node(kind, [hidden], ["x"], domain)])(model, hidden, output)

    return change


def _unused(count: int) -> Change:
    def change(model: Any, hidden: str, output: str) -> None:
        model.graph.node.extend(node("Identity", [hidden], [f"u{index}"]) for index in range(count))

    return change


def _chain(kind: str, count: int, width: int = 1) -> Callable[[str], Nodes]:
    def make(hidden: str) -> Nodes:
        names = [hidden, *(f"x{index}" for index in range(count))]
        return [node(kind, [names[index]] * width, [names[index + 1]]) for index in range(count)]

    return make


def _doubling(count: int) -> Callable[[str], Nodes]:
    def make(hidden: str) -> Nodes:
        names = [hidden, *(f"x{index}" for index in range(count))]
        return [node("Concat", [names[i]] * 2, [names[i + 1]], axis=0) for i in range(count)]

    return make


def _square(side: int, count: int) -> Callable[[str], Nodes]:
    """Return products of large squares that are made of one number."""

    def make(hidden: str) -> Nodes:
        nodes = [constant("side", [side, side]), node("ConstantOfShape", ["side"], ["x0"])]
        return [*nodes, *(node("MatMul", [f"x{i}", "x0"], [f"x{i + 1}"]) for i in range(count))]

    return make


def _initializer(size: int) -> Change:
    def change(model: Any, hidden: str, output: str) -> None:
        import onnx

        model.graph.initializer.append(onnx.TensorProto(name="big", data_type=FLOAT, dims=[size]))
        live(lambda hidden: [node("Identity", ["big"], ["x"])])(model, hidden, output)

    return change


def _of_shape(kind: str, *sizes: int, before: bool = True, **attributes: Any) -> Callable[[str], Nodes]:
    """Return a node that takes a value and a shape or sizes."""

    def make(hidden: str) -> Nodes:
        inputs = [hidden, "sizes"] if before else ["sizes"]
        return [constant("sizes", list(sizes)), node(kind, inputs, ["x"], **attributes)]

    return make


def _decided(*nodes: Any, equals: Any = None) -> Callable[[str], Nodes]:
    """Return nodes that make a large value if the number `x0` of the nodes before is found to be another than this.

    Without a number: if `x0` equals itself, as NaN does not.
    """
    sizes = (1, HUGE) if equals is not None else (HUGE, 1)

    def make(hidden: str) -> Nodes:
        same = [] if equals is None else [constant("same", [equals], INT64)]
        return [
            *nodes, *same, node("Equal", ["x0", "same" if same else "x0"], ["t"]), constant("one", [sizes[0]]),
            constant("other", [sizes[1]]), node("Where", ["t", "one", "other"], ["s"]),
            node("ConstantOfShape", ["s"], ["x"]),
        ]  # fmt: skip

    return make


def _backwards(end: int) -> Callable[[str], Nodes]:
    """Return a slice backwards, and a value whose size is a multiple of its length."""

    def make(hidden: str) -> Nodes:
        parts = {"values": [1, 2, 3], "start": [-1], "end": [end], "axes": [0], "step": [-1], "times": [HUGE]}
        return [
            *(constant(name, numbers) for name, numbers in parts.items()),
            node("Slice", list(parts)[:5], ["y"]), node("Shape", ["y"], ["n"]), node("Mul", ["n", "times"], ["s"]),
            node("ConstantOfShape", ["s"], ["x"]),
        ]  # fmt: skip

    return make


def _shaped(model: Any, hidden: str, output: str) -> None:
    """Claim an output of another shape than the kernel gives."""
    dims = model.graph.output[0].type.tensor_type.shape.dim
    for dim in dims:
        dim.dim_value = 1 << 40


def directed() -> Iterator[tuple[str, Change]]:
    """Yield the directed changes."""
    three = {
        "ConstantOfShape": _of_shape("ConstantOfShape", HUGE, before=False),
        "ConstantOfShape of all memory": _of_shape("ConstantOfShape", 1 << 40, before=False),
        "ConstantOfShape negative": _of_shape("ConstantOfShape", -5, before=False),
        "Expand": _of_shape("Expand", 1 << 18, 1, 1),
        "Tile": _of_shape("Tile", 1 << 13, 1 << 13, 1),
        "Reshape": _of_shape("Reshape", 1 << 40, -1),
        "Pad": _of_shape("Pad", *[0, 0, HUGE, 0, 0, 0]),
        "Pad of two": _of_shape("Pad", 0, 0, 0, HUGE),
        "Pad negative": _of_shape("Pad", -9, -9, -9, -9, -9, -9),
        "Gather": _of_shape("Gather", 1 << 40),
        "Gather negative": _of_shape("Gather", -(1 << 40)),
        "Slice": lambda hidden: [
            constant("a", [-(1 << 62)]),
            constant("b", [1 << 62]),
            node("Slice", [hidden, "a", "b"], ["x"]),
        ],
        "Range": lambda hidden: [
            constant("a", [0], INT64, []),
            constant("b", [HUGE], INT64, []),
            constant("c", [1], INT64, []),
            node("Range", ["a", "b", "c"], ["x"]),
        ],
        "EyeLike": lambda hidden: [
            constant("s", [1 << 15, 1 << 15]),
            node("ConstantOfShape", ["s"], ["y"]),
            node("EyeLike", ["y"], ["x"]),
        ],
        "OneHot": lambda hidden: [
            constant("i", [0]),
            constant("d", [HUGE], INT64, []),
            constant("v", [0.0, 1.0], FLOAT),
            node("OneHot", ["i", "d", "v"], ["x"]),
        ],
        "Resize": lambda hidden: [constant("s", [1.0, 4e6, 1.0], FLOAT), node("Resize", [hidden, "", "s"], ["x"])],
        "Range that overflows": lambda hidden: [
            constant("a", [(1 << 63) - 1], INT64, []),
            constant("b", [-(1 << 63) + HUGE], INT64, []),
            constant("c", [1], INT64, []),
            node("Range", ["a", "b", "c"], ["x"]),
        ],
        "a slice backwards to the end": _backwards((1 << 63) - 1),
        "a slice backwards to the largest of 32 bits": _backwards((1 << 31) - 1),
        "a power that overflows decides": _decided(
            constant("a", [100]), constant("b", [1 << 31]), node("Pow", ["a", "b"], ["x0"]), equals=0
        ),
        "a sum that overflows decides": _decided(
            constant("a", [1 << 62] * 4), node("ReduceSum", ["a"], ["x0"], keepdims=1), equals=0
        ),
        "a product that overflows decides": _decided(
            constant("a", [1 << 32] * 2), node("ReduceProd", ["a"], ["x0"], keepdims=1), equals=0
        ),
        "a maximum with NaN decides": _decided(
            constant("a", [1.0, float("nan")], FLOAT), node("ReduceMax", ["a"], ["x0"], keepdims=1)
        ),
        "HannWindow": lambda hidden: [constant("n", [HUGE], INT64, []), node("HannWindow", ["n"], ["x"])],
        "MelWeightMatrix": lambda hidden: [
            constant("n", [1 << 14], INT64, []),
            constant("f", [0.0], FLOAT, []),
            node("MelWeightMatrix", ["n", "n", "n", "f", "f"], ["x"]),
        ],
        "RandomNormal": lambda hidden: [node("RandomNormal", [], ["x"], shape=[HUGE])],
        "RandomUniform small": lambda hidden: [node("RandomUniform", [], ["x"], shape=[4])],
        "Dropout in training": lambda hidden: [
            constant("r", [0.5], FLOAT, []),
            constant("t", [1], 9, []),
            node("Dropout", [hidden, "r", "t"], ["x"]),
        ],
        "NonZero": lambda hidden: [node("NonZero", [hidden], ["x"])],
        "Unique": lambda hidden: [node("Unique", [hidden], ["x"])],
        "Einsum": lambda hidden: [node("Einsum", [hidden] * 3, ["x"], equation="abc,def,ghi->abcdefghi")],
        "CumSum": lambda hidden: [constant("i", [1 << 40], INT64, []), node("CumSum", [hidden, "i"], ["x"])],
        "ScatterND": lambda hidden: [
            constant("i", [1 << 40], INT64, [1, 1]),
            constant("u", [1.0], FLOAT, [1]),
            node("ScatterND", [hidden, "i", "u"], ["x"]),
        ],
        "GatherND": lambda hidden: [constant("i", [-(1 << 40)], INT64, [1, 1]), node("GatherND", [hidden, "i"], ["x"])],
        "MaxUnpool": lambda hidden: [
            constant("i", [1 << 40], INT64, [1, 1, 1]),
            constant("v", [1.0], FLOAT, [1, 1, 1]),
            node("MaxUnpool", ["v", "i"], ["x"], kernel_shape=[2]),
        ],
        "ConvTranspose": lambda hidden: [
            constant("v", [1.0], FLOAT, [1, 1, 1]),
            node("ConvTranspose", ["v", "v"], ["x"], strides=[1], output_padding=[0], output_shape=[1 << 29]),
        ],
        "Conv with a wide dilation": lambda hidden: [
            constant("v", [1.0], FLOAT, [1, 1, 1]),
            constant("k", [1.0, 1.0], FLOAT, [1, 1, 2]),
            node("Conv", ["v", "k"], ["x"], dilations=[HUGE], pads=[HUGE, HUGE]),
        ],
        "MaxPool": lambda hidden: [
            constant("v", [1.0], FLOAT, [1, 1, 1]),
            node("MaxPool", ["v"], ["x"], kernel_shape=[1], pads=[HUGE, HUGE]),
        ],
        "LSTM": lambda hidden: [
            constant("v", [1.0], FLOAT, [1, 1, 1]),
            node("LSTM", ["v", "v", "v"], ["x"], hidden_size=HUGE),
        ],
        "Split": lambda hidden: [constant("s", [1 << 40, -5]), node("Split", [hidden, "s"], ["x", "y"], axis=-1)],
        "SequenceConstruct": lambda hidden: [
            node("SequenceConstruct", [hidden] * 2, ["s"]),
            node("ConcatFromSequence", ["s"], ["x"], axis=0),
        ],
        "strings": lambda hidden: [constant("s", [b"\x1b[2J"] * 4, STRING), node("Identity", ["s"], ["x"])],
        "Loop without end": _loop,
        "Loop of two": lambda hidden: _loop(hidden, 2),
        "Scan": _scan,
        "If": _branch,
        "400 products": _square(4000, 400),
        "one large product": _square(7000, 1),
        "4000 small products": _square(500, 4000),
        "chain of 50,000": _chain("Identity", 50000),
        "chain of 20,000 sums": _chain("Add", 20000, 2),
        "doubling": _doubling(34),
        "TopK": lambda hidden: [constant("k", [1 << 40]), node("TopK", [hidden, "k"], ["x", "y"])],
        "DFT": lambda hidden: [constant("n", [HUGE], INT64, []), node("DFT", [hidden, "n"], ["x"])],
        "Col2Im": lambda hidden: [
            constant("s", [1 << 14, 1 << 14]),
            constant("b", [1, 1]),
            node("Col2Im", [hidden, "s", "b"], ["x"]),
        ],
        "CenterCropPad": _of_shape("CenterCropPad", HUGE, 1, 1),
        "Shape outside": lambda hidden: [node("Shape", [hidden], ["x"], start=1 << 40)],
        "a node without inputs": lambda hidden: [node("Add", [], ["x"])],
        "a value that is not made": lambda hidden: [node("Add", [hidden, "nowhere"], ["x"])],
        "a cycle": lambda hidden: [node("Add", [hidden, "x"], ["y"]), node("Identity", ["y"], ["x"])],
    }
    yield from ((name, live(make)) for name, make in three.items())
    yield from ((f"functions {depth}", lambda *of, depth=depth: _functions(*of, depth=depth)) for depth in (1, 30))
    locations = ("../canary/secret.bin", "/etc/passwd", "", "offramp.json", "weights-000.safetensors", "\x1b[2J")
    yield from ((f"external {location!r}", _external(location)) for location in locations)
    texts = ("\x1b[2J\x1b[31mowned", "a\nofframp: error: forged\nb", "\u202egnp.exe", "%s%n" * 50, "x" * 100000)
    yield from ((f"name {text[:20]!r}", _noise(text)) for text in texts)
    yield from ((f"operator {text[:20]!r}", _unknown(text)) for text in (*texts, "NoSuchOperator", ""))
    domains = ("com.microsoft.nchwc", "ai.onnx.ml", "evil", "com.microsoft", "ai.onnx.preview.training", "\x1b[2J")
    yield from ((f"domain {domain!r}", _unknown("Sampling", domain)) for domain in domains)
    yield from ((f"initializer {size}", _initializer(size)) for size in (HUGE, 1 << 40, -1, 1 << 62))
    yield from ((f"unused {count}", _unused(count)) for count in (1000, 30000))
    yield "claimed shape", _shaped
    yield "opset 1", lambda model, *_: model.opset_import[0].__setattr__("version", 1)
    yield "opset 99", lambda model, *_: model.opset_import[0].__setattr__("version", 99)
    yield "ir 99", lambda model, *_: setattr(model, "ir_version", 99)
    yield "no nodes", lambda model, *_: model.graph.ClearField("node")
    yield "no outputs", lambda model, *_: model.graph.ClearField("output")
    yield "no inputs", lambda model, *_: model.graph.ClearField("input")


def legal() -> Iterator[tuple[str, Change]]:
    """Yield near-identical changes that are legal and give the honest answer."""
    yield "written again", lambda *_: None
    yield "an Identity more", live(_chain("Identity", 1))
    yield "a documentation", lambda model, *_: setattr(model, "doc_string", "hello")
    yield "a small constant", live(lambda hidden: [constant("x", [1.0], FLOAT)])
    yield "a transposed value", live(lambda hidden: [node("Transpose", [hidden], ["x"])])
    yield "a concatenation", live(_doubling(1))
    yield "a small product", live(_square(16, 1))
    yield (
        "a power decides",
        live(_decided(constant("a", [3]), constant("b", [4]), node("Pow", ["a", "b"], ["x0"]), equals=81)),
    )


def garbage() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """Yield changes of the bytes."""
    yield "empty", lambda data: b""
    yield "half", lambda data: data[: len(data) // 2]
    yield "noise", lambda data: bytes((index * 7919) % 251 for index in range(5000))
    yield "JSON", lambda data: b"{}"
    yield "twice", lambda data: data * 2
    yield "nested groups", lambda data: b"\x3a\x7f" * 4000
    yield "a length without end", lambda data: b"\x3a\xff\xff\xff\xff\x7f" + data
    yield "zeros", lambda data: bytes(4096)


ATTRIBUTES = {1: 1e30, 2: 1 << 40, 3: b"\x1b[2J", 6: [1e30], 7: [1 << 40, 1 << 40], 8: [b"x"]}
"""Type of an attribute -> a hostile value."""


def every_operator() -> Iterator[tuple[str, Change]]:
    """Yield a call of each operator of the standard domains: with the hidden states, and with huge sizes."""
    import onnx
    from onnx import defs

    for schema in defs.get_all_schemas():
        for size in (1, 1 << 40, -3, HUGE):
            yield f"{schema.domain}.{schema.name} {size}", _operator(schema, size, onnx)


def _operator(schema: Any, size: int, onnx: Any) -> Change:
    def make(hidden: str) -> Nodes:
        inputs, nodes = [], []
        for index, each in enumerate(schema.inputs[:6]):
            takes_sizes = "tensor(float)" not in each.types
            if takes_sizes:
                nodes.append(constant(f"i{index}", [size, size]))
            inputs.append(f"i{index}" if takes_sizes else hidden)
        attributes = {
            name: ATTRIBUTES[int(each.type)] if size > 1 else [1] if int(each.type) == 7 else 1
            for name, each in schema.attributes.items()
            if int(each.type) in ((1, 2, 7) if size <= 1 else ATTRIBUTES) and (each.required or size > 1)
        }
        outputs = ["x", *(f"x{index}" for index in range(1, max(1, schema.min_output)))]
        last = node(schema.name, inputs, outputs, schema.domain, **attributes)
        return [*nodes, last]

    def change(model: Any, hidden: str, output: str) -> None:
        if schema.domain:
            model.opset_import.append(onnx.helper.make_opsetid(schema.domain, schema.since_version))
        live(make)(model, hidden, output)

    return change
