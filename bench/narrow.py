"""The int8 kernels on the layers of a random BERT-base: `python bench/narrow.py products`, and `exact`.

`products` runs the twelve layers for one row of 128 tokens, all weights in memory, in interleaved rounds: the kernels
with float32 and with integer weights, the latter also with weights as constants, which ONNX Runtime packs; and ONNX
Runtime's own int8 (`quantize_dynamic` of a plain export), which also has the embedding and the head. Medians, and their
ratios to the last. `--only` measures some of them, and the memory that each adds.

`exact` compares sums of ONNX Runtime's integer products with those of NumPy's int64, for neighbouring weights that are
together as large as stores have them, and larger.
For another processor than this one: `qemu-x86_64 -cpu Haswell python bench/narrow.py exact` (AVX2, no VNNI).

Shapes: S tokens, H hidden, I intermediate.
"""

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from offramp.backends.onnx_session import open_session
from offramp.backends.onnx_templates import BUILDERS, INTEGER_PRODUCT, UNFUSED
from offramp.program.encoder import attributes_of
from offramp.program.narrow import CHOSEN_EXACT, LARGEST_PAIR, LARGEST_WEIGHT, LOW_ZERO_POINT, MOST_ROTATED, SUFFIX

NUM_TOKENS, NUM_LAYERS = 128, 12
SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_heads": 12, "norm_epsilon": 1e-12, "activation": "gelu"}
KERNELS = ("attention", "up", "down")
RUNS = ("float32", "int8", "int8 constants", "ONNX Runtime int8")
ROUNDING = {"rotation": MOST_ROTATED, "exact": CHOSEN_EXACT, "zero_point": LOW_ZERO_POINT}
STORE: Any = None
"""Named by errors only."""


def resident_bytes():
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def graph(template):
    return BUILDERS[template](attributes_of(template, {**SIZES, **ROUNDING}))


def random_weights(session, seed):
    """Weights for the inputs of a kernel: those of fixed size, which are not values."""
    rng, found = np.random.default_rng(seed), {}
    for node in session.get_inputs():
        if node.type == "tensor(int8)":
            found[node.name] = rng.integers(-LARGEST_PAIR // 2, LARGEST_PAIR // 2, node.shape, np.int8, endpoint=True)
        elif node.name.endswith(".scale"):
            found[node.name] = np.full(node.shape, 0.02 / 32, np.float32)
        elif node.name.endswith(".channels"):
            found[node.name] = np.arange(node.shape[0])
        elif node.name.endswith((".weight", ".bias", ".exact")):
            found[node.name] = rng.standard_normal(node.shape, np.float32) * np.float32(0.02)
    return found


def with_constants(data, weights):
    """The graph with its weights as initialisers."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(data)
    kept = [each for each in model.graph.input if each.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model.SerializeToString()


def layers(kind, threads):
    """A function that runs the layers on one row."""
    suffix = "" if kind == "float32" else SUFFIX
    shared = {name: open_session(graph(name + suffix), threads, STORE, name, UNFUSED) for name in KERNELS}
    steps = []
    for layer in range(NUM_LAYERS):
        for name in KERNELS:
            session, weights = shared[name], random_weights(shared[name], layer)
            if kind == "int8 constants":
                data = with_constants(graph(name + suffix), weights)
                session, weights = open_session(data, threads, STORE, name, UNFUSED), {}
            steps.append((session, weights, {node.name for node in session.get_inputs()}))
    hidden_SH = np.random.default_rng(0).standard_normal((NUM_TOKENS, SIZES["hidden_size"]), np.float32)
    shape = np.array([1, NUM_TOKENS, SIZES["num_heads"], SIZES["hidden_size"] // SIZES["num_heads"]])
    fixed = {"mask": np.zeros((1, 1, 1, NUM_TOKENS), np.float32), "shape": shape}

    def run():
        values = {**fixed, "hidden": hidden_SH}
        for index, (session, weights, names) in enumerate(steps):
            feeds = {**weights, **{name: array for name, array in values.items() if name in names}}
            (result,) = session.run(None, feeds)
            values["inner" if KERNELS[index % 3] == "up" else "hidden"] = result
        return values["hidden"]

    return run


def own_int8(threads, folder):
    """A function that runs ONNX Runtime's int8 of the whole random model, exported once."""
    import onnxruntime

    path = folder / "int8.onnx"
    if not path.exists():
        export(folder / "float.onnx", path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    ids_BS = np.arange(NUM_TOKENS)[None] % 30000
    feeds = {"input_ids": ids_BS, "attention_mask": np.ones_like(ids_BS), "token_type_ids": ids_BS * 0}
    return lambda: session.run(None, feeds)


def export(whole, narrow):
    import torch
    from onnxruntime.quantization import quantize_dynamic
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).eval()
    ids_BS = torch.arange(NUM_TOKENS)[None]
    names = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "token_type_ids": ids_BS * 0}
    torch.onnx.export(model, (), str(whole), kwargs=names, input_names=[*names], output_names=["logits"], dynamo=True)
    quantize_dynamic(whole, narrow)


