"""Manifests of formats 1 and 2, which no code writes any more."""

from offramp.program.program import Input, Module, Part, Program
from offramp.store import StoreWriter
from offramp.store.manifest import Manifest, Source
from tests.golden.common import unpack
from tests.store.small import FINGERPRINT, reseal, tree_of


def encoder_store(folder):
    """Unpack a store of format 1 with exits, graphs and three layers; returns its path."""
    return unpack("bert-own-shared", folder)


def write_module(path, tensors, stages, *, gathered=(), inputs=(("0", [2, 3], "int64"),), **program):
    """Write a store of format 2 with zeros for data; returns its path.

    Args:
        tensors: shard -> {tensor: shape}.
        stages: shards of each stage.
        program: keys of the manifest's `program` that differ from those of a module without anything special.
    """
    with StoreWriter(path, FINGERPRINT) as writer:
        shards = {name: _add(writer, name, shapes, name in gathered) for name, shapes in tensors.items()}
        module = Module("x", "0" * 64, {}, (Part((), None, (), None),), {}, (), (), (), ())
        inputs_now = {name: Input(dtype, tuple(shape)) for name, shape, dtype in inputs}
        source = Source(FINGERPRINT, "Module", "module", "eager")
        writer.finish(Manifest(source, Program(inputs_now, module=module), shards, {}, ()))
    tree = tree_of(path)
    tree["format"] = 2
    tree["stages"] = [
        {"name": f"{i:03d}", "role": "layer", "steps": [{"kind": "module", "shards": list(shards)}]}
        for i, shards in enumerate(stages)
    ]
    tree["program"] = {
        "module": "some.where.Module",
        "weights_sha256": "1" * 64,
        "versions": {"torch": "2.6"},
        "inputs": {name: {"dtype": dtype, "shape": shape} for name, shape, dtype in inputs},
        "flows": [],
        "aliases": {},
        "buffers": [],
        "pinned": [],
        "sliced": [],
        "unused": [],
        "activation_bytes": 1000,
        "problem": None,
        "labels": [],
        "segments": None,
        "texts": None,
        **program,
    }
    tree["proof"] = {"examples": []}
    del tree["labels"]
    reseal(path, tree)
    return path


def _add(writer, name, shapes, gathered):
    entries = [(key, "rows" if gathered else key, "F32", shape) for key, shape in shapes.items()]
    sizes = {key: 4 * _product(shape) for key, shape in shapes.items()}
    return writer.add_shard(name, entries, lambda key: [bytes(sizes[key])], gathered=gathered)


def _product(shape):
    size = 1
    for each in shape:
        size *= each
    return size


def value(shape, dtype="float32"):
    return {"dtype": dtype, "shape": list(shape)}


def flow(module=None, number=1, values=(), hidden=None):
    start = None if module is None else {"module": module, "number": number}
    return {"start": start, "values": list(values), "hidden": hidden}
