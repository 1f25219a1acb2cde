"""Programs of post-norm transformer encoders: BERT, DistilBERT, RoBERTa, XLM-R, ELECTRA.

The division by tensor names and the reader of format 1 both build their programs here. Each layer is three steps whose
kernels are written by the backends: `attention`, `up` and `down`.

Shapes: B rows, S tokens, T = B S, H hidden, I intermediate, E embedding width, C labels.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from offramp.program import program as p
from offramp.program.dtypes import FLOAT
from offramp.program.heads import Shapes, linear_shapes
from offramp.program.narrow import (
    BOUNDED,
    CHOSEN_EXACT,
    DEFAULTS,
    EXACT,
    INDEX,
    INTEGER,
    LOW_ZERO_POINT,
    MOST_EXACT,
    MOST_ROTATED,
    ROTATION,
    SUFFIX,
    ZERO_POINT,
    exact_shapes,
    narrow_shapes,
    option,
    plain,
    rotation_of,
    wrong_integers,
    wrong_turned,
)
from offramp.program.program import Input, Kernel, LookUp, Output, Program, Stage, Step, Texts, Value

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
MAX_SIZE = 1 << 40
"""Largest size among the attributes of a kernel."""
_SIZE, _COUNT = {"low": 1, "high": MAX_SIZE}, {"high": MAX_SIZE}
MAX_HEADS, MIN_HEAD_SIZE = 32, 32
"""Largest number of heads that may be smaller than MIN_HEAD_SIZE elements.

