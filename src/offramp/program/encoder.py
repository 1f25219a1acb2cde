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
MAX_SIZE = 1 << 40
"""Largest size among the attributes of a kernel."""
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

    @property
    def texts(self) -> Texts:
        """What the encoder requires of texts."""
        sizes = (self.vocab_size, self.max_length, self.num_token_types, self.pad_token, self.position_offset)
        return Texts(*sizes)


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
    kernels, last = _kernels(encoder), _hidden(encoder.num_layers - 1)
    built = [_build_stage(stage, index, encoder, kernels, gathered) for index, stage in enumerate(stages)]
    if stages[-1].role != END:
        built.append(Stage("head", END))
    output = Output(last) if encoder.problem is None else Output("logits", encoder.problem, len(encoder.labels))
    tables = stages[0].steps[0].tensors
    width = Value("float32", (BATCH_TOKENS, encoder.embedding_size))
    inputs = [INPUT_IDS, ATTENTION_MASK, POSITION_IDS, *([TOKEN_TYPE_IDS] if encoder.num_token_types else [])]
    return Program(
        inputs={name: Input("int64", (BATCH, TOKENS)) for name in inputs},
        lookups={role: LookUp(tables[role], input, width) for role, input in _roles(encoder).items()},
        kernels=kernels,
        stages=tuple(built),
        output=output,
        texts=encoder.texts,
    )


def weight_shapes(kernel: Kernel) -> Optional[Shapes]:
    """Return the shape of each weight of a template of this file, or None for any other template."""
    template = _TEMPLATES.get(kernel.template)
    return None if template is None else template.weights(kernel.attributes)


def wrong_attributes(kernel: Kernel) -> Optional[str]:
    """Return what is wrong with the attributes of a kernel, or None if its template takes them."""
    known = _TEMPLATES[kernel.template].attributes if kernel.template in _TEMPLATES else ()
    if set(kernel.attributes) != set(known):
        return f"{kernel.template} takes the attributes {sorted(known)}, not {sorted(kernel.attributes)}"
    for name, value in kernel.attributes.items():
        low = 0 if name == "num_token_types" else 1
        if name == "activation":
            fits = value in ACTIVATIONS
        elif name == "norm_epsilon":
            fits = isinstance(value, float) and 0 <= value < 1
        else:
            fits = isinstance(value, int) and low <= value <= MAX_SIZE
        if not fits:
            return f"{name} is {value!r}"
    heads, hidden = kernel.attributes.get("num_heads"), kernel.attributes.get("hidden_size")
    if heads is not None and hidden % heads:  # type: ignore[operator]
        return f"hidden_size {hidden} is not a multiple of num_heads {heads}"
    return None


def misfit(program: Program, tensors: Mapping[str, Tuple[str, Tuple[int, ...]]]) -> Optional[str]:
    """Return what is wrong with the first step whose values or weights are not those of its kernel, or None.

    Args:
        tensors: name -> (dtype as safetensors names it, shape) of every tensor of the store.
    """
    values = program.values()
    for stage in program.stages:
        for step in stage.steps:
            kernel = program.kernels[step.kernel]
            template = _TEMPLATES.get(kernel.template)
            if template is None:
                continue
            promised = {role: ("F32", shape) for role, shape in template.weights(kernel.attributes).items()}
            wrong = (
                _difference({role: tensors[name] for role, name in step.weights.items()}, promised)
                or _difference(
                    {port: values[name] for port, name in step.reads.items()}, template.reads(kernel.attributes)
                )
                or _difference(dict(enumerate(step.writes.values())), {0: template.result(kernel.attributes)})
            )
            if wrong:
                return f"stage {stage.name}, {step.kernel}: {wrong}"
    return None


def _difference(found: Mapping, wanted: Mapping) -> Optional[str]:
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            return f"{key} is {found.get(key)}, the kernel takes {wanted.get(key)}"
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


