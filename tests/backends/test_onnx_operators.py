"""The rules of the table of ONNX operators, against the shapes that ONNX Runtime gives.

Shapes: N rows, C channels.
"""

import copy

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from offramp.backends.onnx_checks import (
    ELEMENT_WORK,
    INEXACT_ON_FLOATS,
    Allowance,
    Sizes,
    TooLargeError,
    UnlistedError,
    checked_model,
    require_time,
    sizes_of,
)
from offramp.backends.onnx_operators import OPERATORS, Known
from offramp.program.checks import WrongError
from offramp.program.dtypes import DTYPES
from offramp.store import Store
from tests.golden.common import STORES, unpack

NUMBERS = np.random.default_rng(0)


def f(*shape):
    return NUMBERS.uniform(0.1, 0.9, shape).astype(np.float32)


def i(*shape, most=3):
    return NUMBERS.integers(0, most, shape)


def b(*shape):
    return NUMBERS.integers(0, 2, shape).astype(bool)


def u(*shape):
    return NUMBERS.integers(0, 256, shape).astype(np.uint8)


def s(*shape):
    return NUMBERS.integers(-64, 65, shape).astype(np.int8)


PRODUCT = "com.microsoft.MatMulIntegerToFloat"
UNARY = (
    "Abs", "Neg", "Ceil", "Floor", "Round", "Sign", "Sqrt", "Identity", "Cos", "Erf", "Exp", "Log", "Reciprocal",
    "Relu", "Sigmoid", "Sin", "Softplus", "Softsign", "Tanh", "HardSwish", "Elu", "LeakyRelu", "HardSigmoid", "Selu",
    "Mish", "com.microsoft.Gelu", "com.microsoft.QuickGelu",
)  # fmt: skip
BINARY = (
    "Add", "Sub", "Mul", "Pow", "Min", "Max", "Sum", "Mean", "Div", "Equal", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual",
)  # fmt: skip
REDUCED = (
    "ReduceProd", "ReduceMax", "ReduceMin", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp",
)  # fmt: skip
CASES = [
    *[(name, [f(2, 3)], {}) for name in UNARY],
    *[(name, [f(2, 1, 3), f(4, 3)], {}) for name in BINARY],
    ("PRelu", [f(2, 4, 3), f(4, 1)], {}),
    ("ReduceSum", [f(2, 3, 4), [1]], {"keepdims": 0}),
    *[(name, [f(2, 3, 4)], {"axes": [-1]}) for name in REDUCED],
    *[(name, [f(2, 3, 4)], {"axes": [0, 2], "keepdims": 0}) for name in REDUCED],
    *[(name, [f(2, 3, 4)], {"keepdims": 0}) for name in REDUCED],
    ("ReduceSum", [f(2, 3, 4)], {"noop_with_empty_axes": 1}),
    ("Not", [b(2)], {}),
    *[(name, [b(2, 1), b(3)], {}) for name in ("And", "Or", "Xor")],
    *[(name, [f(2, 3)], {}) for name in ("IsNaN", "IsInf")],
    ("Where", [b(2, 1), f(3), f(4, 1, 1)], {}),
    ("Clip", [f(2), np.float32(0.2)], {}),
    ("Div", [i(2, 3), [3]], {}),
    ("Mod", [i(2, 3), [[3], [2]]], {}),
    ("Mod", [f(2, 3), f(3)], {"fmod": 1}),
    *[("Cast", [f(2)], {"to": to}) for to in (TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT16)],
    ("CastLike", [f(2), i(1)], {}),
    ("CumSum", [f(2, 3), np.int64(1)], {"reverse": 1}),
    ("Trilu", [f(2, 3)], {"upper": 0}),
    ("Softmax", [f(2, 3)], {"axis": -2}),
    ("LogSoftmax", [f(2, 3)], {}),
    ("LayerNormalization", [f(2, 3, 4), f(3, 4), f(3, 4)], {"axis": 1}, 3),
    ("LayerNormalization", [f(2, 3, 4), f(4)], {}),
    ("BatchNormalization", [f(2, 3, 4, 5), f(3), f(3), f(3), f(3)], {}),
    ("InstanceNormalization", [f(2, 3, 4), f(3), f(3)], {}),
    ("Shape", [f(2, 3, 4)], {"start": 1}),
    ("Shape", [f(2, 3, 4)], {"start": -2, "end": -1}),
    ("Size", [f(2, 3)], {}),
    ("Constant", [], {"value": numpy_helper.from_array(f(2, 3))}),
    ("Constant", [], {"value_ints": [1, 2]}),
    ("Constant", [], {"value_float": 1.0}),
    ("ConstantOfShape", [[2, 3]], {"value": numpy_helper.from_array(np.array([5]))}),
    ("ConstantOfShape", [np.zeros(0, np.int64).tolist()], {}),
    *[(name, [[[2, 3, 4], [5, 1, 7]]], {"keepdims": 0}) for name in ("ReduceSum", "ReduceProd")],
    ("Pow", [[2, 3], [4, 5]], {}),
    ("Range", [np.int64(2), np.int64(9), np.int64(3)], {}),
    ("Range", [np.float32(3), np.float32(0), np.float32(-0.5)], {}),
    ("Reshape", [f(2, 3, 4), [0, -1]], {}),
    ("Reshape", [f(0, 3), [0, 7]], {"allowzero": 1}),
    ("Flatten", [f(2, 3, 4)], {"axis": -1}),
    ("Flatten", [f(2, 3, 4)], {"axis": 0}),
    ("Flatten", [f(2, 3, 4)], {"axis": 3}),
    ("Flatten", [f(2, 3, 4)], {"axis": -3}),
    ("Squeeze", [f(2, 1, 3, 1), [-1]], {}),
    ("Squeeze", [f(2, 1, 3, 1)], {}),
    ("Unsqueeze", [f(2, 3), [0, -1]], {}),
    ("Transpose", [f(2, 3, 4)], {}),
    ("Transpose", [f(2, 3, 4)], {"perm": [1, 2, 0]}),
    ("DepthToSpace", [f(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", [f(1, 2, 4, 6)], {"blocksize": 2}),
    ("Expand", [f(2, 1), [3, 1, 4]], {}),
    ("Tile", [f(2, 3), [2, 1]], {}),
    ("Concat", [f(2, 3), f(2, 1)], {"axis": -1}),
    ("Split", [f(2, 7), [3, 4]], {"axis": 1}, 2),
    ("Split", [f(2, 7)], {"axis": 1, "num_outputs": 3}, 3),
    ("Slice", [f(5, 6), [1, -2], [9, -5], [0, 1], [2, -1]], {}),
    ("Slice", [f(5), [-99], [-99], [0], [-1]], {}),
    ("Slice", [f(5), [99], [-99], [0], [-2]], {}),
    ("Slice", [f(5, 2), [3], [1]], {}),
    ("Pad", [f(2, 3), [0, 1, 2, 1]], {}),
    ("Pad", [f(4, 5), [0, -1, 2, -1]], {}),
    ("Pad", [f(2, 5), [1, 2], np.float32(0), [1]], {}),
    ("Pad", [f(2, 5), [0, 1, 0, 2]], {"mode": "reflect"}),
    ("Pad", [f(2, 5), [0, 1, 0, 2]], {"mode": "edge"}),
    ("Gather", [f(4, 5), i(2, 3)], {"axis": 1}),
    ("Gather", [f(4, 5), np.int64(-1)], {}),
    ("GatherElements", [f(4, 5), i(2, 5)], {"axis": 0}),
    ("GatherND", [f(4, 5, 6), i(2, 3, 2)], {}),
    ("GatherND", [f(2, 5, 6), i(2, 3, 1)], {"batch_dims": 1}),
    ("ScatterElements", [f(4, 5), i(2, 5), f(2, 5)], {"axis": 0}),
    ("ScatterND", [f(4, 5), i(3, 1), f(3, 5)], {}),
    ("OneHot", [i(2, 3), np.int64(4), f(2)], {"axis": 1}),
    ("ArgMax", [f(2, 3)], {"axis": 1}),
    ("ArgMin", [f(2, 3)], {"axis": -1, "keepdims": 0}),
    ("TopK", [f(2, 5), [3]], {"axis": 1}, 2),
    ("MatMul", [f(2, 1, 3, 4), f(5, 4, 6)], {}),
    ("MatMul", [f(4), f(5, 4, 6)], {}),
    ("MatMul", [f(5, 3, 4), f(4)], {}),
    ("MatMul", [f(4), f(4)], {}),
    ("Gemm", [f(4, 3), f(5, 4), f(5)], {"transA": 1, "transB": 1, "alpha": 0.5}),
    ("QuantizeLinear", [f(2, 3), f(2), u(2)], {"axis": 0}),
    ("QuantizeLinear", [f(2, 3), np.float32(0.1), np.uint8(7)], {}),
    (PRODUCT, [u(2, 6), s(6, 4), np.float32(0.1), f(4), np.uint8(7)], {}),
    ("Einsum", [f(2, 3, 4), f(2, 4, 5)], {"equation": "bij,bjk->bik"}),
    ("Conv", [f(2, 4, 8, 9), f(6, 2, 3, 2), f(6)], {"group": 2, "strides": [2, 1], "pads": [1, 0, 0, 2]}),
    ("Conv", [f(2, 4, 9), f(3, 4, 3)], {"dilations": [2]}),
    ("Conv", [f(1, 2, 4, 5, 6), f(3, 2, 1, 2, 3)], {"kernel_shape": [1, 2, 3]}),
    ("ConvTranspose", [f(2, 4, 5, 6), f(4, 3, 3, 2)], {"strides": [2, 3], "pads": [1, 0, 1, 0], "group": 2}),
    ("ConvTranspose", [f(2, 4, 5), f(4, 3, 3), f(3)], {"strides": [3], "output_padding": [2], "dilations": [2]}),
    ("AveragePool", [f(1, 2, 7, 7)], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [f(1, 2, 8)], {"kernel_shape": [3], "strides": [2], "ceil_mode": 1}),
    ("MaxPool", [f(1, 2, 7, 7)], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("MaxPool", [f(1, 2, 8, 8)], {"kernel_shape": [3, 3], "strides": [3, 3], "ceil_mode": 1, "pads": [1, 1, 1, 1]}, 2),
    ("MaxPool", [f(1, 2, 9)], {"kernel_shape": [2], "dilations": [3]}),
    ("GlobalAveragePool", [f(1, 2, 3, 4)], {}),
    ("GlobalMaxPool", [f(1, 2, 3, 4)], {}),
    ("Resize", [f(1, 2, 4, 5), None, None, [1, 2, 7, 3]], {"mode": "linear"}),
    ("Resize", [f(1, 2, 4, 5), None, np.array([1, 1, 1.7, 0.6], np.float32)], {"mode": "nearest"}),
    ("Resize", [f(1, 2, 4, 5), None, np.array([2, 2.5], np.float32)], {"mode": "cubic", "axes": [2, 3]}),
    ("GridSample", [f(1, 2, 4, 5), f(1, 3, 6, 2)], {"mode": "bilinear"}),
]  # fmt: skip
"""Operator, inputs, attributes, number of results. A list or a scalar is a constant, None is left out."""
KINDS = {
    "float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL, "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8, "int32": TensorProto.INT32, "float64": TensorProto.DOUBLE,
}  # fmt: skip


def model_of(operator, inputs, attributes, num_results=1):
    """Return (bytes of a model of one operation, its feeds, names of its results)."""
    constants, feeds, names = [], {}, []
    for index, value in enumerate(inputs):
        name = f"x{index}" if value is not None else ""
        names.append(name)
        if isinstance(value, list) or (
            value is not None and (np.ndim(value) == 0 or (operator == "Resize" and index > 0))
        ):
            constants.append(numpy_helper.from_array(np.array(value, None if np.size(value) else np.int64), name))
        elif value is not None:
            feeds[name] = value
    results = [f"y{index}" for index in range(num_results)]
    domain, _, operator = operator.rpartition(".")
    node = helper.make_node(operator, names, results, domain=domain, **attributes)
    declared = [
        helper.make_tensor_value_info(name, KINDS[array.dtype.name], array.shape) for name, array in feeds.items()
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in results]
    graph = helper.make_graph([node], "g", declared, outputs, constants)
    opsets = [
        helper.make_opsetid("", 17 if operator.startswith("Reduce") else 18),
        helper.make_opsetid("com.microsoft", 1),
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8), feeds, results


def session_of(data):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run_with_shapes(model, feeds, names):
    """Return the arrays of these values, as ONNX Runtime makes them."""
    return dict(zip(names, session_of(model.SerializeToString()).run(names, feeds), strict=True))


def known_of(arrays):
    return {name: Known(array.dtype.name, array.shape) for name, array in arrays.items()}


def declare(model, arrays):
    """Give the outputs of a graph their dtypes and shapes, without which a graph is refused."""
    for output in model.graph.output:
        array = arrays[output.name]
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        output.CopyFrom(helper.make_tensor_value_info(output.name, kind, [None] * array.ndim))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_a_rule_gives_the_shapes_and_dtypes_of_onnx_runtime(case):
    model, feeds, results = model_of(*case)
    found = run_with_shapes(model, feeds, results)
    declare(model, found)
    sizes = sizes_of(checked_model(model.SerializeToString()), known_of(feeds))
    for name, array in found.items():
        value = sizes.values[name]
        assert value.num_bytes == array.nbytes
        assert (value.dtype, value.shape) == (array.dtype.name, array.shape), name
        if value.numbers is not None:
            np.testing.assert_array_equal(value.numbers, array)


COMPUTED = [
    case
    for case in CASES
    if OPERATORS[case[0]].numbers is not None
    and not (case[0] in INEXACT_ON_FLOATS and np.asarray(case[1][0]).dtype.kind == "f")
    and case[2].get("to") != TensorProto.FLOAT16
]


@pytest.mark.parametrize("case", COMPUTED, ids=lambda case: case[0])
def test_numbers_that_are_known_are_those_of_onnx_runtime(case):
    """With all inputs constant, the numbers of the results are known, and right."""
    model, feeds, results = model_of(*case)
    found = run_with_shapes(model, feeds, results)
    declare(model, found)
    del model.graph.input[:]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in feeds.items())
    sizes = sizes_of(checked_model(model.SerializeToString()), {})
    for name, array in found.items():
        numbers = sizes.values[name].numbers
        assert numbers is not None and numbers.dtype == array.dtype
        np.testing.assert_allclose(numbers, array, rtol=1e-6)


FLOATS = [0.0, -0.0, 0.5, 1.5, -2.5, 0.1, 300.7, 16777217.0, 3e9, -3e9, 1e19, 3e38, 1e-40, np.nan, np.inf, -np.inf]
INTEGERS = [0, 1, 2, 3, 7, 100, 46341, (1 << 31) - 1, 1 << 31, 3037000500, (1 << 53) + 1, 1 << 62, (1 << 63) - 1]
EXTREMES = {
    "float32": FLOATS, "float64": FLOATS, "int64": [*INTEGERS, *(-each - 1 for each in INTEGERS)],
    "int32": [each >> shift for each in INTEGERS[:8] for shift in (0, 1)] + [-1, -7, -(1 << 31)],
    "uint8": [0, 1, 2, 7, 128, 200, 255],
}  # fmt: skip
"""Numbers at which those who compute differ: what overflows, rounds, or is none."""
SEVERAL = {name: 2 for name in BINARY if name not in ("Sum", "Mean")}
ON_NUMBERS = {
    **SEVERAL, "Mod": 2, "Abs": 1, "Neg": 1, "Ceil": 1, "Floor": 1, "Round": 1, "Sign": 1, "Cast": 1, "Range": 3,
    "ReduceSum": 1, "ReduceProd": 1, "ReduceMax": 1, "ReduceMin": 1,
}  # fmt: skip
"""Operator that computes numbers -> how many it takes."""
COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")


@pytest.mark.parametrize("operator", sorted(ON_NUMBERS))
def test_no_number_is_said_to_be_known_that_onnx_runtime_finds_otherwise(operator):
    """A comparison with such a number would decide about any size, and the limits would be those of the other size."""
    rng, known = np.random.default_rng(len(operator)), 0
    for trial in range(40):
        dtype = list(EXTREMES)[trial % len(EXTREMES)]
        shape = () if operator == "Range" else (4,)
        inputs = [rng.choice(np.array(EXTREMES[dtype], dtype), shape) for _ in range(ON_NUMBERS[operator])]
        attributes = {"to": [TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8][trial % 3]}
        attributes = attributes if operator == "Cast" else {"fmod": trial % 2} if operator == "Mod" else {}
        model, feeds, results = model_of(operator, inputs, attributes)
        before = copy.deepcopy(model)
        kind = helper.tensor_dtype_to_np_dtype(attributes["to"]) if operator == "Cast" else dtype
        declare(model, {results[0]: np.ones(shape or 1, bool if operator in COMPARISONS else kind)})
        del model.graph.input[:]
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in feeds.items())
        try:
            value = sizes_of(checked_model(model.SerializeToString()), {}).values[results[0]]
        except WrongError:  # some integers end the process when they are divided
            continue
        if value.num_elements > 1000:
            continue
        try:
            found = run_with_shapes(before, feeds, results)[results[0]]
        except Exception as error:  # it does not take this dtype
            assert type(error).__module__.startswith("onnxruntime")
            continue
        assert value.shape == found.shape, inputs
        if value.numbers is not None:
            np.testing.assert_array_equal(value.numbers, found, err_msg=str(inputs))
            known += 1
    assert known, "numbers that are exact are known"


def arrays_of(known):
    return np.ones(known.shape, known.dtype)


@pytest.mark.parametrize("name", sorted(path.stem for path in STORES.glob("*-export.zip")))
def test_all_values_of_exported_kernels_have_the_shapes_that_were_computed(name, tmp_path):
    """In the example of each program, every value that an operation makes."""
    with Store(unpack(name, tmp_path)) as store:
        for kernel, inputs in example_inputs(store).items():
            data = store.read_file(store.manifest.graphs[kernel])
            values = sizes_of(checked_model(data), inputs).values
            model = onnx.load_from_string(data)
            made = [name for node in model.graph.node for name in node.output if name]
            del model.graph.output[:]
            model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
            feeds = {each.name: arrays_of(inputs[each.name]) for each in model.graph.input}
            for each, array in run_with_shapes(model, feeds, made).items():
                assert values[each][:2] == (array.dtype.name, array.shape), (kernel, each)
                if values[each].numbers is not None:
                    np.testing.assert_array_equal(values[each].numbers, array)


def example_inputs(store):
    """Kernel -> what is known of the inputs of one of its steps in the example."""
    program, found = store.program, {}
    values, tensors = program.values(), store.manifest.tensors()
    for step in program.steps():
        known = {}
        for port, name in step.reads.items():
            known[port] = Known(values[name].dtype, tuple(values[name].shape(*program.example)))
        for port, name in (*step.weights.items(), *step.constants.items()):
            dtype, shape = DTYPES[tensors[name][1].dtype].numpy, tensors[name][1].shape
            known[port] = Known(np.dtype(dtype).name, tuple(shape))
        found[step.kernel] = known
    return found


@pytest.mark.parametrize(
    ("case", "mention"),
    [
        (("Expand", [f(2, 3), [1] * 13], {}), "makes 13 axes"),
        (("Add", [f(2, 3), f(4)], {}), "shapes"),
        (("Reshape", [f(2, 3), i(2)], {}), "the shape depends on the values of inputs"),
        (("Range", [i(1), np.int64(9), np.int64(3)], {}), "Range: the limits depend on the values of inputs"),
        (("Div", [i(3), i(3)], {}), "an integer divisor depends on the values of inputs"),
        (("Mod", [i(3), [0]], {}), "an integer divisor of 0 or -1"),
        (("Conv", [f(1, 2, 5), f(1, 2, 3)], {"strides": [0]}), "windows"),
        (("MaxPool", [f(1, 2, 5)], {"kernel_shape": [2], "pads": [2, 2]}), "such pads"),
        (("AveragePool", [f(1, 2, 5)], {"kernel_shape": [2], "auto_pad": "SAME_UPPER"}), "auto_pad"),
        (("ConvTranspose", [f(1, 2, 5), f(2, 1, 3)], {"strides": [-1]}), "windows"),
        (("DepthToSpace", [f(1, 8, 2, 2)], {"blocksize": 0}), "does not take"),
        (("TopK", [f(2, 5), [6]], {"axis": 1}, 2), "the first 6 of"),
        (("ReduceMax", [f(2, 5)], {"keepdims": 2}), "keepdims 2"),
        (("Transpose", [f(2, 5)], {"perm": [0, 0]}), "the permutation"),
        (("Slice", [f(5), [0], [5], [0], [0]], {}), "such slices"),
        (("Slice", [f(5), [-1], [(1 << 63) - 1], [0], [-1]], {}), "the end 9223372036854775807 of a slice backwards"),
        (("Slice", [f(5), [-1], [(1 << 31) - 1], [0], [-1]], {}), "the end 2147483647 of a slice backwards"),
        (("Range", [np.int64((1 << 63) - 1), np.int64(-(1 << 63)), np.int64(1)], {}), "the range from"),
        (("Range", [np.int64(0), np.int64((1 << 62) + 1), np.int64(1 << 61)], {}), "the range from"),
        (("Range", [np.int64(0), np.int64(1 << 53), np.int64(1 << 52)], {}), "the range from"),
        (("Range", [np.float32(1e-9), np.float32(1), np.float32(1)], {}), "the range from"),
        (("Resize", [f(1, 1, 4), None, np.array([1, 1, np.inf], np.float32)], {}), "such scales"),
        (("Einsum", [f(2, 3), f(3, 4)], {"equation": "ij,jk->iz"}), "ij,jk->iz"),
        (("GatherND", [f(2, 3), i(2, 3)], {}), "indices"),
        (("LayerNormalization", [f(2, 3), f(2)], {}), "does not take"),
        (("QuantizeLinear", [f(2, 3), f(3), u(3)], {"axis": 0}), "scales"),
        (("QuantizeLinear", [f(2, 3), f(2), u(3)], {"axis": 0}), "zero points"),
        (("QuantizeLinear", [f(2, 3), f(1), u(1)], {"axis": 0}), "scales"),
        (("QuantizeLinear", [f(2, 3), f(2, 3), u(2, 3)], {"axis": 0}), "scales"),
        (("QuantizeLinear", [f(2, 3), f(2), u(2)], {"axis": 5}), "axes"),
        (("QuantizeLinear", [f(2, 3), f(2), s(2)], {"axis": 0}), "such types"),
        (("QuantizeLinear", [i(2, 3), f(2), u(2)], {"axis": 0}), "such types"),
        (("QuantizeLinear", [f(2, 3), f(2)], {"axis": 0}), "lacks an input"),
        ((PRODUCT, [u(2, 6), s(5, 4), np.float32(1), f(4), np.uint8(7)], {}), "shapes"),
        ((PRODUCT, [u(2, 6), s(6, 4), np.float32(1), f(3), np.uint8(7)], {}), "scales"),
        ((PRODUCT, [u(2, 6), s(6, 4), f(2), f(4), np.uint8(7)], {}), "scales"),
        ((PRODUCT, [u(2, 6), s(6, 4), np.float32(1), f(4), u(2)], {}), "scales"),
        ((PRODUCT, [u(1, 2, 6), s(6, 4), np.float32(1), f(4), np.uint8(7)], {}), "shapes"),
        ((PRODUCT, [s(2, 6), s(6, 4), np.float32(1), f(4), np.uint8(7)], {}), "types"),
        ((PRODUCT, [u(2, 6), s(6, 4), np.float32(1), f(4)], {}), "lacks an input"),
        ((PRODUCT, [u(2, 6), s(6, 4), np.float32(1), f(4), np.uint8(7), np.int8(1)], {}), "zero points of weights"),
        ((PRODUCT, [u(2, 0), s(0, 4), np.float32(1), f(4), np.uint8(7)], {}), "shapes"),
        # attributes and numbers
        (("Softmax", [f(2, 3)], {"axis": 1.0}), "the attribute 'axis' has another type"),
        (("Transpose", [f(2, 3)], {"perm": [0.0, 1.0]}), "the attribute 'perm' has another type"),
        (("Expand", [f(2, 1), [2.0, 3.0]], {}), "the shape float64"),
        (("Expand", [f(2, 1), [[2, 3]]], {}), r"the shape int64 \(1, 2\)"),
        (("Softmax", [f(2, 3)], {"axis": 2}), r"axes \(2,\) of 2"),
        (("Softmax", [f(2, 3)], {"axis": -3}), r"axes \(-3,\) of 2"),
        (("Unsqueeze", [f(2, 3), [0, -4]], {}), "twice"),
        # elementwise
        (("Clip", [f(2), f(2)], {}), "limits that are not numbers"),
        (("Clip", [f(2), np.float32(0), f(1)], {}), "limits that are not numbers"),
        (("Cast", [f(2)], {"to": 0}), "this element type"),
        (("Cast", [f(2)], {"to": TensorProto.STRING}), "this element type"),
        (("LayerNormalization", [f(2, 3), None], {}), "does not take 0"),
        (("LayerNormalization", [f(2, 1), f(3)], {}), "does not take 0"),
        (("InstanceNormalization", [f(2), f(2), f(2)], {}), r"does not take \(2,\)"),
        (("BatchNormalization", [f(2, 3), *[f(3)] * 4], {"training_mode": 1}), r"does not take \(2, 3\)"),
        (("InstanceNormalization", [f(2, 3, 4), f(3), f(2)], {}), "another number of channels"),
        (("InstanceNormalization", [f(2, 3, 4), None, f(3)], {}), "another number of channels"),
        # sizes
        (("Constant", [], {"value_int": 1, "value_float": 2.0}), "several values"),
        (("ConstantOfShape", [[2]], {"value": numpy_helper.from_array(f(2))}), "a value of another size"),
        (("Range", [np.int64(0), np.int64(9), np.int64(0)], {}), "a step of 0"),
        (("Range", [np.float32(0), np.float32(np.inf), np.float32(1)], {}), "a step of 0"),
        (("Reshape", [f(2, 3), [3, 2, 0]], {}), "the shape"),
        (("Reshape", [f(2, 3), [-2, -3]], {}), "the shape"),
        (("Reshape", [f(2, 3), [-1, -1]], {}), "the shape"),
        (("Reshape", [f(2, 3), [4, -1]], {}), "as"),
        (("Reshape", [f(0, 3), [0, -1]], {"allowzero": 1}), "as"),
        (("Reshape", [f(2, 3), [2, 4]], {}), "as"),
        (("Flatten", [f(2, 3)], {"axis": 3}), "axis 3"),
        (("Flatten", [f(2, 3)], {"axis": -3}), "axis -3"),
        (("Squeeze", [f(2, 1), [0]], {}), "axes"),
        (("Transpose", [f(2, 5)], {"perm": [0]}), "the permutation"),
        # repeated, joined and cut
        (("Expand", [f(1, 3), [-1, 3]], {}), "the shape"),
        (("Tile", [f(2, 3), [2]], {}), "repeats"),
        (("Tile", [f(2, 3), [2, -1]], {}), "repeats"),
        (("Concat", [f(2, 3), f(3, 3)], {"axis": 1}), "shapes"),
        (("Concat", [f(2, 3), f(2)], {"axis": 1}), "shapes"),
        (("Split", [f(2, 7), [3, 3]], {"axis": 1}, 2), "parts"),
        (("Split", [f(2, 7), [8, -1]], {"axis": 1}, 2), "parts"),
        (("Split", [f(2, 7), [3, 3, 1]], {"axis": 1}, 2), "parts"),
        (("Split", [f(2, 7)], {"axis": 1, "num_outputs": 3}, 2), "another number of parts"),
        (("Split", [f(2, 2)], {"axis": 1}, 4), "parts"),
        (("Slice", [f(5, 5), [0, 0], [5]], {}), "such slices"),
        (("Slice", [f(5, 5), [0], [5], [0, 1]], {}), "such slices"),
        (("Slice", [f(5, 5), [0], [5], [0], [1, 1]], {}), "such slices"),
        (("Pad", [f(2, 3), [1, 1]], {}), "pads"),
        (("Pad", [f(2, 3), [0, -2, 0, -2]], {}), "pads"),
        (("Pad", [f(2, 3), [0, 3, 0, 0]], {"mode": "reflect"}), "pads"),
        (("Pad", [f(2, 3), [0, 0, 0, 3]], {"mode": "edge"}), "pads"),
        (("Pad", [f(2, 3), [0, -1, 0, 0]], {"mode": "reflect"}), "pads"),
        # by indices
        (("Gather", [np.float32(1), i(2)], {}), "axes"),
        (("GatherElements", [f(4, 5), i(2)], {}), "indices"),
        (("GatherElements", [f(4, 5), i(2, 6)], {}), "indices"),
        (("GatherND", [f(2, 3), i(2, 1)], {"batch_dims": -1}), "batch_dims"),
        (("GatherND", [f(2, 3), i(2, 3)], {"batch_dims": 2}), "batch_dims"),
        (("GatherND", [f(2, 3), i(3, 1)], {"batch_dims": 1}), "batch_dims"),
        (("GatherND", [f(2, 3), i(2, 0)], {}), "indices"),
        (("GatherND", [f(2, 3), i(2, 2)], {"batch_dims": 1}), "indices"),
        (("ScatterND", [f(4, 5), i(3, 1), f(3, 4)], {}), "updates"),
        (("ScatterND", [f(4, 5), i(3, 3), f(3)], {}), "indices"),
        (("ScatterND", [f(4, 5), i(3, 0), f(3, 4, 5)], {}), "indices"),
        (("ScatterElements", [f(4, 5), i(2, 5), f(2, 4)], {}), "updates"),
        (("ScatterElements", [f(4, 5), i(2), f(2)], {}), "updates"),
        (("ScatterElements", [f(4, 5), i(2, 5), f(2, 5)], {"axis": 2}), "axes"),
        (("OneHot", [i(2), np.int64(-1), f(2)], {}), "such a depth"),
        (("OneHot", [i(2), [4, 4], f(2)], {}), "such a depth"),
        (("OneHot", [i(2), np.int64(4), f(3)], {}), "such a depth"),
        (("OneHot", [i(2), np.int64(4), f(2)], {"axis": 2}), "axes"),
        # along axes
        (("ArgMax", [f(2, 0)], {"axis": 1}), "an empty axis"),
        (("TopK", [f(2, 5), [-1]], {"axis": 1}, 2), "the first -1 of"),
        (("TopK", [f(2, 5), [1, 1]], {"axis": 1}, 2), "the first 1 of"),
        (("ReduceMax", [f(2, 5)], {"axes": [2]}), "axes"),
        # products
        (("MatMul", [f(2, 3), np.float32(1)], {}), "shapes"),
        (("MatMul", [np.float32(1), f(2, 3)], {}), "shapes"),
        (("MatMul", [f(2, 3), f(4, 3)], {}), "shapes"),
        (("MatMul", [f(2, 2, 3), f(3, 3, 4)], {}), "shapes"),
        (("Gemm", [f(2, 3), f(3)], {}), "shapes"),
        (("Gemm", [f(2, 3), f(2, 3)], {}), "shapes"),
        (("Gemm", [f(2, 3), f(3, 4), f(5, 2, 4)], {}), "shapes"),
        (("Einsum", [f(2, 3), f(3, 4)], {"equation": "ij,jk"}), "ij,jk"),
        (("Einsum", [f(2, 3)], {"equation": "...j->j"}), "does not take"),
        (("Einsum", [f(2, 3)], {"equation": "ij,jk->ik"}), "ij,jk->ik"),
        (("Einsum", [f(2, 3), f(3)], {"equation": "ij,jk->ik"}), "as 'jk'"),
        (("Einsum", [f(2, 3), f(4, 5)], {"equation": "ij,jk->ik"}), "as 'jk'"),
        (("Einsum", [f(2, 3)], {"equation": "ij->ii"}), "ij->ii"),
        # over places
        (("Conv", [f(1, 2, 2, 2, 2, 2), f(1, 2, 1, 1, 1, 1)], {}), "windows"),
        (("Conv", [f(1, 2, 5), f(1, 2, 3)], {"strides": [1, 1]}), "windows"),
        (("Conv", [f(1, 2, 5), f(1, 2, 3)], {"dilations": [1, 1]}), "windows"),
        (("Conv", [f(1, 2, 5), f(1, 2, 3)], {"dilations": [0]}), "windows"),
        (("Conv", [f(1, 2, 5), f(1, 2, 3)], {"pads": [1]}), "pads"),
        (("Conv", [f(1, 2, 5), f(1, 2, 3)], {"pads": [1, -1]}), "pads"),
        (("Conv", [f(1, 2, 5), f(1, 2, 3)], {"kernel_shape": [2]}), "kernels"),
        (("Conv", [f(1, 2, 5), f(1, 2, 6)], {}), "windows of 6 in 5 places"),
        (("Conv", [f(1, 2, 5), f(1, 2, 2, 2)], {}), "weights"),
        (("Conv", [f(1, 2), f(1, 2)], {}), "weights"),
        (("Conv", [f(1, 2, 5), f(2, 1, 3)], {"group": 0}), "weights"),
        (("Conv", [f(1, 2, 5), f(2, 2, 3)], {"group": 2}), "weights"),
        (("Conv", [f(1, 2, 5), f(3, 1, 3)], {"group": 2}), "weights"),
        (("Conv", [f(1, 2, 5), f(2, 2, 3), f(3)], {}), "a bias"),
        (("Conv", [f(1, 2, 5), f(1, 2, 3)], {"auto_pad": "VALID", "pads": [1, 0]}), "auto_pad"),
        (("AveragePool", [f(1, 2, 5)], {"kernel_shape": [0]}), "windows"),
        (("AveragePool", [f(1, 2, 5)], {}), "windows"),
        (("AveragePool", [f(1, 2)], {"kernel_shape": [1]}), "does not take"),
        (("MaxPool", [f(1, 2, 5)], {"kernel_shape": [2], "storage_order": 1}), "does not take"),
        (("MaxPool", [f(1, 2, 5)], {"kernel_shape": [2], "pads": [0, 2]}), "such pads"),
        (("MaxPool", [f(1, 2, 0)], {"kernel_shape": [2], "pads": [1, 1], "ceil_mode": 1}), "windows"),
        (("ConvTranspose", [f(1, 2, 5), f(2, 1, 3, 3)], {}), "weights"),
        (("ConvTranspose", [f(1, 2, 5), f(3, 1, 3)], {}), "weights"),
        (("ConvTranspose", [f(1, 3, 5), f(3, 1, 3)], {"group": 2}), "weights"),
        (("ConvTranspose", [f(1, 2, 5), f(2, 1, 3)], {"group": 0}), "weights"),
        (("ConvTranspose", [f(1, 2, 5), f(2, 3, 3), f(3)], {"group": 2}), "a bias"),
        (("ConvTranspose", [f(1, 2, 5), f(2, 1, 3)], {"kernel_shape": [2]}), "kernels"),
        (("ConvTranspose", [f(1, 2, 5), f(2, 1, 3)], {"output_padding": [0, 0]}), "kernels"),
        (("ConvTranspose", [f(1, 2, 5), f(2, 1, 3)], {"output_padding": [-1]}), "kernels"),
        (("ConvTranspose", [f(1, 2, 5), f(2, 1, 3)], {"output_padding": [2], "strides": [2]}), "output_padding"),
        (("ConvTranspose", [f(1, 2, 0), f(2, 1, 3)], {}), "output_padding"),
        (("ConvTranspose", [f(1, 2, 1), f(2, 1, 2)], {"pads": [1, 1]}), "pads"),
        (("GlobalMaxPool", [f(1, 2)], {}), "does not take"),
        (("GlobalMaxPool", [f(1, 2, 0)], {}), "does not take"),
        (("Resize", [f(1, 1, 4), None, None, [1, 1, 8]], {"keep_aspect_ratio_policy": "not_larger"}), "this keep_as"),
        (("Resize", [f(1, 1, 4), None, None, [1, 1, 8]], {"coordinate_transformation_mode": "tf_crop_and_resize"}),
         "a crop"),
        (("Resize", [f(1, 1, 0), None, None, [1, 1, 8]], {}), "does not take"),
        (("Resize", [f(1, 1, 4), None, None, [1, 1, 0]], {}), "sizes"),
        (("Resize", [f(1, 1, 4), None, None, [1, 8]], {}), "sizes"),
        (("Resize", [f(1, 1, 4), None, np.array([1, 2], np.float32)], {}), "such scales"),
        (("Resize", [f(1, 1, 4), None, np.array([1, 1, 0], np.float32)], {}), "such scales"),
        (("Resize", [f(1, 1, 4), None, np.array([1, 1, 1 << 20], np.float32)], {}), "such scales"),
        (("Resize", [f(1, 1, 4)], {}), "the scales depend on"),
        (("DepthToSpace", [f(1, 6, 2, 2)], {"blocksize": 2}), "does not take"),
        (("DepthToSpace", [f(8, 2, 2)], {"blocksize": 2}), "does not take"),
        (("SpaceToDepth", [f(1, 2, 3, 4)], {"blocksize": 2}), "does not take"),
        (("SpaceToDepth", [f(1, 2, 4, 3)], {"blocksize": 2}), "does not take"),
        (("SpaceToDepth", [f(2, 4, 4)], {"blocksize": 2}), "does not take"),
        (("SpaceToDepth", [f(1, 2, 4, 4)], {"blocksize": 0}), "does not take"),
        (("GridSample", [f(1, 2, 4, 5), f(1, 3, 6, 3)], {}), "does not take"),
        (("GridSample", [f(1, 2, 4, 5), f(2, 3, 6, 2)], {}), "does not take"),
        (("GridSample", [f(1, 2, 4, 5, 6), f(1, 3, 6, 6, 2)], {}), "does not take"),
        (("GridSample", [f(1, 2, 0, 5), f(1, 3, 6, 2)], {}), "does not take"),
    ],
)  # fmt: skip
def test_what_a_rule_does_not_take_is_refused_with_the_reason(case, mention):
    model, feeds, results = model_of(*case)
    for name, output in zip(results, model.graph.output, strict=True):
        output.CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    with pytest.raises(WrongError, match=mention):
        sizes_of(checked_model(model.SerializeToString()), known_of(feeds))


WORK = [
    (("Add", [f(2, 1, 3), f(4, 3)], {}), 24, 0, 0),
    (("Gather", [f(4, 5), i(2, 3)], {"axis": 1}), 24, 0, 0),
    (("LayerNormalization", [f(2, 3, 4), f(4)], {}), 24, 2 * 6, 0),
    (("LayerNormalization", [f(2, 3, 4), f(3, 4)], {"axis": 1}), 24, 2 * 2, 0),
    (("TopK", [f(2, 5), [3]], {"axis": 1}, 2), 2 * 6, 0, 64 * (6 + 10)),
    (("MatMul", [f(2, 1, 3, 4), f(5, 4, 6)], {}), 180, 0, 180 * 4),
    (("Gemm", [f(4, 3), f(5, 4), f(5)], {"transA": 1, "transB": 1}), 15, 0, 15 * 4),
    (("Gemm", [f(3, 4), f(4, 5)], {}), 15, 0, 15 * 4),
    ((PRODUCT, [u(2, 6), s(6, 4), np.float32(0.1), f(4), np.uint8(7)], {}), 8, 0, 8 * 6),
    (("Einsum", [f(2, 3)], {"equation": "ij->j"}), 3, 0, 6),
    (("Einsum", [f(2, 3, 4), f(2, 4, 5)], {"equation": "bij,bjk->bik"}), 30, 0, 120),
    (("Einsum", [f(2, 3), f(3, 4), f(4, 5)], {"equation": "ij,jk,kl->il"}), 10, 120, 2 * 120),
    (("Conv", [f(2, 4, 8, 9), f(6, 2, 3, 2)], {"group": 2, "strides": [2, 1], "pads": [1, 0, 0, 2]}), 480, 0, 480 * 12),
    (("ConvTranspose", [f(2, 4, 5, 6), f(4, 3, 3, 2)], {"strides": [2, 3], "pads": [1, 0, 1, 0], "group": 2}),
     2 * 6 * 9 * 17, 3 * 6 * 30, 240 * 18),
    (("AveragePool", [f(1, 2, 7, 7)], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
     32, 0, 8 * 32 * 6),
    (("AveragePool", [f(1, 2, 8)], {"kernel_shape": [3], "strides": [2], "ceil_mode": 1}), 8, 0, 8 * 8 * 3),
    (("MaxPool", [f(1, 2, 8)], {"kernel_shape": [2], "auto_pad": "VALID"}), 14, 0, 8 * 14 * 2),
    (("Resize", [f(1, 2, 4, 5), None, None, [1, 2, 7, 3]], {}), 42, 0, 64 * (42 + 40)),
    (("GridSample", [f(1, 2, 4, 5), f(1, 3, 6, 2)], {}), 36, 0, 64 * (36 + 40)),
]  # fmt: skip
"""Case, elements of its results, elements of arrays that it needs meanwhile, multiply-adds; all by hand."""


@pytest.mark.parametrize("row", WORK, ids=lambda row: row[0][0])
def test_work_and_memory_are_those_that_the_shapes_say(row):
    case, made, meanwhile, products = row
    model, feeds, results = model_of(*case)
    declare(model, run_with_shapes(model, feeds, results))
    sizes = sizes_of(checked_model(model.SerializeToString()), known_of(feeds))
    elements = sum(np.size(value) for value in case[1] if value is not None) + made + meanwhile
    assert sizes.work == ELEMENT_WORK * elements + products
    assert sizes.made_bytes == sum(sizes.values[name].num_bytes for name in results)
    assert sizes.num_bytes - sizes.made_bytes == 4 * meanwhile


MIB = 1 << 20
W = Known("float32", (20, 30))
READS = [
    # what is read, of 400 bytes in the example: growth of the values, places, elements with those of the weight
    (Known("float32", (5, 20)), 1, 100, 700),
    (Known("float32", (5, 10)), 1, 50, 650),
    (Known("float32", (10, 20)), 2, 200, 800),
    (Known("float32", (2, 5, 20)), 2, 40, 800),
    (Known("float32", (2, 20, 5)), 2, 40, 800),
    (Known("float64", (4, 5, 0)), 1, 0, 600),
    (None, 1, 1, 600),
]


@pytest.mark.parametrize(("read", "growth", "places", "elements"), READS)
def test_a_kernel_may_take_what_its_example_its_inputs_and_its_weights_account_for(read, growth, places, elements):
    allowance = Allowance({"r0": 400}, MIB)
    inputs = {"w0": W, **({} if read is None else {"r0": read})}
    allowed = 32 * MIB + 32 * MIB * growth**2 + 4 * 4 * 600
    accounted = 8 * elements * places
    assert allowance.taken(Sizes({}, allowed, 7, accounted + 3), inputs) == (3, 7, 0)
    assert allowance.taken(Sizes({}, allowed - 5, 7, accounted), inputs) == (0, 7, 5)
    assert allowance.taken(Sizes({}, 0, 0, max(accounted - 1, 0)), inputs) == (0, 0, allowed)
    with pytest.raises(TooLargeError, match="more than"):
        allowance.taken(Sizes({}, allowed + 1, 7, 0), inputs)


def test_a_pass_may_take_some_work_that_its_inputs_do_not_account_for():
    require_time(1 << 29)
    with pytest.raises(TooLargeError):
        require_time((1 << 29) + 1)


def of_versions(standard, more=1):
    model, *_ = model_of("Relu", [f(2)], {})
    del model.graph.output[:]
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("", standard), helper.make_opsetid("com.microsoft", more)])
    return model.SerializeToString()


def of_operations(count):
    nodes = [
        helper.make_node("Relu", ["x0" if index == 0 else f"y{index}"], [f"y{index + 1}"]) for index in range(count)
    ]
    model, *_ = model_of("Relu", [f(2)], {})
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.output[:]
    return model.SerializeToString()


def test_models_have_operators_of_known_versions_and_at_most_so_many():
    for versions in ((13,), (18,)):
        assert checked_model(of_versions(*versions))
    for versions in ((12,), (19,), (18, 0), (18, 2)):
        with pytest.raises(UnlistedError, match="version"):
            checked_model(of_versions(*versions))
    assert len(checked_model(of_operations(4096)).graph.nodes) == 4096
    with pytest.raises(WrongError, match="4097 operations, more than 4096"):
        checked_model(of_operations(4097))


def test_values_have_at_most_so_many_elements_and_axes():
    for sizes in ([1 << 20, 1 << 20, 1], [1] * 12):
        model, feeds, results = model_of("Expand", [f(1), sizes], {})
        declare(model, {results[0]: f(*[1] * len(sizes))})
        assert sizes_of(checked_model(model.SerializeToString()), known_of(feeds)).values[results[0]].shape == (*sizes,)
    model, feeds, results = model_of("Expand", [f(1), [1 << 20, 1 << 20, 2]], {})
    declare(model, {results[0]: f(1, 1, 1)})
    with pytest.raises(TooLargeError, match="Expand makes"):
        sizes_of(checked_model(model.SerializeToString()), known_of(feeds))


@pytest.mark.parametrize(("count", "is_known"), [(4096, True), (4097, False)])
def test_numbers_are_known_up_to_so_many(count, is_known):
    for operator, inputs in (("Neg", [[1] * count]), ("ConstantOfShape", [[count]])):
        model, feeds, results = model_of(operator, inputs, {})
        declare(model, run_with_shapes(model, feeds, results))
        found = sizes_of(checked_model(model.SerializeToString()), known_of(feeds)).values[results[0]]
        assert (found.numbers is not None) is is_known


def test_every_operator_of_the_table_has_a_case():
    assert {case[0] for case in CASES} == set(OPERATORS)