Attention takes two scores for each head and pair of tokens, and no weight tells how many heads there are: 384 heads of
one element would take 32 times the memory of the 12 heads that the same weights were trained for.
"""
LAYER_KERNELS = ("attention", "up", "down")
TABLES = {"word": p.INPUT_IDS, "position": p.POSITION_IDS, "type": p.TOKEN_TYPE_IDS}
"""Role of each embedding table -> the input that names its rows."""

Kernels = Mapping[str, Kernel]


@dataclass(frozen=True)
class Encoder:
    """Sizes and settings of an encoder, in words common to its families."""

    hidden_size: int = field(metadata=_SIZE)
    embedding_size: int = field(metadata=_SIZE)
    num_layers: int = field(metadata=_SIZE)
    num_heads: int = field(metadata=_SIZE)
    intermediate_size: int = field(metadata=_SIZE)
    activation: str = field(metadata={"choices": ACTIVATIONS})
    norm_epsilon: float
    vocab_size: int = field(metadata=_SIZE)
    max_length: int = field(metadata=_SIZE)
    """Longest input in tokens."""
    position_offset: int = field(metadata=_COUNT)
    """Row of the position table that the first token takes (RoBERTa: 2)."""
    num_token_types: int = field(metadata=_COUNT)
    """0 where there are no token types (DistilBERT)."""
    pad_token: int = field(metadata=_COUNT)
    head_activation: Optional[str] = field(metadata={"choices": ACTIVATIONS})
    """Activation between the two layers of the classification head; None without a head."""
    problem: Optional[str] = field(metadata={"choices": p.PROBLEMS})
    labels: Tuple[str, ...]
    """Labels in the order of their ids."""

    @property
    def texts(self) -> Texts:
        """Return the requirements of the encoder on texts."""
        return Texts(self.vocab_size, self.max_length, self.num_token_types, self.pad_token, self.position_offset)


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


def encoder_program(
    encoder: Encoder, stages: Sequence[PlacedStage], gathered: Sequence[str], *, narrow: bool = False
) -> Program:
    """Return the program of an encoder whose tensors are placed as `stages` say.

    Args:
        stages: the embedding, the layers in order, and the head if the encoder has one.
        gathered: shards of which only rows are read.
        narrow: the kernels of the layers take integer weights (`offramp.program.narrow`).
    """
    kernels, last = _kernels(encoder, narrow), _hidden(encoder.num_layers - 1)
    built = [_build_stage(stage, layer, encoder, kernels, gathered) for layer, stage in enumerate(stages, start=-1)]
    if stages[-1].role != p.END:
        built.append(Stage("head", p.END))
    output = Output(last) if encoder.problem is None else Output("logits", encoder.problem, len(encoder.labels))
    tables, rows = stages[0].steps[0].tensors, Value("float32", (p.BATCH_TOKENS, encoder.embedding_size))
    names = [p.INPUT_IDS, p.ATTENTION_MASK, p.POSITION_IDS, *([p.TOKEN_TYPE_IDS] if encoder.num_token_types else [])]
    inputs = {name: Input("int64", (p.BATCH, p.TOKENS)) for name in names}
    lookups = {role: LookUp(tables[role], name, rows) for role, name in _roles(encoder).items()}
    return Program(inputs, lookups, kernels, tuple(built), output, encoder.texts)


def weight_shapes(kernel: Kernel, outputs: Any = None) -> Optional[Shapes]:
    """Return the shape of each weight of a template of this file, or None for any other template.

    `outputs`: number of outputs of a block, which no attribute says.
    """
    if kernel.template not in TEMPLATES:
        return None
    sizes: Mapping[str, Any] = {**DEFAULTS, **kernel.attributes, OUTPUTS: outputs}
    is_projected = sizes.get("embedding_size") != sizes.get("hidden_size")
    return {
        role: tuple(sizes[size] for size in shape)
        for role, shape in TEMPLATES[kernel.template].weights.items()
        if (is_projected or not role.startswith("project.")) and (sizes[EXACT] or EXACT not in shape)
    }


def wrong_attributes(kernel: Kernel) -> Optional[str]:
    """Return what is wrong with the attributes of a kernel, or None if its template takes them."""
    known, optional = (), ()
    if kernel.template == p.CAPTURED:
        return wrong_turned(kernel.attributes)
    if kernel.template in TEMPLATES:
        known, optional = TEMPLATES[kernel.template].attributes, TEMPLATES[kernel.template].optional
    if set(kernel.attributes) - set(optional) != set(known):
        return f"{kernel.template} takes the attributes {sorted(known)}, not {sorted(kernel.attributes)}"
    for name, value in kernel.attributes.items():
        if name == "activation":
            fits = value in ACTIVATIONS or (value is None and plain(kernel.template) == "product")
        elif name == "rows":
            fits = value in (p.BATCH, p.BATCH_TOKENS)
        elif name == "norm_epsilon":
            fits = isinstance(value, float) and 0 <= value < 1
        elif name == ROTATION:
            fits = _rotates(value, kernel.attributes)
        elif name == EXACT:
            fits = isinstance(value, int) and 1 <= value <= MOST_EXACT
        elif name == ZERO_POINT:
            fits = isinstance(value, int) and 1 <= value <= DEFAULTS[ZERO_POINT]
        else:
            fits = isinstance(value, int) and (name != "num_token_types") <= value <= MAX_SIZE
        if not fits:
            return f"{name} is {value!r}"
    sizes: Mapping[str, Any] = kernel.attributes
    if "num_heads" in sizes:
        return wrong_heads(sizes[_H], sizes["num_heads"])
    if HEAD_SIZE in sizes:
        fits = sizes[MOST_OUTPUTS] % sizes[HEAD_SIZE] == 0
        return wrong_heads(sizes[MOST_OUTPUTS], sizes[MOST_OUTPUTS] // sizes[HEAD_SIZE]) if fits else _UNEVEN
    return None


def _rotates(size: object, sizes: Mapping[str, Any]) -> bool:
    """Return whether rows of a kernel can be rotated: by a power of two, which divides their width."""
    width = sizes.get("num_inputs", sizes.get(_H))
    return isinstance(size, int) and size in _ROTATIONS and isinstance(width, int) and width % size == 0


def attributes_of(template: str, sizes: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the attributes that a kernel of a template has, among sizes and settings: optional ones that matter."""
    names, optional = TEMPLATES[template].attributes, TEMPLATES[template].optional
    chosen = {name: sizes[name] for name in optional if option(sizes, name) != DEFAULTS[name]}
    return {**{name: sizes[name] for name in names}, **chosen}


def wrong_heads(hidden_size: int, num_heads: int) -> Optional[str]:
    """Return what is wrong with a number of heads, or None."""
    if hidden_size % num_heads:
        return f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}"
    if num_heads > MAX_HEADS and hidden_size // num_heads < MIN_HEAD_SIZE:
        least = f"more than {MAX_HEADS} heads have at least {MIN_HEAD_SIZE}"
        return f"num_heads {num_heads} makes heads of {hidden_size // num_heads} elements, {least}"
    return None