def _build_stage(
    stage: PlacedStage, index: int, encoder: Encoder, kernels: Mapping[str, Kernel], gathered: Sequence[str]
) -> Stage:
    layer = index - 1
    attended, inner = f"layer.{layer}.attended", f"layer.{layer}.inner"
    ports: Dict[str, Tuple[Dict[str, str], str]] = {
        "embedding": ({role: role for role in _roles(encoder)}, _hidden(-1)),
        "attention": ({"hidden": _hidden(layer - 1), "mask": "mask"}, attended),
        "up": ({"hidden": attended}, inner),
        "down": ({"inner": inner, "hidden": attended}, _hidden(layer)),
        "head": ({"hidden": _hidden(encoder.num_layers - 1)}, "logits"),
    }
    steps = [Step("mask", {"mask": ATTENTION_MASK}, {"mask": _MASK})] if stage.role == BEGIN else []
    for placed in stage.steps:
        reads, result = ports[placed.kernel]
        kernel = kernels[placed.kernel]
        writes = {result: _TEMPLATES[kernel.template].result(kernel.attributes)}
        weights = {role: name for role, name in placed.tensors.items() if role not in TABLES}
        shards = tuple(shard for shard in placed.shards if shard not in gathered)
        steps.append(Step(placed.kernel, reads, writes, weights, {}, shards))
    carries_exit = stage.role == LAYER and layer < encoder.num_layers - 1
    return Stage(stage.name, stage.role, tuple(steps), _hidden(layer) if carries_exit else None)


def _roles(encoder: Encoder) -> Dict[str, str]:
    """Return role of each embedding table that the encoder has -> the input that names its rows."""
    return {role: name for role, name in TABLES.items() if role != "type" or encoder.num_token_types}


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


_MASK = Value("float32", (BATCH, 1, 1, TOKENS))


def _tokens_of(width: str) -> Callable[[Mapping], Value]:
    return lambda sizes: Value("float32", (BATCH_TOKENS, sizes[width]))


def _logits(sizes: Mapping) -> Value:
    return Value("float32", (BATCH, sizes["num_labels"]))


def _embedding_reads(sizes: Mapping) -> Dict[str, Value]:
    rows = _tokens_of("embedding_size")(sizes)
    return {role: rows for role in TABLES if role != "type" or sizes["num_token_types"]}


@dataclass(frozen=True)
class _Template:
    """Everything that one kernel takes and gives, as functions of its attributes."""

    attributes: Tuple[str, ...]
    reads: Callable[[Mapping], Dict[str, Value]]
    result: Callable[[Mapping], Value]
    weights: Callable[[Mapping], Shapes]


_hidden_of = _tokens_of("hidden_size")
_TEMPLATES: Dict[str, _Template] = {
    "mask": _Template(
        (), lambda sizes: {"mask": Value("int64", (BATCH, TOKENS))}, lambda sizes: _MASK, lambda sizes: {}
    ),
    "embedding": _Template(
        ("hidden_size", "embedding_size", "num_token_types", "norm_epsilon"), _embedding_reads, _hidden_of, _embedding
    ),
    "attention": _Template(
        ("hidden_size", "num_heads", "norm_epsilon"),
        lambda sizes: {"hidden": _hidden_of(sizes), "mask": _MASK},
        _hidden_of,
        _attention,
    ),
    "up": _Template(
        ("hidden_size", "intermediate_size", "activation"),
        lambda sizes: {"hidden": _hidden_of(sizes)},
        _tokens_of("intermediate_size"),
        _up,
    ),
    "down": _Template(
        ("hidden_size", "intermediate_size", "norm_epsilon"),
        lambda sizes: {"hidden": _hidden_of(sizes), "inner": _tokens_of("intermediate_size")(sizes)},
        _hidden_of,
        _down,
    ),
    "head": _Template(
        ("hidden_size", "num_labels", "activation"), lambda sizes: {"hidden": _hidden_of(sizes)}, _logits, _head
    ),
    "exit": _Template(("hidden_size", "num_labels", "activation"), lambda sizes: {}, _logits, lambda sizes: {}),
}
