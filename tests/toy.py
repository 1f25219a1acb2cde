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
from offramp.program.program import Texts
from offramp.runtime.backend import Backend, State
from offramp.runtime.course import course_of
from offramp.runtime.exits import load_exits
from offramp.runtime.loop import Loop
from offramp.runtime.slots import Slot
from offramp.session.classifier import Classifier, Settings
from offramp.store import Encoder, Manifest, Stage, Step, Store, StoreWriter
from offramp.store.manifest import Exits, Source
from offramp.tasks import token_batch

HIDDEN, INNER, LABELS, VOCABULARY, MAX_LENGTH = 8, 16, ("no", "yes", "maybe"), 32, 12
MODULUS = 251
"""Hidden states are integers below this."""
KINDS = {
    "attention": {"attention.weight": (HIDDEN, HIDDEN), "attention.bias": (HIDDEN,)},
    "up": {"up.weight": (INNER, HIDDEN)},
    "down": {"down.weight": (HIDDEN, INNER), "down.bias": (HIDDEN,)},
    "head": {"head.weight": (len(LABELS), HIDDEN), "head.bias": (len(LABELS),)},
    "embedding": {"embedding.scale": (HIDDEN,)},
    "rows": {"word": (VOCABULARY, HIDDEN), "position": (MAX_LENGTH, HIDDEN), "type": (2, HIDDEN)},
}
LAYER_KINDS = ("attention", "up", "down")


class ToyBackend(Backend):
    """The toy's arithmetic. `fail` maps a kind (or `exit`) to what is raised when it is computed next, once."""

    name, num_threads, unsettled = "toy", 1, frozenset({"up"})

    def __init__(self) -> None:
        self.fail: dict[str, BaseException] = {}
        self.computed: list[str] = []
        self.closed = False

    def rehearse(self, num_rows: int, length: int) -> None:
        """Each kind once, with zeros for weights."""
        weights = {role: np.zeros(shape, np.float32) for shapes in KINDS.values() for role, shape in shapes.items()}
        rows = {role: np.zeros((num_rows * length, HIDDEN), np.float32) for role in KINDS["rows"]}
        state = self.begin(rows, np.ones((num_rows, length), np.int64), weights)
        self.step(state, "layer", weights)
        self.head_logits(state, weights)
        self.computed.clear()

    def activation_bytes(self, num_rows: int, length: int) -> int:
        """A quadratic term, as attention has one."""
        return 4 * num_rows * length * (2 * HIDDEN + INNER + length)

    def state_bytes(self, num_rows: int, length: int) -> int:
        """Hidden states, and a mask."""
        return 4 * num_rows * length * (HIDDEN + 2)

    def begin(self, rows, mask_BS, weights) -> State:
        """Sum of the rows, scaled."""
        self._note("embedding")
        hidden_TH = (rows["word"] + rows["position"] + rows["type"]) * weights["embedding.scale"] % MODULUS
        return State(*mask_BS.shape, {"hidden": hidden_TH.reshape(*mask_BS.shape, HIDDEN), "mask": mask_BS})

    def step(self, state, kind, weights) -> None:
        """One third of a layer. Attention adds to each token the sum of its row."""
        self._note(kind)
        hidden_BSH = state.arrays["hidden"]
        if "attention.weight" in weights:
            total_BH = (hidden_BSH * state.arrays["mask"][:, :, None]).sum(axis=1, dtype=np.float32) % MODULUS
            hidden_BSH = (
                hidden_BSH + (total_BH @ weights["attention.weight"].T + weights["attention.bias"])[:, None]
            ) % MODULUS
        if "up.weight" in weights:
            state.arrays["inner"] = hidden_BSH @ weights["up.weight"].T % MODULUS
        if "down.weight" in weights:
            hidden_BSH = (
                hidden_BSH + state.arrays.pop("inner") @ weights["down.weight"].T + weights["down.bias"]
            ) % MODULUS
        state.arrays["hidden"] = hidden_BSH

    def exit_logits(self, state, weights) -> np.ndarray:
        """Quarters from 0 to 4.75, plus the bias."""
        self._note("exit")
        return _quarters(state.arrays["hidden"][:, 0] @ weights["exit.weight"].T) + weights["exit.bias"]

    def head_logits(self, state, weights) -> np.ndarray:
        """The same with the head's weights."""
        self._note("head")
        return _quarters(state.arrays["hidden"][:, 0] @ weights["head.weight"].T) + weights["head.bias"]

    def keep(self, state, mask_B) -> None:
        """Gather the rows that stay."""
        state.arrays = {name: array[mask_B] for name, array in state.arrays.items()}
        state.num_rows = int(mask_B.sum())

    def close(self) -> None:
        """Remember it."""
        self.closed = True

    def _note(self, kind: str) -> None:
        self.computed.append(kind)
        if kind in self.fail:
            raise self.fail.pop(kind)


def _quarters(product_BC: np.ndarray) -> np.ndarray:
    return (product_BC % 20 / 4).astype(np.float32)