def misfit(program: Program, tensors: Mapping[str, Tuple[str, Tuple[int, ...]]]) -> Optional[str]:
    """Return what is wrong with the first step or exit whose values or weights are not those of its kernel, or None.

    Args:
        tensors: name -> (dtype as safetensors names it, shape) of every tensor of the store.
    """
    values = program.values()
    places = {name: place for place, name in enumerate(values)}
    for stage in program.stages:
        for step in stage.steps:
            kernel = program.kernels[step.kernel]
            weights = {role: tensors[name] for role, name in step.weights.items()}
            reads = {port: values[name] for port, name in step.reads.items()}
            if kernel.template in TEMPLATES:
                wrong = _wrong_parts(step, places) or _wrong_step(kernel, weights, reads, tuple(step.writes.values()))
            else:
                wrong = wrong_integers(kernel.attributes, weights)
            if wrong:
                return f"stage {stage.name}, {step.kernel}: {wrong}"
        heads = program.kernels.get(p.EXIT_KERNEL)
        if stage.exit is not None and heads is not None and heads.template in TEMPLATES:
            reads = TEMPLATES[heads.template].sized_reads(heads.attributes)
            wrong = _difference({"hidden": values[stage.exit]}, reads)
            if wrong:
                return f"stage {stage.name}, {p.EXIT_KERNEL}: {wrong}"
    return None


def _wrong_parts(step: Step, places: Mapping[str, int]) -> Optional[str]:
    """Return what is wrong with the order of the blocks that a step joins, or None; `places`: value -> its number."""
    parts = parts_of(step.reads)
    numbers = [places[name] for name in parts]
    if sorted(set(numbers)) != numbers:
        return f"the blocks {parts} are not distinct values in the order of their steps"
    return None


def _wrong_step(
    kernel: Kernel, weights: Mapping[str, Any], reads: Dict[str, Value], results: Tuple[Value, ...]
) -> Optional[str]:
    """Return what a step takes or gives that its kernel, which is of a template, does not, or None."""
    template, outputs = TEMPLATES[kernel.template], results[0].axes[-1] if results and results[0].axes else None
    sizes: Mapping[str, Any] = {**kernel.attributes, OUTPUTS: outputs}
    if OUTPUTS in template.result.axes:
        most, unit = sizes[MOST_OUTPUTS], sizes.get(HEAD_SIZE, 1)
        if not isinstance(outputs, int) or not 0 < outputs <= most or outputs % unit:
            return f"a block of {outputs} outputs, the kernel gives multiples of {unit} up to {most}"
    shapes = weight_shapes(kernel, outputs) or {}
    return (
        _difference(weights, {role: (template.dtype(role), shape) for role, shape in shapes.items()})
        or _difference(_joined(reads), template.sized_reads(sizes))
        or _difference(dict(enumerate(results)), {0: template.sized_result(sizes)})
    )


def parts_of(ports: Mapping[str, Any]) -> List[Any]:
    """Return what the ports `part.0`, `part.1`, ... of a step have, in the order of their numbers."""
    return [ports[f"part.{index}"] for index in range(len(ports)) if f"part.{index}" in ports]


def _joined(reads: Dict[str, Value]) -> Dict[str, Value]:
    """Return what a step reads, with its blocks as one value where they differ in nothing but their outputs."""
    parts = parts_of(reads)
    widths = [axis for part in parts for axis in part.axes[-1:] if isinstance(axis, int)]
    if len({(part.dtype, part.axes[:-1]) for part in parts}) != 1 or len(widths) < len(parts):
        return reads
    others = {port: value for port, value in reads.items() if port not in [f"part.{i}" for i in range(len(parts))]}
    return {**others, "parts": Value(parts[0].dtype, (*parts[0].axes[:-1], sum(widths)))}


def _difference(found: Mapping, wanted: Mapping) -> Optional[str]:
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            return f"{key} is {found.get(key)}, the kernel takes {wanted.get(key)}"
    return None


def table_shapes(encoder: Encoder) -> Shapes:
    """Return the shape of each embedding table, role -> [rows, E]."""
    heights = {"word": encoder.vocab_size, "position": encoder.max_length + encoder.position_offset}
    heights["type"] = encoder.num_token_types
    return {role: (height, encoder.embedding_size) for role, height in heights.items() if role in _roles(encoder)}


def encoder_shapes(encoder: Encoder, *, narrow: bool = False) -> Dict[str, Shapes]:
    """Return kernel -> shape of each of its weights, for all steps of an encoder; tables under `embedding-rows`."""
    shapes = {name: weight_shapes(kernel) for name, kernel in _kernels(encoder, narrow).items()}
    return {"embedding-rows": table_shapes(encoder), **{name: each for name, each in shapes.items() if each}}


def _hidden(layer: int) -> str:
    return f"layer.{layer}.hidden" if layer >= 0 else "embedding.hidden"


