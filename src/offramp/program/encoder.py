"""Programs of post-norm transformer encoders: BERT, DistilBERT, RoBERTa, XLM-R, ELECTRA.

The division by tensor names and the reader of format 1 both build their programs here. Each layer is three steps whose
kernels are written by the backends: `attention`, `up` and `down`.

Shapes: B rows, S tokens, T = B S, H hidden, I intermediate, E embedding width, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Mapping, Optional, Sequence, Tuple

from offramp.program.heads import Shapes, linear_shapes
from offramp.program.program import (
    ATTENTION_MASK,
    BATCH,
    BATCH_TOKENS,
    BEGIN,
    END,
    EXIT_KERNEL,
    INPUT_IDS,
    LAYER,
    POSITION_IDS,
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

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
LAYER_KERNELS = ("attention", "up", "down")
TABLES = {"word": INPUT_IDS, "position": POSITION_IDS, "type": TOKEN_TYPE_IDS}
"""Role of each embedding table -> the input that names its rows."""


@dataclass(frozen=True)
class Encoder:
    """Sizes and settings of an encoder, in words common to its families."""

    hidden_size: int
    embedding_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    norm_epsilon: float
    vocab_size: int
    max_length: int
    """Longest input in tokens."""
    position_offset: int
    """Row of the position table that the first token takes (RoBERTa: 2)."""
    num_token_types: int
    """0 where there are no token types (DistilBERT)."""
    pad_token: int
    head_activation: Optional[str]
    """Activation between the two layers of the classification head; None without a head."""
    problem: Optional[str]
    labels: Tuple[str, ...]
    """Labels in the order of their ids."""


@dataclass(frozen=True)
class PlacedStep:
    """A step of an encoder and where its tensors are."""

    kernel: str
    shards: Tuple[str, ...]
    tensors: Mapping[str, str]
    """Role -> tensor, embedding tables included."""


@dataclass(frozen=True)
class PlacedStage:
    """A stage of an encoder: `embedding`, a layer, or `head`."""

    name: str
    role: str
    steps: Tuple[PlacedStep, ...]


def encoder_program(encoder: Encoder, stages: Sequence[PlacedStage], gathered: Sequence[str]) -> Program:
    """Return the program of an encoder whose tensors are placed as `stages` say.

    Args:
        stages: the embedding, the layers in order, and the head if the encoder has one.
        gathered: shards of which only rows are read.
    """
    layers = [stage for stage in stages if stage.role == LAYER]
    built = [_build_stage(stage, index, encoder, gathered) for index, stage in enumerate(stages)]
    if stages[-1].role != END:
        built.append(Stage("head", END))
    kernels = _kernels(encoder)
    has_head = encoder.problem is not None
    output = Output("logits", encoder.problem, len(encoder.labels)) if has_head else Output(_hidden(len(layers) - 1))
    rows = {role: input for role, input in TABLES.items() if role != "type" or encoder.num_token_types}
    tables = stages[0].steps[0].tensors
    width = Value("float32", (BATCH_TOKENS, encoder.embedding_size))
    inputs = [INPUT_IDS, ATTENTION_MASK, POSITION_IDS, *([TOKEN_TYPE_IDS] if encoder.num_token_types else [])]
    texts = Texts(
        encoder.vocab_size, encoder.max_length, encoder.num_token_types, encoder.pad_token, encoder.position_offset
    )
    return Program(
        inputs={name: Input("int64", (BATCH, TOKENS)) for name in inputs},
        lookups={role: LookUp(tables[role], input, width) for role, input in rows.items()},
        kernels=kernels,
        stages=tuple(built),
        output=output,
        texts=texts,
    )


def weight_shapes(kernel: Kernel) -> Optional[Shapes]:
    """Return the shape of each weight of a template of this file, or None for any other template."""
    shapes = _SHAPES.get(kernel.template)
    return None if shapes is None else shapes(kernel.attributes)


def misfit(program: Program, tensors: Mapping[str, Tuple[str, Tuple[int, ...]]]) -> Optional[str]:
    """Return what is wrong with the weights of the first step that lacks some, or None if all fit their kernels.

    Args:
        tensors: name -> (dtype as safetensors names it, shape) of every tensor of the store.
    """
    for stage in program.stages:
        for step in stage.steps:
            promised = weight_shapes(program.kernels[step.kernel])
            if promised is None:
                continue
            found = {role: tensors[name] for role, name in step.weights.items()}
            for role in sorted({*found, *promised}):
                wanted = ("F32", promised[role]) if role in promised else None
                if found.get(role) != wanted:
                    return f"stage {stage.name}, {step.kernel}: {role} is {found.get(role)}, the kernel takes {wanted}"
    return None


def table_shapes(encoder: Encoder) -> Shapes:
    """Return the shape of each embedding table, role -> [rows, E]."""
    width = encoder.embedding_size
    rows = {"word": (encoder.vocab_size, width), "position": (encoder.max_length + encoder.position_offset, width)}
    if encoder.num_token_types:
        rows["type"] = (encoder.num_token_types, width)
    return rows


def encoder_shapes(encoder: Encoder) -> Dict[str, Shapes]:
    """Return kernel -> shape of each of its weights, for all steps of an encoder; tables under `embedding-rows`."""
    found = {"embedding-rows": table_shapes(encoder)}
    for name, kernel in _kernels(encoder).items():
        shapes = weight_shapes(kernel)
        if shapes and name != EXIT_KERNEL:
            found[name] = shapes
    return found


def _hidden(layer: int) -> str:
    return f"layer.{layer}.hidden" if layer >= 0 else "embedding.hidden"


def _build_stage(stage: PlacedStage, index: int, encoder: Encoder, gathered: Sequence[str]) -> Stage:
    layer = index - 1
    hidden = Value("float32", (BATCH_TOKENS, encoder.hidden_size))
    inner = Value("float32", (BATCH_TOKENS, encoder.intermediate_size))
    attended = f"layer.{layer}.attended"
    rows = [role for role in TABLES if role != "type" or encoder.num_token_types]
    ports: Dict[str, Tuple[Dict[str, str], Dict[str, Value]]] = {
        "embedding": ({role: role for role in rows}, {_hidden(-1): hidden}),
        "attention": ({"hidden": _hidden(layer - 1), "mask": "mask"}, {attended: hidden}),
        "up": ({"hidden": attended}, {f"layer.{layer}.inner": inner}),
        "down": ({"inner": f"layer.{layer}.inner", "hidden": attended}, {_hidden(layer): hidden}),
        "head": ({"hidden": _hidden(encoder.num_layers - 1)}, {"logits": _logits(encoder)}),
    }
    steps = []
    for placed in stage.steps:
        reads, writes = ports[placed.kernel]
        weights = {role: name for role, name in placed.tensors.items() if role not in TABLES}
        shards = tuple(shard for shard in placed.shards if shard not in gathered)
        steps.append(Step(placed.kernel, reads, writes, weights, {}, shards))
    if stage.role == BEGIN:
        mask = Value("float32", (BATCH, 1, 1, TOKENS))
        steps.insert(0, Step("mask", {"mask": ATTENTION_MASK}, {"mask": mask}))
    carries_exit = stage.role == LAYER and layer < encoder.num_layers - 1
    return Stage(stage.name, stage.role, tuple(steps), _hidden(layer) if carries_exit else None)


def _logits(encoder: Encoder) -> Value:
    return Value("float32", (BATCH, len(encoder.labels)))


def _kernels(encoder: Encoder) -> Dict[str, Kernel]:
    hidden, epsilon = {"hidden_size": encoder.hidden_size}, {"norm_epsilon": encoder.norm_epsilon}
    inner = {**hidden, "intermediate_size": encoder.intermediate_size}
    sizes = {"embedding_size": encoder.embedding_size, "num_token_types": encoder.num_token_types}
    kernels = {
        "mask": Kernel("mask"),
        "embedding": Kernel("embedding", {**hidden, **sizes, **epsilon}),
        "attention": Kernel("attention", {**hidden, "num_heads": encoder.num_heads, **epsilon}),
        "up": Kernel("up", {**inner, "activation": encoder.activation}, keeps_intermediates=True),
        "down": Kernel("down", {**inner, **epsilon}),
    }
    if encoder.problem is not None:
        head = {**hidden, "num_labels": len(encoder.labels), "activation": encoder.head_activation}
        kernels.update({"head": Kernel("head", head), EXIT_KERNEL: Kernel("exit", head)})
    return kernels


def _norm(width: int) -> Shapes:
    return {"norm.weight": (width,), "norm.bias": (width,)}


def _embedding(sizes: Mapping) -> Shapes:
    hidden, width = sizes["hidden_size"], sizes["embedding_size"]
    return {**_norm(width), **(linear_shapes("project", hidden, width) if width != hidden else {})}


def _attention(sizes: Mapping) -> Shapes:
    hidden = sizes["hidden_size"]
    parts = {role: shape for part in "qkvo" for role, shape in linear_shapes(part, hidden, hidden).items()}
    return {**parts, **_norm(hidden)}


def _up(sizes: Mapping) -> Shapes:
    return linear_shapes("up", sizes["intermediate_size"], sizes["hidden_size"])


def _down(sizes: Mapping) -> Shapes:
    return {**linear_shapes("down", sizes["hidden_size"], sizes["intermediate_size"]), **_norm(sizes["hidden_size"])}


def _head(sizes: Mapping) -> Shapes:
    hidden = sizes["hidden_size"]
    return {**linear_shapes("dense", hidden, hidden), **linear_shapes("out", sizes["num_labels"], hidden)}


_SHAPES: Dict[str, Callable[[Mapping], Shapes]] = {
    "mask": lambda sizes: {},
    "embedding": _embedding,
    "attention": _attention,
    "up": _up,
    "down": _down,
    "head": _head,
}
