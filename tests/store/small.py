"""A small store made by hand, ways to spoil it, and what must come of that."""

import json
import os
import time
import types
from pathlib import Path

import numpy as np
import pytest

from offramp.errors import OfframpError
from offramp.store import Encoder, Manifest, Stage, Step, Store, StoreWriter, memory, verify
from offramp.store.manifest import Exits, Graph, Source, seal

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


def write_small(path, fingerprint=FINGERPRINT, num_layer_items=300, width=HIDDEN, **options):
    """Write the store; returns its path. `width` is that of the tables."""
    with StoreWriter(path, fingerprint, **options) as writer:
        shards = {name: add_shard(writer, name, num_layer_items, width) for name in SHARDS}
        graphs = {}
        for kind in ("embedding", "layer", "head", "exit"):
            file = writer.add_file(f"graphs/{kind}.onnx", f"not a graph, {kind}".encode())
            graphs[kind] = Graph(file.file, file.bytes, file.sha256, 13, 7)
        files = (writer.add_file("vocab.txt", b"[PAD]\n"),)
        exits = Exits(writer.add_file("exits.safetensors", b"\2\0\0\0\0\0\0\0{}"), writer.add_file("exits.json", b"{}"))
        source = Source(FINGERPRINT, "SmallModel", "small", "by hand")
        return writer.finish(
            Manifest(source, encoder(width), stages(), shards, graphs, files, exits, {"planned": True})
        )


def add_shard(writer, name, num_layer_items=300, width=HIDDEN):
    content = {f"{name}.{role}": (role, array) for role, array in arrays(name, num_layer_items, width).items()}
    tensors = [(tensor, role, "F32", array.shape) for tensor, (role, array) in content.items()]
    return writer.add_shard(name, tensors, lambda tensor: [content[tensor][1].data], gathered=name == "rows")


def encoder(width=HIDDEN):
    sizes = (HIDDEN, width, 2, 2, 32, "gelu", 1e-12, VOCABULARY, MAX_LENGTH)
    return Encoder(*sizes, 0, 2, 0, "tanh", "single_label_classification", ("no", "yes"))


def stages():
    return (
        Stage("embedding", "embedding", (Step("embedding", ("rows", "norm")),)),
        Stage("layer.0", "layer", (Step("layer", ("layer-00",)),)),
        Stage("layer.1", "layer", (Step("layer", ("layer-01",)),)),
        Stage("head", "head", (Step("head", ("head",)),)),
    )


def tree_of(store):
    """The manifest as a tree without its seal."""
    tree = json.loads((store / "offramp.json").read_text())
    del tree["sha256"]
    return tree


def reseal(store, tree):
    """What someone writes who knows the format."""
    (store / "offramp.json").write_bytes(seal(tree))


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
    """The message of the refusal: one printable line, exit code 4."""
    with pytest.raises(kind) as caught:
        action()
    assert isinstance(caught.value, OfframpError) and caught.value.exit_code == 4
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