def products(args):
    runs, added = {}, {}
    for kind in args.only or RUNS:
        before = resident_bytes()
        runs[kind] = own_int8(args.threads, args.work) if kind == RUNS[-1] else layers(kind, args.threads)
        runs[kind]()
        added[kind] = resident_bytes() - before
    seconds = {kind: [] for kind in runs}
    for _ in range(args.rounds):
        for kind, run in runs.items():
            run()  # each from its own warm caches
            began = time.perf_counter()
            run()
            seconds[kind].append(time.perf_counter() - began)
    medians = {kind: statistics.median(each) for kind, each in seconds.items()}
    last = [*medians.values()][-1]
    for kind, median in medians.items():
        print(f"{kind:20} {1e3 * median:7.1f} ms {median / last:5.2f}x {added[kind] / 2**20:6.0f} MiB added")
    print(json.dumps({"threads": args.threads, "seconds": seconds, "added_bytes": added}))


def exact(args):
    import onnxruntime
    from onnx import TensorProto, helper

    described = [("a", TensorProto.UINT8), ("w", TensorProto.INT8), ("zero", TensorProto.UINT8)]
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in described]
    node = helper.make_node("MatMulInteger", ["a", "w", "zero"], ["y"])
    result = [helper.make_tensor_value_info("y", TensorProto.INT32, None)]
    model = helper.make_model(
        helper.make_graph([node], "exact", inputs, result), opset_imports=[helper.make_opsetid("", 13)], ir_version=7
    )
    session: Any = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    for pair in (LARGEST_PAIR, LARGEST_PAIR + 1, 2 * LARGEST_WEIGHT):
        found = []
        for num_inputs, first in itertools.product((64, 3072), (pair // 2, min(pair, LARGEST_WEIGHT))):
            full = np.full((num_inputs, 33), [[first], [pair - first]] * (num_inputs // 2))
            mixed = rng.integers(-first, first + 1, full.shape)
            mixed[1::2] = np.sign(mixed[1::2]) * np.minimum(np.abs(mixed[1::2]), pair - np.abs(mixed[::2]))
            for w in (full, -full, mixed):
                for a in (np.full((5, num_inputs), 255), rng.integers(0, 256, (5, num_inputs))):
                    feeds = {
                        "a": a.astype(np.uint8),
                        "w": w.astype(np.int8),
                        "zero": np.array(LOW_ZERO_POINT, np.uint8),
                    }
                    found.append(np.array_equal(session.run(None, feeds)[0], (a.astype(np.int64) - LOW_ZERO_POINT) @ w))
        print(f"neighbours up to {pair} together: {'exact' if all(found) else 'NOT exact'}", found, flush=True)
    print(f"kernels take {INTEGER_PRODUCT}, which is MatMulInteger and a scale")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    timing = verbs.add_parser("products")
    timing.add_argument("--threads", type=int, default=2)
    timing.add_argument("--rounds", type=int, default=20)
    timing.add_argument("--only", action="append", choices=RUNS)
    timing.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder of the exported model")
    timing.set_defaults(run=products)
    verbs.add_parser("exact").set_defaults(run=exact)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
