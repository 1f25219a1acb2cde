"""The reader of ONNX models: it reads what `onnx` reads, and refuses the rest with a reason."""

import time
from collections import deque

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from offramp.backends import onnx_reader
from offramp.backends.onnx_reader import DTYPES, MAX_RANK, Graph, read_model
from offramp.program.checks import WrongError
from tests.backends.captured import onnx_graphs

VECTOR = ("x", TensorProto.FLOAT, ["N", 3])


def model(nodes, constants=(), ir=8, **parts):
    values = [helper.make_tensor_value_info(*VECTOR)]
    out = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", values, out, list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=ir, **parts)


def constants_of(data):
    return read_model(data.SerializeToString()).graph.constants


RELU = helper.make_node("Relu", ["x"], ["out"])


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("dtype", sorted(DTYPES.values()))
def test_constants_are_those_that_onnx_reads(dtype, raw):
    array = np.array([[0, 1, 2], [3, 0, 1]]).astype(dtype)
    if array.dtype.kind in "if":
        array[0, 0] = -1
    flat = array.reshape(-1)
    values = array.tobytes() if raw else (flat.tolist())
    tensor = helper.make_tensor("c", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, values, raw=raw)
    (found,) = constants_of(model([RELU], [tensor])).values()
    assert found.dtype.name == dtype
    np.testing.assert_array_equal(found, numpy_helper.to_array(tensor))


def test_attributes_of_all_kinds_are_read():
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "i", [], [])
    given = {"i": -3, "f": 0.5, "s": "text", "ints": [1, -2], "floats": [0.5, 2.0], "strings": ["a", "b"]}
    arrays = {"t": numpy_helper.from_array(np.arange(3))}
    node = helper.make_node("Any", ["x", "", "x"], ["out", ""], domain="com.microsoft", **given, **arrays, g=inner)
    (read,) = read_model(model([node]).SerializeToString()).graph.nodes
    assert read[:3] == ("com.microsoft.Any", ("x", "", "x"), ("out", ""))
    found = dict(read.attributes)
    assert isinstance(found.pop("g"), Graph)
    np.testing.assert_array_equal(found.pop("t"), np.arange(3))
    assert found == {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


@pytest.mark.parametrize("number", [0, 127, 128, 1 << 62, (1 << 63) - 1, -1, -(1 << 63)])
def test_integers_of_64_bits_are_read(number):
    (read,) = read_model(model([helper.make_node("Any", ["x"], ["out"], i=number)]).SerializeToString()).graph.nodes
    assert read.attributes == {"i": number}


def test_versions_of_operators_are_read_by_domain():
    made = model([RELU])
    made.opset_import[0].domain = "ai.onnx"
    made.opset_import.add(domain="com.microsoft", version=1)
    assert read_model(made.SerializeToString()).opsets == {"": 18, "com.microsoft": 1}


MESSAGES = {
    "model": onnx.ModelProto, "opset": onnx.OperatorSetIdProto, "graph": onnx.GraphProto, "node": onnx.NodeProto,
    "attribute": onnx.AttributeProto, "tensor": onnx.TensorProto, "value": onnx.ValueInfoProto, "type": onnx.TypeProto,
    "tensor type": onnx.TypeProto.Tensor, "shape": onnx.TensorShapeProto,
    "dimension": onnx.TensorShapeProto.Dimension,
}  # fmt: skip
KINDS = {1: {"double"}, 2: {"float"}, 3: {"int"}, 4: {"int"}, 5: {"int"}, 9: {"text"}, 12: {"text", "bytes"},
         14: {"int", "zero"}}  # fmt: skip
"""Number of a type of fields in protocol buffers -> its kinds here."""
HARMLESS = {"producer", "domain", "doc", "name", "metadata", "denotation"}
"""Names of fields that nothing reads."""


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_those_of_onnx(name):
    """Each field by its number: whether it may occur several times, and its kind, unless it is skipped or refused."""
    table, known = dict(onnx_reader._MESSAGES[name]), MESSAGES[name].DESCRIPTOR.fields_by_number
    for number, field in known.items():
        _, kind, is_repeated = table.pop(number)
        assert is_repeated is field.is_repeated, field.name
        if kind in MESSAGES:
            assert field.message_type is MESSAGES[kind].DESCRIPTOR, field.name
        elif kind != "refuse":
            assert kind == "skip" or kind in KINDS[field.type], field.name
    assert all(kind == "refuse" for _, kind, _ in table.values()), "what this version of onnx does not know"
    assert {each for each, kind, _ in onnx_reader._MESSAGES[name].values() if kind == "skip"} <= HARMLESS


def test_declared_shapes_are_read():
    graph = read_model(model([RELU]).SerializeToString()).graph
    assert (graph.inputs, graph.outputs) == ({"x": ("float32", ("N", 3))}, {"out": ("float32", None)})


def changed(change):
    made = model([RELU], [numpy_helper.from_array(np.ones(2, np.float32), "c")])
    change(made, made.graph, made.graph.initializer[0])
    return made.SerializeToString()


def other(name, value, part="tensor"):
    """Set a field of the constant, or of another part."""

    def change(made, graph, tensor):
        setattr({"model": made, "graph": graph, "tensor": tensor, "node": graph.node[0]}[part], name, value)

    return change


def outside(made, graph, tensor):
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def listed(dtype, *numbers):
    """Give the constant numbers in a list of integers."""

    def change(made, graph, tensor):
        tensor.CopyFrom(TensorProto(name="c", data_type=dtype, dims=[len(numbers)], int32_data=numbers))

    return change


def sized(*dims):
    """Give the constant sizes with a zero among them, and no numbers."""
    return lambda made, graph, tensor: tensor.CopyFrom(TensorProto(name="c", data_type=1, dims=dims))


def text(made, graph, tensor):
    tensor.CopyFrom(helper.make_tensor("c", TensorProto.STRING, [1], [b"text"]))


def sequence(made, graph, tensor):
    graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [3]))


