"""A captured program made by hand: two layers `relu(x W^T + c)` over tokens, an exit between them, the mean in the end.

Shapes: B rows, S places, H hidden, C labels.
"""

import json

import numpy as np
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from offramp.program.program import (
    BATCH,
    BEGIN,
    CAPTURED,
    END,
    EXIT_KERNEL,
    LAYER,
    Call,
    Input,
    Kernel,
    Module,
    Output,
    Part,
    Program,
    Stage,
    Step,
    Value,
)  # fmt: skip
from offramp.store import Manifest, StoreWriter
from offramp.store.exits import describe_exits
from offramp.store.manifest import Source, captured_file

PLACES, HIDDEN, LABELS = 3, 4, ("no", "yes")
WIDE = Value("float32", (BATCH, PLACES, HIDDEN))


def v(name):
    return {"v": name}


TORCH = {
    "layer": {
        "inputs": {"r": 1, "w": 1, "c": 1},
        "nodes": [
            ["n0", "aten.linear.default", [v("r0"), v("w0"), v("c0")], {}],
            ["n1", "aten.relu.default", [v("n0")], {}],
        ],
        "outputs": ["n1"],
    },
    "mean": {
        "inputs": {"r": 1, "w": 1, "c": 0},
        "nodes": [
            ["n0", "aten.mean.dim", [v("r0"), [1]], {}],
            ["n1", "aten.linear.default", [v("n0"), v("w0")], {}],
        ],
        "outputs": ["n1"],
    },
}  # fmt: skip


def onnx_graphs():
    """The same two kernels as ONNX graphs."""
    floats = TensorProto.FLOAT
    layer = [
        helper.make_node("Transpose", ["w0"], ["t"]),
        helper.make_node("MatMul", ["r0", "t"], ["m"]),
        helper.make_node("Add", ["m", "c0"], ["a"]),
        helper.make_node("Relu", ["a"], ["out"]),
    ]
    mean = [
        helper.make_node("ReduceMean", ["r0"], ["m"], axes=[1], keepdims=0),
        helper.make_node("Transpose", ["w0"], ["t"]),
        helper.make_node("MatMul", ["m", "t"], ["out"]),
    ]
    hidden = helper.make_tensor_value_info("r0", floats, ["B", PLACES, HIDDEN])
    square = helper.make_tensor_value_info("w0", floats, [HIDDEN, HIDDEN])
    constant = helper.make_tensor_value_info("c0", floats, [HIDDEN])
    narrow = helper.make_tensor_value_info("w0", floats, [len(LABELS), HIDDEN])
    outs = [
        helper.make_tensor_value_info("out", floats, shape) for shape in (["B", PLACES, HIDDEN], ["B", len(LABELS)])
    ]
    graphs = {
        "layer": helper.make_graph(layer, "layer", [hidden, square, constant], [outs[0]]),
        "mean": helper.make_graph(mean, "mean", [hidden, narrow], [outs[1]]),
    }
    opsets = [helper.make_opsetid("", 13)]
    return {name: helper.make_model(graph, opset_imports=opsets, ir_version=7).SerializeToString()
            for name, graph in graphs.items()}  # fmt: skip


def program():
    layers = [
        Step("layer", {"r0": before}, {after: WIDE}, {"w0": f"{after}.weight"}, {"c0": "shift"}, (after,))
        for before, after in (("x", "h0"), ("h0", "h1"))
    ]
    answer = Step("mean", {"r0": "h1"}, {"y": Value("float32", (BATCH, len(LABELS)))}, {"w0": "y.weight"}, {}, ("y",))
    shards = (("h0",), ("h1", "y"))
    parts = tuple(Part(names, None if i == 0 else Call("layer", i), (), None) for i, names in enumerate(shards))
    return Program(
        {"x": Input("float32", (BATCH, PLACES, HIDDEN))},
        {},
        {"layer": Kernel(CAPTURED), "mean": Kernel(CAPTURED), EXIT_KERNEL: Kernel("pooled-linear")},
        (
            Stage("inputs", BEGIN),
            Stage("layer.0", LAYER, (layers[0],), "h0"),
            Stage("layer.1", LAYER, (layers[1], answer)),
            Stage("answer", END),
        ),
        Output("y", "single_label_classification", len(LABELS)),
        module=Module("Toy", "0" * 64, {}, parts, {}, (), (), (), ()),
        activation_bytes=1000,
        example=(2, 1),
    )


def weights():
    """Shard -> tensor -> array."""
    rng = np.random.default_rng(0)
    square, narrow = (HIDDEN, HIDDEN), (len(LABELS), HIDDEN)
    tensors = {"h0.weight": square, "h1.weight": square, "y.weight": narrow, "shift": (HIDDEN,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in tensors.items()}
    return {name.partition(".")[0]: {name: array} for name, array in arrays.items()}


def write_captured(path, graphs=True):
    """Write the store, with an exit; returns its path."""
    with StoreWriter(path, "0" * 64) as writer:
        shards = {}
        for shard, tensors in weights().items():
            entries = [(name, name, "F32", array.shape) for name, array in tensors.items()]
            shards[shard] = writer.add_shard(shard, entries, lambda name, held=tensors: [held[name].data])
        files = tuple(writer.add_file(captured_file(name), json.dumps(tree).encode()) for name, tree in TORCH.items())
        made = {name: writer.add_graph(name, data, 13, 7) for name, data in onnx_graphs().items()} if graphs else {}
        heads = {"exit.1.weight": np.ones((2, HIDDEN), np.float32), "exit.1.bias": np.zeros(2, np.float32)}
        folder = path.with_name(path.name + "-exits")
        folder.mkdir()
        save_file(heads, folder / "exits.safetensors")
        (folder / "exits.json").write_bytes(describe_exits("mean-linear", 2))
        exits = writer.add_exits(folder / "exits.safetensors", folder / "exits.json")
        source = Source("0" * 64, "Toy", "toy", "export")
        labels = writer.add_labels(LABELS)
        return writer.finish(Manifest(source, program(), shards, made, files, exits, labels=labels))


def expected(x):
    """(exit logits, logits) in NumPy, with the heads of `write_captured`."""
    arrays = {name: array for tensors in weights().values() for name, array in tensors.items()}
    h0 = np.maximum(x @ arrays["h0.weight"].T + arrays["shift"], 0)
    h1 = np.maximum(h0 @ arrays["h1.weight"].T + arrays["shift"], 0)
    exit_head = np.ones((2, HIDDEN), np.float32)
    return h0.mean(1) @ exit_head.T, h1.mean(1) @ arrays["y.weight"].T