class ToyTextEncoder:
    """A letter is a token."""

    max_length = MAX_LENGTH
    sample = ("a b",)

    def encode(self, inputs) -> Batch:
        """Texts to ids; at least one token a text, at most `max_length`."""
        tokens = [
            [string.ascii_lowercase.find(letter) + 1 for letter in text[: self.max_length]] or [0] for text in inputs
        ]
        length = max(map(len, tokens))
        ids_BS = np.array([row + [0] * (length - len(row)) for row in tokens], np.int64)
        mask_BS = np.array([[1] * len(row) + [0] * (length - len(row)) for row in tokens], np.int64)
        return token_batch(Texts(VOCABULARY, MAX_LENGTH, 2, 0), ids_BS, mask_BS, np.zeros_like(ids_BS))

    def lengths(self, inputs):
        """Letters of each text, at least one."""
        return (self.encode([text]).length for text in inputs)

    def encoding_bytes(self, inputs) -> int:
        """Nothing worth planning for."""
        return 0


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
    problem: str = "single_label_classification"


def write_toy(path, toy: Toy | None = None) -> Store:
    """Write a store to `path` and open it, with no memory of what was verified."""
    toy = toy or Toy()
    rng = np.random.default_rng(toy.seed)
    with StoreWriter(path, "0" * 64) as writer:
        shards = dict(_add_shard(writer, toy, name, kind, rng) for name, kind in _shards(toy).items())
        exits = _add_exits(writer, toy, rng) if toy.exits else None
        source = Source("0" * 64, "Toy", "toy", "by hand")
        manifest = Manifest(source, _encoder(toy), _stages(toy), shards, {}, (), exits)
        writer.finish(manifest)
    return Store(path)


def make_classifier(store: Store, policy: str = "none", budget_bytes: int = 1 << 40, **settings) -> Classifier:
    """A classifier that is planned and not yet open."""
    parsed = parse(policy)
    parsed.check(len(store.manifest.layers), store.manifest.encoder.problem)
    return Classifier(store, ToyBackend(), ToyTextEncoder(), parsed, Settings(budget_bytes, **settings))


def open_loop(
    store: Store, policy="none", num_slots: int = 1, residents=(), *, backend=None, direct=False, guard=None
) -> Loop:
    """A loop whose ring has so many slots, with these shards resident."""
    parsed = parse(policy) if isinstance(policy, str) else policy
    parsed.check(len(store.manifest.layers), store.manifest.encoder.problem)
    exits = load_exits(store, course_of(store), parsed, needs_all=guard is not None)
    loop = Loop(store, backend or ToyBackend(), parsed, exits, Trace(), guard)
    sizes = {
        name: -(-shard.bytes // 4096) * 4096 for name, shard in store.manifest.shards.items() if shard.blocks is None
    }
    slots = [Slot(max(sizes.values())) for _ in range(num_slots)]
    loop.connect(slots, {name: Slot(sizes[name]) for name in residents}, direct=direct)
    return loop


def layer_shards(store: Store, last_layer: int | None = None) -> list[str]:
    """The shards that the layers up to `last_layer` (from 1; None: all) name, in order, each once."""
    stages = store.manifest.layers[:last_layer]
    return list(dict.fromkeys(shard for stage in stages for step in stage.steps for shard in step.shards))


def _encoder(toy: Toy) -> Encoder:
    labels = LABELS if toy.problem != "regression" else LABELS[:1]
    sizes = (HIDDEN, HIDDEN, toy.num_layers, 1, INNER, "gelu", 1e-12, VOCABULARY, MAX_LENGTH)
    return Encoder(*sizes, 0, 2, 0, "tanh", toy.problem, labels)


def _layer_shard(toy: Toy, layer: int, kind: str) -> str:
    return kind if toy.shared else f"layer-{layer:02d}-{kind}"


def _shards(toy: Toy) -> dict[str, str]:
    """Shard -> kind."""
    layers = {_layer_shard(toy, layer, kind): kind for layer in range(toy.num_layers) for kind in LAYER_KINDS}
    return {"rows": "rows", "embedding": "embedding", **layers, "head": "head"}


def _stages(toy: Toy) -> tuple[Stage, ...]:
    layers = []
    for layer in range(toy.num_layers):
        shards = {kind: _layer_shard(toy, layer, kind) for kind in LAYER_KINDS}
        steps = (
            [Step("layer", tuple(shards.values()))] if toy.whole else [Step(kind, (shards[kind],)) for kind in shards]
        )
        layers.append(Stage(f"layer.{layer}", "layer", tuple(steps)))
    embedding = Stage("embedding", "embedding", (Step("embedding", ("rows", "embedding")),))
    return (embedding, *layers, Stage("head", "head", (Step("head", ("head",)),)))


def _add_shard(writer: StoreWriter, toy: Toy, name: str, kind: str, rng: np.random.Generator):
    shapes = dict(KINDS[kind])
    if toy.problem == "regression":
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
    num_labels = 1 if toy.problem == "regression" else len(LABELS)
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