def with_function(made, graph, tensor):
    opsets = [helper.make_opsetid("", 18)]
    made.functions.append(helper.make_function("d", "f", ["x"], ["out"], [RELU], opsets))


REFUSED = {
    "external data": (outside, "it has external data"),
    "strings": (text, "it has strings"),
    "sequences": (sequence, "it has sequences"),
    "functions": (with_function, "it has functions"),
    "inner shapes": (lambda m, g, t: g.value_info.add(name="v"), "it has shapes of inner values"),
    "sparse": (lambda m, g, t: g.sparse_initializer.add(), "it has sparse constants"),
    "training": (lambda m, g, t: m.training_info.add(), "it has training"),
    "overload": (other("overload", "o", "node"), "it has overload"),
    "old": (other("ir_version", 3, "model"), "the version of the format is 3"),
    "too few bytes": (other("raw_data", b"1234"), "has 4 bytes, not 8"),
    "too many bytes": (other("raw_data", b"1" * 12), "has 12 bytes, not 8"),
    "unknown dtype": (other("data_type", 17), "element type 17"),
    "negative": (lambda m, g, t: t.dims.__setitem__(0, -2), "has the sizes"),
    "huge": (lambda m, g, t: t.dims.extend([1 << 40, 1 << 40]), "has the sizes"),
    "empty and huge": (lambda m, g, t: t.dims.extend([0, 1 << 40]), "has the sizes"),
    "many axes": (sized(*[0] * (MAX_RANK + 1)), "has the sizes"),
    "large beside a zero": (sized((1 << 32) + 1, 0), "has the sizes"),
    "large int8": (listed(TensorProto.INT8, 128), "has numbers out of range"),
    "small int8": (listed(TensorProto.INT8, -129), "has numbers out of range"),
    "large uint8": (listed(TensorProto.UINT8, 0, 256), "has numbers out of range"),
    "small uint8": (listed(TensorProto.UINT8, -1), "has numbers out of range"),
    "large float16": (listed(TensorProto.FLOAT16, 1 << 16), "has numbers out of range"),
    "large bool": (listed(TensorProto.BOOL, 1, 2), "has numbers out of range"),
    "large raw bool": (
        lambda m, g, t: t.CopyFrom(TensorProto(name="c", data_type=9, dims=[1], raw_data=b"\2")), "numbers out of range"
    ),
    "another list": (listed(TensorProto.FLOAT, 1), "has its numbers in two places"),
    "few numbers": (
        lambda m, g, t: t.CopyFrom(TensorProto(name="c", data_type=3, dims=[2], int32_data=[1])), "1 numbers, not 2"
    ),
    "new": (other("ir_version", 64, "model"), "the version of the format is 64"),
    "outputs twice": (lambda m, g, t: g.output.add().CopyFrom(g.output[0]), "the output 'out' is listed twice"),
    "no constant": (lambda m, g, t: g.node[0].attribute.add(name="a", type=4), "the attribute 'a' has no value"),
    "no graph": (lambda m, g, t: g.node[0].attribute.add(name="a", type=5), "the attribute 'a' has no value"),
    "two values": (lambda m, g, t: t.float_data.extend([1, 2]), "has its numbers in two places"),
    "made twice": (lambda m, g, t: g.node.extend([RELU]), "the value 'out' is listed twice"),
    "constant and input": (lambda m, g, t: setattr(t, "name", "x"), "the value 'x' is listed twice"),
    "opset twice": (lambda m, g, t: m.opset_import.add(domain="ai.onnx", version=1), "the domain '' is listed twice"),
    "attribute twice": (
        lambda m, g, t: g.node[0].attribute.extend([helper.make_attribute("a", 1)] * 2), "the attribute 'a' is listed"
    ),
    "two kinds": (
        lambda m, g, t: g.node[0].attribute.add(name="a", type=2, i=1, f=1.0), "the attribute 'a' has the type 2, and"
    ),
    "no kind": (lambda m, g, t: g.node[0].attribute.add(name="a", i=1), "the attribute 'a' has the type"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused_by_name(name):
    change, mention = REFUSED[name]
    read_model(changed(lambda *_: None))
    with pytest.raises(WrongError, match=mention):
        read_model(changed(change))


TWINS = {
    "as many axes": sized(*[0] * MAX_RANK),
    "as large beside a zero": sized(1 << 32, 0),
    "int8": listed(TensorProto.INT8, 127, -128),
    "uint8": listed(TensorProto.UINT8, 0, 255),
    "float16": listed(TensorProto.FLOAT16, (1 << 16) - 1),
    "bool": listed(TensorProto.BOOL, 0, 1),
    "newest": other("ir_version", 63, "model"),
    "oldest": other("ir_version", 4, "model"),
}


@pytest.mark.parametrize("name", TWINS)
def test_legal_twins_are_read(name):
    assert read_model(changed(TWINS[name])).graph.nodes


@pytest.mark.parametrize(
    ("more", "mention"),
    [
        (b"\x7a\x00", "field 15 of the message 'model' is not known"),
        (b"\x08\x08", "field 1 of the message 'model' occurs twice"),
        (b"\x3a\x00", "field 7 of the message 'model' occurs twice"),
        (b"\x0d\x00\x00\x00\x00", "field 1 of the message 'model' has the wire type 5"),
        (b"\x0b", "of an unknown wire type"),
        (b"\x08" + b"\xff" * 20, "a number has no end"),
        (b"\x08", "a number has no end"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "a number has more than 64 bits"),
        (b"\x7a\xff\xff\xff\xff\x0f", "a field is longer than its message"),
        (b"\x7a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "a field is longer than its message"),
    ],
)
def test_what_readers_may_read_in_two_ways_is_refused(more, mention):
    data = model([RELU]).SerializeToString()
    with pytest.raises(WrongError, match=mention):
        read_model(data + more)


@pytest.mark.parametrize("depth", [4, 5, 100, 20_000])
def test_the_depth_of_graphs_is_limited(depth):
    """Graphs in attributes of operations in graphs, as many as 1 MiB holds."""

    def head(number, size):
        length = b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size])

    parts, size = deque(), 0  # from the innermost: what is inside of a graph is not copied again
    for each in [*[6, b"\xa0\x01\x05", 5, b"\x22\x02If", 1] * depth, 7, b"\x08\x08"]:
        parts.appendleft(each if isinstance(each, bytes) else head(each, size))
        size += len(parts[0])
    data = b"".join(parts)
    if depth == 4:
        assert read_model(data).graph.nodes[0].operator == "If"
    else:
        with pytest.raises(WrongError, match="graphs are nested too deeply"):
            read_model(data)


def test_empty_messages_take_no_memory():
    """1 MiB of empty operations would be half a million objects."""
    began = time.perf_counter()
    graph = b"\x0a\x00" * 500_000
    with pytest.raises(WrongError, match="it has too many operations"):
        read_model(b"\x08\x08\x3a\xc0\x84\x3d" + graph)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(("count", "is_read"), [((1 << 16) - 2, True), ((1 << 16) - 1, False)])
def test_the_number_of_messages_is_limited(count, is_read):
    """Empty operations, beside a model and a graph."""
    graph = b"\x0a\x00" * count
    length = bytes([len(graph) & 127 | 128, len(graph) >> 7 & 127 | 128, len(graph) >> 14])
    data = b"\x08\x08\x3a" + length + graph
    if is_read:
        assert len(read_model(data).graph.nodes) == count
    else:
        with pytest.raises(WrongError, match="it has too many operations"):
            read_model(data)


@pytest.mark.parametrize(("field", "numbers"), [(4, b"\0" * 5), (10, b"\0" * 12)])
def test_packed_numbers_that_end_in_the_middle_are_refused(field, numbers):
    tensor = bytes([field << 3 | 2, len(numbers)]) + numbers
    graph = bytes([5 << 3 | 2, len(tensor)]) + tensor
    with pytest.raises(WrongError, match="packed numbers end in the middle"):
        read_model(b"\x08\x08" + bytes([7 << 3 | 2, len(graph)]) + graph)
    with pytest.raises(WrongError, match="the model has no graph"):
        read_model(b"\x08\x08")


def test_a_name_that_is_no_text_is_refused():
    data = model([RELU]).SerializeToString()
    with pytest.raises(WrongError, match="a name is not UTF-8"):
        read_model(data.replace(b"Relu", b"Rel\xff"))


def seen_by_onnx(data):
    """Operators with their inputs and outputs, names of inputs and constants, as `onnx` reads them."""
    graph = onnx.load_from_string(data).graph
    nodes = [
        (f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type,
         tuple(node.input), tuple(node.output), sorted(each.name for each in node.attribute))
        for node in graph.node
    ]  # fmt: skip
    return nodes, [each.name for each in graph.input], sorted(each.name for each in graph.initializer)


def test_damaged_bytes_are_refused_or_read_as_onnx_reads_them():
    """Every byte of two graphs changed in three ways, and every length."""
    for data in onnx_graphs().values():
        for place in range(len(data)):
            for changed_byte in (data[place] ^ 1, data[place] ^ 128, 255):
                damaged = data[:place] + bytes([changed_byte]) + data[place + 1 :]
                try:
                    graph = read_model(damaged).graph
                except WrongError:
                    continue
                nodes = [(*node[:3], sorted(node.attributes)) for node in graph.nodes]
                assert (nodes, list(graph.inputs), sorted(graph.constants)) == seen_by_onnx(damaged)
            try:
                graph = read_model(data[:place]).graph
            except WrongError:
                continue
            assert [node.operator for node in graph.nodes] == [node[0] for node in seen_by_onnx(data[:place])[0]]