def _build_stage(stage: PlacedStage, layer: int, encoder: Encoder, kernels: Kernels, gathered: Sequence[str]) -> Stage:
    attended, inner = f"layer.{layer}.attended", f"layer.{layer}.inner"
    ports: Dict[str, Tuple[Dict[str, str], str]] = {
        "embedding": ({role: role for role in _roles(encoder)}, _hidden(-1)),
        "attention": ({"hidden": _hidden(layer - 1), "mask": "mask"}, attended),
        "up": ({"hidden": attended}, inner),
        "down": ({"inner": inner, "hidden": attended}, _hidden(layer)),
        "head": ({"hidden": _hidden(encoder.num_layers - 1)}, "logits"),
    }
    steps = [Step("mask", {"mask": p.ATTENTION_MASK}, {"mask": _MASK})] if stage.role == p.BEGIN else []
    for placed in stage.steps:
        reads, result = ports[placed.kernel]
        writes = {result: TEMPLATES[placed.kernel].sized_result(kernels[placed.kernel].attributes)}
        weights = {role: name for role, name in placed.tensors.items() if role not in TABLES}
        shards = tuple(shard for shard in placed.shards if shard not in gathered)
        steps.append(Step(placed.kernel, reads, writes, weights, {}, shards))
    carries_exit = stage.role == p.LAYER and layer < encoder.num_layers - 1
    return Stage(stage.name, stage.role, tuple(steps), _hidden(layer) if carries_exit else None)


def _roles(encoder: Encoder) -> Dict[str, str]:
    """Return role of each embedding table that the encoder has -> the input that names its rows."""
    return {role: name for role, name in TABLES.items() if role != "type" or encoder.num_token_types}


def _kernels(encoder: Encoder, narrow: bool) -> Dict[str, Kernel]:
    kernels = {}
    rounding = {ROTATION: rotation_of(encoder.hidden_size), EXACT: min(CHOSEN_EXACT, encoder.intermediate_size)}
    if encoder.activation in BOUNDED:
        rounding[ZERO_POINT] = LOW_ZERO_POINT
    for name in TEMPLATES:
        if name.endswith(SUFFIX) or name in _BLOCKS:
            continue
        settings = {**vars(encoder), **rounding, "num_labels": len(encoder.labels)}
        if name in ("head", p.EXIT_KERNEL):
            if encoder.problem is None:
                continue
            settings["activation"] = encoder.head_activation
        chosen = name + SUFFIX if narrow and name in LAYER_KERNELS else name
        kernels[name] = Kernel(chosen, attributes_of(chosen, settings), keeps_intermediates=name == "up")
    return kernels


@dataclass(frozen=True)
class _Template:
    """Interface of one kernel. A size among axes and in shapes is the name of an attribute."""

    attributes: Tuple[str, ...]
    reads: Mapping[str, Value]
    result: Value
    weights: Mapping[str, Tuple[str, ...]]
    optional: Tuple[str, ...] = ()
    """Attributes with a default in DEFAULTS."""

    def dtype(self, role: str) -> str:
        """Return the dtype of a weight: integers where it has scales."""
        name, _, kind = role.rpartition(".")
        if kind == "channels":
            return INDEX
        return INTEGER if kind == "weight" and f"{name}.scale" in self.weights else FLOAT

    def sized_reads(self, sizes: Mapping[str, Any]) -> Dict[str, Value]:
        """Return what the kernel reads, without token types where the encoder has none."""
        ports = (port for port in self.reads if port != "type" or sizes["num_token_types"])
        return {port: _sized(self.reads[port], sizes) for port in ports}

    def sized_result(self, sizes: Mapping[str, Any]) -> Value:
        """Return what the kernel gives."""
        return _sized(self.result, sizes)


def _sized(value: Value, sizes: Mapping[Any, Any]) -> Value:
    return Value(value.dtype, tuple(sizes.get(axis, axis) for axis in value.axes))


def _norm(width: str) -> Dict[str, Tuple[str, ...]]:
    return {"norm.weight": (width,), "norm.bias": (width,)}


def _all_narrow(roles: str, outputs: str) -> Dict[str, Tuple[str, ...]]:
    return {port: shape for role in roles for port, shape in narrow_shapes(role, outputs, _H).items()}


