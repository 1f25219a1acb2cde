"""A model small enough to check by hand: its backend in NumPy, stores written with `StoreWriter`, and texts as letters.

Every number is a small integer in float32 (sums stay below 2 ** 24), so that results do not depend on the order of
additions: answers are bitwise comparable across batches, padding, budgets and read paths.

Shapes: B rows, S tokens, T = B S, H hidden, I intermediate, C labels.
"""

from __future__ import annotations

import json
import string
import struct
from dataclasses import dataclass

import numpy as np

from offramp.measure import Trace
from offramp.policies import parse
from offramp.program.inputs import Batch
from offramp.program.program import (
    ATTENTION_MASK,
    BATCH,
    BATCH_TOKENS,
    BEGIN,
    CAPTURED,
    END,
    EXIT_KERNEL,
    INPUT_IDS,
    LAYER,
    POOLED_LINEAR,
    POSITION_IDS,
    REGRESSION,
    SINGLE_LABEL,
    TOKEN_TYPE_IDS,
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
from offramp.runtime.backend import Backend, State
from offramp.runtime.engine import Engine
from offramp.runtime.exits import load_exits
from offramp.runtime.feed import Buffers, WeightFeed
from offramp.runtime.gate import ExitGate
from offramp.runtime.guard import NO_DEADLINE
from offramp.runtime.inputs import InputReader
from offramp.runtime.run_plan import Reads
from offramp.runtime.schedule import Schedule
from offramp.runtime.slots import EqualSlots, Slot, aligned_slot
from offramp.session.classifier import Classifier, Settings
from offramp.store import Manifest, Store, StoreWriter
from offramp.store.manifest import LABELS_FILE, Exits, Source

HIDDEN, INNER, LABELS, VOCABULARY, MAX_LENGTH = 8, 16, ("no", "yes", "maybe"), 32, 12
MODULUS = 251
"""Hidden states are integers below this."""
TABLES = {"word": INPUT_IDS, "position": POSITION_IDS, "type": TOKEN_TYPE_IDS}
KINDS = {
    "attention": {"attention.weight": (HIDDEN, HIDDEN), "attention.bias": (HIDDEN,)},
    "up": {"up.weight": (INNER, HIDDEN)},
    "down": {"down.weight": (HIDDEN, INNER), "down.bias": (HIDDEN,)},
    "head": {"head.weight": (len(LABELS), HIDDEN), "head.bias": (len(LABELS),)},
    "embedding": {"embedding.scale": (HIDDEN,)},
    "rows": {"word": (VOCABULARY, HIDDEN), "position": (MAX_LENGTH, HIDDEN), "type": (2, HIDDEN)},
}
LAYER_KINDS = ("attention", "up", "down")
HIDDEN_STATE = Value("float32", (BATCH, TOKENS, HIDDEN))
INNER_STATE = Value("float32", (BATCH, TOKENS, INNER))


class ToyBackend(Backend):
    """The toy's arithmetic by kernel name. `fail` maps a kernel to what is raised when it is computed next, once."""

    name, num_threads = "toy", 1

    def __init__(self) -> None:
        self.fail: dict[str, BaseException] = {}
        self.computed: list[str] = []
        self.closed = False

    def warm_up(self, num_rows: int, length: int) -> None:
        """Run each kernel once, with zeros for weights."""
        weights = {role: np.zeros(shape, np.float32) for shapes in KINDS.values() for role, shape in shapes.items()}
        rows_TH = np.zeros((num_rows * length, HIDDEN), np.float32)
        hidden_BSH = _embedded((num_rows, length), rows_TH, rows_TH, rows_TH, weights)
        hidden_BSH = _attended(hidden_BSH, np.ones((num_rows, length), np.int64), weights)
        _quarters(_down(_up(hidden_BSH, weights), hidden_BSH, weights)[:, 0] @ weights["head.weight"].T)

    def activation_bytes(self, num_rows: int, length: int) -> int:
        """A quadratic term, as attention has one."""
        return 4 * num_rows * length * (2 * HIDDEN + INNER + length)

    def state_bytes(self, num_rows: int, length: int) -> int:
        """Hidden states, and a mask."""
        return 4 * num_rows * length * (HIDDEN + 2)

    def begin(self, arrays, mask_BS, shape) -> State:
        """Copy nothing."""
        return State(*shape, dict(arrays), mask_BS)

    def run(self, state, step, weights) -> None:
        """Run one kernel. Only values whose first axis counts rows are kept after it."""
        self._note(step.kernel)
        values = [state.values[name] for name in step.reads.values()]
        if step.kernel == "embedding":
            written = _embedded((state.num_rows, state.length), *values, weights)
            for name in step.reads.values():
                del state.values[name]
        elif step.kernel == "head":
            written = _quarters(values[0][:, 0] @ weights["head.weight"].T) + weights["head.bias"]
        elif step.kernel == "layer":
            hidden_BSH = _attended(*values, weights)
            written = _down(_up(hidden_BSH, weights), hidden_BSH, weights)
        else:
            written = {"attention": _attended, "up": _up, "down": _down}[step.kernel](*values, weights)
        (name,) = step.writes
        assert name not in state.values, "a value is written once"
        state.values[name] = written

    def exit_logits(self, state, value, weights) -> np.ndarray:
        """Quarters from 0 to 4.75, plus the bias."""
        self._note("exit")
        return _quarters(state.values[value][:, 0] @ weights["exit.weight"].T) + weights["exit.bias"]

    def logits(self, state) -> np.ndarray:
        """Return what the head wrote."""
        return state.values["logits"]

    def keep(self, state, rows_B) -> None:
        """Gather the rows that stay."""
        state.values = {name: array[rows_B] for name, array in state.values.items()}
        state.num_rows = len(rows_B)

    def close(self) -> None:
        """Remember it."""
        self.closed = True

    def _note(self, kind: str) -> None:
        self.computed.append(kind)
        if kind in self.fail:
            raise self.fail.pop(kind)


def _embedded(shape, word_TH, position_TH, type_TH, weights) -> np.ndarray:
    """Sum of the rows, scaled."""
    return ((word_TH + position_TH + type_TH) * weights["embedding.scale"] % MODULUS).reshape(*shape, HIDDEN)


def _attended(hidden_BSH, mask_BS, weights) -> np.ndarray:
    """Attention adds to each token the sum of its row."""
    total_BH = (hidden_BSH * mask_BS[:, :, None]).sum(axis=1, dtype=np.float32) % MODULUS
    return (hidden_BSH + (total_BH @ weights["attention.weight"].T + weights["attention.bias"])[:, None]) % MODULUS


def _up(hidden_BSH, weights) -> np.ndarray:
    return hidden_BSH @ weights["up.weight"].T % MODULUS


def _down(inner_BSI, hidden_BSH, weights) -> np.ndarray:
    return (hidden_BSH + inner_BSI @ weights["down.weight"].T + weights["down.bias"]) % MODULUS


def _quarters(product_BC: np.ndarray) -> np.ndarray:
    return (product_BC % 20 / 4).astype(np.float32)


class ToyTextEncoder:
    """A letter is a token."""

    max_length, sample = MAX_LENGTH, ("a b",)

    def lengths(self, texts):
        """Tokens of each text."""
        return (self.encode([text]).length for text in texts)

    def encoding_bytes(self, texts) -> int:
        """Nothing worth counting."""
        return 0

    def encode(self, inputs) -> Batch:
        """Texts to ids; at least one token a text, at most `max_length`."""
        tokens = [
            [string.ascii_lowercase.find(letter) + 1 for letter in text[: self.max_length]] or [0] for text in inputs
        ]
        length = max(map(len, tokens))
        ids_BS = np.array([row + [0] * (length - len(row)) for row in tokens], np.int64)
        mask_BS = np.array([[1] * len(row) + [0] * (length - len(row)) for row in tokens], np.int64)
        return token_batch(ids_BS, mask_BS)


def token_batch(ids_BS: np.ndarray, mask_BS: np.ndarray) -> Batch:
    """Right-padded token ids [B, S] as the inputs of the toy."""
    positions_BS = np.broadcast_to(np.arange(ids_BS.shape[1]), ids_BS.shape)
    arrays = {INPUT_IDS: ids_BS, ATTENTION_MASK: mask_BS, POSITION_IDS: positions_BS, TOKEN_TYPE_IDS: ids_BS * 0}
    return Batch(arrays, *ids_BS.shape, mask_BS.sum(axis=1))


@dataclass(frozen=True)
class Toy:
    """What to write. Equal toys give equal stores."""

    num_layers: int = 4
    seed: int = 0
    padding_bytes: int = 0
    """Unused bytes added to each layer's shards, in proportion 1 : 2 : 3, so that they differ in size."""
    shared: bool = False
    """All layers name the same three shards."""
    whole: bool = False
    """A layer is one step that needs its three shards at once."""
    exits: bool = True
    trained: bool = True
    exit_bias: tuple[tuple[int, float], ...] = ()
    """(exit, bias of the label `no`): a large one makes an exit sure."""
    exit_spread: int = 1
    """0: exits say nothing but their bias."""
    broken: str = ""
    """A shard, or `exit N`, that holds NaN."""
    problem: str = SINGLE_LABEL


def write_toy(path, toy: Toy | None = None) -> Store:
    """Write a store to `path` and open it, with no memory of what was verified."""
    toy = toy or Toy()
    rng = np.random.default_rng(toy.seed)
    with StoreWriter(path, "0" * 64) as writer:
        shards = dict(_add_shard(writer, toy, name, kind, rng) for name, kind in _shards(toy).items())
        exits = _add_exits(writer, toy, rng) if toy.exits else None
        labels = writer.add_file(LABELS_FILE, json.dumps(_labels(toy)).encode())
        source = Source("0" * 64, "Toy", "toy", "by hand")
        writer.finish(Manifest(source, _program(toy), shards, {}, (), exits, labels=labels))
    return Store(path)


def make_classifier(store: Store, policy: str = "none", budget_bytes: int = 1 << 40, **settings) -> Classifier:
    """A classifier that is planned and not yet open."""
    parsed = parse(policy)
    parsed.check(len(store.program.layers), store.program.problem)
    return Classifier(store, ToyBackend(), ToyTextEncoder(), parsed, Settings(budget_bytes, **settings))


def open_engine(
    store: Store, policy="none", num_slots: int = 1, residents=(), *, backend=None, reads="buffered", guard=NO_DEADLINE
) -> Engine:
    """An engine whose feed has so many slots, with these shards resident."""
    parsed, program = parse(policy) if isinstance(policy, str) else policy, store.program
    parsed.check(len(program.layers), program.problem)
    backend, schedule = backend or ToyBackend(), Schedule(program, parsed.last_exit(len(program.layers)))
    heads = load_exits(store, parsed, needs_all=guard.needs_every_exit)
    gate = ExitGate(store, backend, parsed, heads, guard)
    sizes = {
        name: -(-store.manifest.layouts[name].num_bytes // 4096) * 4096
        for name, shard in store.manifest.shards.items()
        if shard.blocks is None
    }
    make = aligned_slot if reads == "mapped" else Slot
    slots = EqualSlots([make(max(sizes.values())) for _ in range(num_slots)])
    buffers = Buffers(slots, {name: Slot(sizes[name]) for name in residents}, depth=num_slots or 2)
    feed = WeightFeed(store, buffers, schedule.stage_of, Trace(), **Reads(reads).options)
    return Engine(schedule, InputReader(store), backend, gate, feed)


def layer_shards(store: Store, last_layer: int | None = None) -> list[str]:
    """The shards that the layers up to `last_layer` (from 1; None: all) name, in order, each once."""
    stages = store.program.layers[:last_layer]
    return list(dict.fromkeys(shard for stage in stages for step in stage.steps for shard in step.shards))


def _labels(toy: Toy) -> tuple[str, ...]:
    return LABELS[:1] if toy.problem == REGRESSION else LABELS


def _program(toy: Toy) -> Program:
    rows = Value("float32", (BATCH_TOKENS, HIDDEN))
    kernels = {name: Kernel(CAPTURED, {}, name == "up") for name in ("embedding", *LAYER_KINDS, "layer", "head")}
    embedding = _step("embedding", "embedding", {role: role for role in TABLES}, {"hidden.0": HIDDEN_STATE})
    num_labels, last = len(_labels(toy)), f"hidden.{toy.num_layers}"
    head = _step("head", "head", {"hidden": last}, {"logits": Value("float32", (BATCH, num_labels))})
    return Program(
        inputs={name: Input("int64", (BATCH, TOKENS)) for name in (*TABLES.values(), ATTENTION_MASK)},
        lookups={role: LookUp(f"rows.{role}", name, rows) for role, name in TABLES.items()},
        kernels={**kernels, EXIT_KERNEL: Kernel(POOLED_LINEAR)},
        stages=(
            Stage("embedding", BEGIN, (embedding,)),
            *(_layer(toy, layer) for layer in range(toy.num_layers)),
            Stage("head", END, (head,)),
        ),
        output=Output("logits", toy.problem, num_labels),
        texts=Texts(VOCABULARY, MAX_LENGTH, 2, 0),
    )


def _layer(toy: Toy, layer: int) -> Stage:
    before, attended, inner, after = f"hidden.{layer}", f"attended.{layer}", f"inner.{layer}", f"hidden.{layer + 1}"
    shards = {kind: _layer_shard(toy, layer, kind) for kind in LAYER_KINDS}
    exit = after if layer < toy.num_layers - 1 else None
    steps = (
        _step("attention", shards["attention"], {"hidden": before, "mask": ATTENTION_MASK}, {attended: HIDDEN_STATE}),
        _step("up", shards["up"], {"hidden": attended}, {inner: INNER_STATE}),
        _step("down", shards["down"], {"inner": inner, "hidden": attended}, {after: HIDDEN_STATE}),
    )
    if toy.whole:
        weights = {role: name for step in steps for role, name in step.weights.items()}
        reads = {"hidden": before, "mask": ATTENTION_MASK}
        steps = (Step("layer", reads, {after: HIDDEN_STATE}, weights, {}, tuple(shards.values())),)
    return Stage(f"layer.{layer}", LAYER, steps, exit)


def _step(kind: str, shard: str, reads: dict[str, str], writes: dict[str, Value]) -> Step:
    return Step(kind, reads, writes, {role: f"{shard}.{role}" for role in KINDS[kind]}, {}, (shard,))


def _layer_shard(toy: Toy, layer: int, kind: str) -> str:
    return kind if toy.shared else f"layer-{layer:02d}-{kind}"


def _shards(toy: Toy) -> dict[str, str]:
    """Shard -> kind."""
    layers = {_layer_shard(toy, layer, kind): kind for layer in range(toy.num_layers) for kind in LAYER_KINDS}
    return {"rows": "rows", "embedding": "embedding", **layers, "head": "head"}


def _add_shard(writer: StoreWriter, toy: Toy, name: str, kind: str, rng: np.random.Generator):
    shapes = dict(KINDS[kind])
    if toy.problem == REGRESSION:
        shapes = {role: (1, *shape[1:]) if kind == "head" else shape for role, shape in shapes.items()}
    arrays = {role: rng.integers(0, 4, shape).astype(np.float32) for role, shape in shapes.items()}
    if toy.broken == name:
        arrays[f"{kind}.bias"][0] = np.nan
    padding = toy.padding_bytes * (LAYER_KINDS.index(kind) + 1) // 6 // 64 if kind in LAYER_KINDS else 0
    if padding:  # first, and a multiple of 64 bytes: it moves the others by that and is itself never copied
        arrays = {f"{kind}.padding": np.ones((padding, 16), np.float32), **arrays}
    tensors = [(f"{name}.{role}", role, "F32", array.shape) for role, array in arrays.items()]
    by_name = {f"{name}.{role}": array for role, array in arrays.items()}
    shard = writer.add_shard(name, tensors, lambda tensor: [by_name[tensor].tobytes()], gathered=kind == "rows")
    return name, shard


def _add_exits(writer: StoreWriter, toy: Toy, rng: np.random.Generator) -> Exits:
    num_labels = 1 if toy.problem == REGRESSION else len(LABELS)
    arrays = {}
    for index in range(1, toy.num_layers):
        arrays[f"exit.{index}.weight"] = rng.integers(0, 4, (num_labels, HIDDEN)).astype(np.float32) * toy.exit_spread
        bias_C = np.zeros(num_labels, np.float32)
        bias_C[0] = np.nan if toy.broken == f"exit {index}" else dict(toy.exit_bias).get(index, 0)
        arrays[f"exit.{index}.bias"] = bias_C
    heads = writer.add_file("exits.safetensors", safetensors_bytes(arrays))
    return Exits(
        heads, writer.add_file("exits.json", json.dumps({"form": "mean-linear", "trained": toy.trained}).encode())
    )


def safetensors_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """A safetensors file of float32 arrays, written by hand."""
    header, data = {}, b""
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
