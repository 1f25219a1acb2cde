"""A small store made by hand, ways to spoil it, and what must come of that."""

import json
import os
import shutil
import time
import types
from pathlib import Path

import numpy as np
import pytest

from offramp.errors import OfframpError
from offramp.program.program import (
    BATCH,
    BATCH_TOKENS,
    TOKENS,
    Input,
    Kernel,
    LookUp,
    Output,
    Program,
    Stage,
    Step,
    Texts,
    Value,
)
from offramp.store import Manifest, Store, StoreWriter, memory, verify
from offramp.store.manifest import Exits, Proof, ProvenExample, ProvenInput, Source, seal
from offramp.store.repeats import expand

LABELS = ("no", "yes")
HIDDEN, VOCABULARY, MAX_LENGTH = 16, 4096, 8
FINGERPRINT = "0" * 64
SHARDS = ("rows", "norm", "layer-00", "layer-01", "head")


def arrays(shard, num_layer_items=300, width=HIDDEN):
    """role -> array; random, but the same every time."""
    shapes = {
        "rows": {"word": (VOCABULARY, width), "position": (MAX_LENGTH, width), "type": (2, width)},
        "norm": {"norm.weight": (HIDDEN,)},
        "head": {"head.weight": (2, HIDDEN), "head.bias": (2,)},
    }
    shapes = shapes.get(shard, {"layer.weight": (HIDDEN, HIDDEN), "layer.rest": (num_layer_items,)})
    rng = np.random.default_rng(SHARDS.index(shard))
    return {role: rng.standard_normal(shape).astype(np.float32) for role, shape in shapes.items()}


EXITS = b'{"form": "mean-linear", "trained": true}'


def write_small(path, fingerprint=FINGERPRINT, num_layer_items=300, width=HIDDEN, **options):
    """Write the store; returns its path. `width` is that of the tables."""
    with StoreWriter(path, fingerprint, **options) as writer:
        shards = {name: add_shard(writer, name, num_layer_items, width) for name in SHARDS}
        graphs = {}
        for kernel in ("embedding", "layer", "head", "exit"):
            graphs[kernel] = writer.add_graph(kernel, f"not a graph, {kernel}".encode(), 13, 7)
        files = (writer.add_file("vocab.txt", b"[PAD]\n"),)
        exits = Exits(writer.add_file("exits.safetensors", b"\2\0\0\0\0\0\0\0{}"), writer.add_file("exits.json", EXITS))
        source = Source(FINGERPRINT, "SmallModel", "small", "by hand")
        proof = Proof(
            (ProvenExample({"x": ProvenInput("float32", (2, 3))}, "1" * 64, True, 0, 0, 10, 20),), False, None
        )
        labels = writer.add_labels(LABELS)
        return writer.finish(Manifest(source, program(width), shards, graphs, files, exits, proof, labels))


def add_shard(writer, name, num_layer_items=300, width=HIDDEN):
    content = {f"{name}.{role}": (role, array) for role, array in arrays(name, num_layer_items, width).items()}
    tensors = [(tensor, role, "F32", array.shape) for tensor, (role, array) in content.items()]
    return writer.add_shard(name, tensors, lambda tensor: [content[tensor][1].data], gathered=name == "rows")


def program(width=HIDDEN):
    """A program of captured kernels: rows of three tables, two layers of one kernel, a head, an exit after layer.0."""
    ids = {"word": "input_ids", "position": "position_ids", "type": "token_type_ids"}
    rows = Value("float32", (BATCH_TOKENS, width))
    hidden = Value("float32", (BATCH_TOKENS, HIDDEN))
    kernels = {name: Kernel("captured") for name in ("embedding", "layer", "head")}
    kernels["exit"] = Kernel("exit", {"hidden_size": HIDDEN, "num_labels": 2, "activation": "tanh"})
    return Program(
        inputs={name: Input("int64", (BATCH, TOKENS)) for name in ids.values()},
        lookups={role: LookUp(f"rows.{role}", name, rows) for role, name in ids.items()},
        kernels=kernels,
        stages=(
            Stage("embedding", "begin", (step("embedding", [*ids], {"hidden": hidden}, "norm", ["norm.weight"]),)),
            layer(0, "hidden", "layer.0.hidden"),
            layer(1, "layer.0.hidden", "layer.1.hidden"),
            Stage("head", "end", (step("head", ["layer.1.hidden"], {"logits": Value("float32", (BATCH, 2))}, "head",
                                       ["head.weight", "head.bias"]),)),
        ),
        output=Output("logits", "single_label_classification", 2),
        texts=Texts(VOCABULARY, MAX_LENGTH, 2, 0),
    )  # fmt: skip


def layer(number, reads, writes):
    shard = f"layer-0{number}"
    value = {writes: Value("float32", (BATCH_TOKENS, HIDDEN))}
    done = step("layer", [reads], value, shard, ["layer.weight", "layer.rest"])
    return Stage(f"layer.{number}", "layer", (done,), writes if number == 0 else None)


def step(kernel, reads, writes, shard, roles):
    weights = {role: f"{shard}.{role}" for role in roles}
    return Step(kernel, {f"r{i}": name for i, name in enumerate(reads)}, writes, weights, {}, (shard,))


def tree_of(store):
    """The manifest as a tree without its seal."""
    tree = json.loads((store / "offramp.json").read_text())
    del tree["sha256"]
    return tree


def reseal(store, tree):
    """What someone writes who knows the format."""
    (store / "offramp.json").write_bytes(seal(tree))


def reprogrammed(store, copy, change):
    """Copy a store, with a program that a function has changed. Returns the copy."""
    shutil.copytree(store, copy)
    tree = tree_of(copy)
    tree["program"] = expand(tree["program"], "program")
    change(tree)
    reseal(copy, tree)
    return copy


def flip(path, bit):
    """Flip one bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def problems(store):
    """file -> what verify says, for those that are not fine."""
    return {check.file: check.problem for check in verify(store) if check.problem is not None}


def read(store, shard, **options):
    """A whole shard as bytes."""
    buffer = bytearray(store.manifest.shards[shard].bytes)
    assert store.read_shard(shard, memoryview(buffer), **options) == (len(buffer), True)
    return bytes(buffer)


def use(path, verify="first"):
    """Open a store and read all of it, as a run would."""
    with Store(path, verify) as store:
        for file in (*store.manifest.files, *store.manifest.graphs.values()):
            store.read_file(file)
        for shard in store.manifest.shards.values():
            read(store, shard.name)
            if shard.blocks is not None:
                for tensor in shard.tensors:
                    store.gather(shard.name, tensor.role, np.arange(tensor.shape[0]))


def refused(kind, action, mentions=""):
    """The message of the refusal: one printable line, and the exit code of its kind, which is 4 but for wrong paths."""
    with pytest.raises(kind) as caught:
        action()
    assert isinstance(caught.value, OfframpError) and caught.value.exit_code == (
        4 if kind is OfframpError else kind.exit_code
    )
    message = str(caught.value)
    assert message.isprintable() and len(message) < 3500
    assert str(mentions) in message
    return message


def let_time_pass(monkeypatch):
    """Files that were just written may be recognised: their time lies a second back."""
    clock = types.SimpleNamespace(time_ns=lambda: time.time_ns() + 10**9)
    monkeypatch.setattr(memory, "time", clock)


def names_in(folder):
    """Names of everything in a folder, sorted."""
    return sorted(path.name for path in Path(folder).iterdir())


def rewrite(path, data):
    """Put other bytes into a file, so that nothing but its ctime tells, and wait until the clock of that has moved."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        with open(path, "r+b") as file:
            file.write(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