_H, _I, _E, _EPSILON = "hidden_size", "intermediate_size", "embedding_size", "norm_epsilon"
_MASK, _LOGITS = Value("float32", (p.BATCH, 1, 1, p.TOKENS)), Value("float32", (p.BATCH, "num_labels"))
_HIDDEN, _INNER, _ROWS = (Value("float32", (p.BATCH_TOKENS, width)) for width in (_H, _I, _E))
_EMBEDDING = {**_norm(_E), **linear_shapes("project", _H, _E)}
_QKVO = {role: shape for part in "qkvo" for role, shape in linear_shapes(part, _H, _H).items()}
_DOWN = {**linear_shapes("down", _H, _I), **_norm(_H)}
_HEAD = {**linear_shapes("dense", _H, _H), **linear_shapes("out", "num_labels", _H)}
_READS = {"hidden": _HIDDEN}
_LAYER: Dict[str, _Template] = {
    "attention": _Template((_H, "num_heads", _EPSILON), {**_READS, "mask": _MASK}, _HIDDEN, {**_QKVO, **_norm(_H)}),
    "up": _Template((_H, _I, "activation"), _READS, _INNER, linear_shapes("up", _I, _H)),
    "down": _Template((_H, _I, _EPSILON), {**_READS, "inner": _INNER}, _HIDDEN, _DOWN),
}
_ROTATIONS = [2**power for power in range(1, MOST_ROTATED.bit_length())]
PRODUCTS = ("product", "product" + SUFFIX)
"""Templates of which a program has one if anything in it is cut into blocks."""
OUTPUTS, MOST_OUTPUTS, HEAD_SIZE = "outputs", "most_outputs", "head_size"
"""Outputs of one block, which each step has its own number of; the most of them that a kernel gives."""
_UNEVEN = "most_outputs is not a multiple of head_size"
_BLOCK, _X = Value("float32", (p.BATCH_TOKENS, OUTPUTS)), Value("float32", ("rows", "num_inputs"))
_WHOLE = Value("float32", ("rows", "width"))
_QKV = {role: shape for part in "qkv" for role, shape in linear_shapes(part, OUTPUTS, _H).items()}
_BLOCKS: Dict[str, _Template] = {
    "heads": _Template((_H, HEAD_SIZE, MOST_OUTPUTS), {**_READS, "mask": _MASK}, _BLOCK, _QKV),
    "product": _Template(
        ("rows", "num_inputs", MOST_OUTPUTS, "activation"),
        {"x": _X},
        replace(_X, axes=("rows", OUTPUTS)),
        linear_shapes("product", OUTPUTS, "num_inputs"),
    ),
    "join": _Template(("rows", "width"), {"parts": _WHOLE}, _WHOLE, {}),
    "join-norm": _Template((_H, _EPSILON), {**_READS, "parts": _HIDDEN}, _HIDDEN, _norm(_H)),
    "first": _Template((_H,), _READS, Value("float32", (p.BATCH, _H)), {}),
}
"""Templates of programs with blocks (`offramp.program.blocks`). `parts` stands for the ports part.0, part.1, ..."""
_NARROW: Dict[str, Tuple[Tuple[str, ...], Dict[str, Tuple[str, ...]]]] = {
    "attention": ((ROTATION,), {**_all_narrow("qkvo", _H), **_norm(_H)}),
    "up": ((ROTATION,), narrow_shapes("up", _I, _H)),
    "down": ((ZERO_POINT, EXACT), {**narrow_shapes("down", _H, _I), **exact_shapes("down", _H), **_norm(_H)}),
    "heads": ((ROTATION,), _all_narrow("qkv", OUTPUTS)),
    "product": (
        (ZERO_POINT, ROTATION, EXACT),
        {**narrow_shapes("product", OUTPUTS, "num_inputs"), **exact_shapes("product", OUTPUTS)},
    ),
}
"""Optional attributes and weights of the templates that have a twin with integer weights."""
TEMPLATES: Dict[str, _Template] = {
    "mask": _Template((), {"mask": Value("int64", (p.BATCH, p.TOKENS))}, _MASK, {}),
    "embedding": _Template((_H, _E, "num_token_types", _EPSILON), dict.fromkeys(TABLES, _ROWS), _HIDDEN, _EMBEDDING),
    **_LAYER,
    "head": _Template((_H, "num_labels", "activation"), _READS, _LOGITS, _HEAD),
    "exit": _Template((_H, "num_labels", "activation"), _READS, _LOGITS, {}),
    **_BLOCKS,
    **{
        name + SUFFIX: replace({**_LAYER, **_BLOCKS}[name], optional=optional, weights=weights)
        for name, (optional, weights) in _NARROW.items()
    },
}
"""Interface of each kernel by its template; an exit head depends on its form, so its weights are not listed."""
