"""How the stages of a module follow one another, as a run of it has told: what stands in the manifest of any divided
module in place of an `Encoder`.

It names modules, calls and tensors as PyTorch does, and needs no PyTorch to be read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, Optional, Tuple

from offramp.program.checks import WrongError, choice_of, int_of, list_of, object_of, str_of

MAX_RANK = 64
_KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


@dataclass(frozen=True)
class Call:
    """A module by its full name, and which of its calls within a pass, from 1: a shared layer is called many times."""

    module: str
    number: int


@dataclass(frozen=True)
class Value:
    """A tensor that flows between stages: dtype as PyTorch spells it, and its shape when the module was divided."""

    dtype: str
    shape: Tuple[int, ...]


@dataclass(frozen=True)
class Texts:
    """What a module that reads tokens asks of them, in the words of an `Encoder`."""

    vocab_size: int
    max_length: int
    num_token_types: int
    pad_token: int
    position_offset: ClassVar[int] = 0
    """Row of the position table that the first token takes. A field once manifests record it."""


TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What such a module is called with: the first, and perhaps the others; int64 [B, S] each."""


@dataclass(frozen=True)
class Flow:
    """How a stage begins, and what is live then."""

    start: Optional[Call]
    """The module call that it begins with; None for the first stage."""
    values: Tuple[Value, ...]
    """What stages before it made and it or a later one reads; weights, buffers and inputs are not among it."""
    hidden: Optional[int]
    """Index in `values` of the hidden state, where it is the first argument of that call and all that changes on the
    way, but for what is handed out in the end: an exit can stand before such a stage."""


@dataclass(frozen=True)
class Segment:
    """A stage as a graph of its own, whose weights are inputs. All names in the order of the graph's inputs."""

    kind: str
    """Of its graph: stages that differ in the numbers of their weights alone have one kind."""
    reads: Tuple[str, ...]
    """Values that flow into it."""
    writes: Tuple[str, ...]
    """Values that it makes for stages behind it, or for the answer."""
    weights: Tuple[str, ...]
    """Tensors of the store."""
    constants: Tuple[str, ...]
    """Tensors of the store that stay in memory."""


@dataclass(frozen=True)
class LookUp:
    """Rows of a table, looked up by an input: only these rows are read, and they are a value for the graphs."""

    table: str
    """A tensor of the store, alone in its shard."""
    input: str


@dataclass(frozen=True)
class Segments:
    """All stages as graphs. Rows can leave between them: `batch` says which extent of a value counts rows."""

    stages: Tuple[Segment, ...]
    outputs: Tuple[str, ...]
    """Values that the module returns."""
    values: Dict[str, Value]
    """Every value that flows, as it was for the example."""
    batch: Dict[str, int]
    exits: Tuple[int, ...] = ()
    """Stages that begin behind an exit, in order; the hidden state is the first value that they read."""
    look_ups: Dict[str, LookUp] = field(default_factory=dict)
    """Values that are there when a pass begins, beside the inputs."""


@dataclass(frozen=True)
class Program:
    """One module, divided by a run of it. `flows` has an entry for each stage, in order."""

    module: str
    """Its class, as Python imports it."""
    weights_sha256: str
    """Of the names, dtypes and shapes of all parameters and saved buffers, and of which share memory."""
    versions: Dict[str, str]
    """Of the libraries that it was divided with."""
    inputs: Dict[str, Value]
    """The example that it was divided with, by argument."""
    flows: Tuple[Flow, ...]
    aliases: Dict[str, Tuple[str, ...]]
    """Of a tensor of the store: further names of the same memory."""
    buffers: Tuple[str, ...]
    """Tensors of the store that are buffers: they always stay in memory."""
    pinned: Tuple[str, ...]
    """Shards that stay: the code keeps references to them from one stage to another."""
    sliced: Tuple[str, ...]
    """Large tensors, each alone in its shard, that only linear layers and look-ups touch: where memory is short, a few
    rows at a time will do.
    """
    unused: Tuple[str, ...]
    """Tensors that the example never touched: they are in the stage of the module that holds them."""
    activation_bytes: int
    """What lived at once besides weights, for the example."""
    problem: Optional[str] = None
    """What its first output is, as for an `Encoder`; None where that is not known."""
    labels: Tuple[str, ...] = ()
    segments: Optional[Segments] = None
    """Where the module could be exported, its stages as graphs."""
    texts: Optional[Texts] = None
    """Where the module classifies texts, whose tokenizer is in the store."""


def is_for_heads(hidden: Value, ids_shape: Optional[Tuple[int, ...]] = None) -> bool:
    """Whether a head can read a hidden state: float32, rows and a width; of texts [B, S] a place for each token."""
    if hidden.dtype != "float32" or len(hidden.shape) < 2:
        return False
    return ids_shape is None or (len(hidden.shape) == 3 and hidden.shape[:2] == ids_shape)


def graph_file(kind: str) -> str:
    """The file of a kind's graph, for PyTorch: operations as JSON."""
    return f"graphs/{kind}.json"


def program_of(tree: Any, where: str = "program") -> Program:
    """Parse and check one. Raises WrongError."""
    about = "module weights_sha256 versions inputs flows activation_bytes problem labels segments texts"
    tree = object_of(tree, where, about + " aliases buffers pinned sliced unused")
    program = Program(
        str_of(tree["module"], where + ".module"),
        str_of(tree["weights_sha256"], where + ".weights_sha256"),
        {name: str_of(value, where + ".versions") for name, value in _items(tree["versions"], where + ".versions")},
        {name: _value(value, where + ".inputs") for name, value in _items(tree["inputs"], where + ".inputs")},
        tuple(_flow(flow, f"{where}.flows[{i}]") for i, flow in enumerate(list_of(tree["flows"], where + ".flows"))),
        {name: _names(names, where + ".aliases") for name, names in _items(tree["aliases"], where + ".aliases")},
        _names(tree["buffers"], where + ".buffers"),
        _names(tree["pinned"], where + ".pinned"),
        _names(tree["sliced"], where + ".sliced"),
        _names(tree["unused"], where + ".unused"),
        int_of(tree["activation_bytes"], where + ".activation_bytes"),
        None if tree["problem"] is None else choice_of(tree["problem"], where + ".problem", PROBLEMS),
        _names(tree["labels"], where + ".labels"),
        None if tree["segments"] is None else _segments(tree["segments"], where + ".segments"),
        None if tree["texts"] is None else _texts(tree["texts"], where + ".texts"),
    )
    _require_text_inputs(program, where)
    for name, look_up in (program.segments.look_ups if program.segments else {}).items():
        ids = program.inputs.get(look_up.input, Value("", ()))
        if ids.dtype not in ("int64", "int32"):
            raise WrongError(f"{where}.segments.look_ups: {name!r} is looked up by {look_up.input!r}, no input of ids")
        made = {written for stage in program.segments.stages for written in stage.writes} if program.segments else ()
        if name in program.inputs or name in made:
            raise WrongError(f"{where}.segments.look_ups: {name!r} is another value already")
    return program


def _texts(tree: Any, where: str) -> Texts:
    tree = object_of(tree, where, "vocab_size max_length num_token_types pad_token")
    sizes = (int_of(tree[name], f"{where}.{name}", 1) for name in ("vocab_size", "max_length"))
    return Texts(*sizes, *(int_of(tree[name], f"{where}.{name}") for name in ("num_token_types", "pad_token")))


def _require_text_inputs(program: Program, where: str) -> None:
    """Raise WrongError unless a module for texts takes what texts are made into."""
    if program.texts is None:
        return
    wrong = [
        name for name, value in program.inputs.items()
        if name not in TEXT_INPUTS or value.dtype != "int64" or len(value.shape) != 2 or 0 in value.shape
    ]  # fmt: skip
    if wrong or TEXT_INPUTS[0] not in program.inputs:
        raise WrongError(f"{where}.inputs: {wrong[0] if wrong else 'no ' + TEXT_INPUTS[0]!r} where texts go in")


def _segments(tree: Any, where: str) -> Segments:
    tree = object_of(tree, where, "stages outputs values batch exits look_ups")
    segments = Segments(
        tuple(_segment(part, f"{where}.stages[{i}]") for i, part in enumerate(list_of(tree["stages"], where))),
        _names(tree["outputs"], where + ".outputs"),
        {name: _value(value, where + ".values") for name, value in _items(tree["values"], where + ".values")},
        {name: int_of(extent, where + ".batch") for name, extent in _items(tree["batch"], where + ".batch")},
        tuple(int_of(index, where + ".exits", 1) for index in list_of(tree["exits"], where + ".exits")),
        {name: _look_up(found, where + ".look_ups") for name, found in _items(tree["look_ups"], where + ".look_ups")},
    )
    known, available = set(segments.values), set(segments.values)
    for segment in reversed(segments.stages):
        available -= set(segment.writes)
    named = [*segments.outputs, *segments.batch, *segments.look_ups]
    named += [name for stage in segments.stages for name in (*stage.reads, *stage.writes)]
    lost = [name for name in named if name not in known]
    if lost:
        raise WrongError(f"{where} names the value {lost[0]!r}, which is not listed")
    for name, extent in segments.batch.items():
        if extent >= len(segments.values[name].shape):
            raise WrongError(f"{where}.batch: {name!r} has no extent {extent}")
    for number, segment in enumerate(segments.stages):
        early = [name for name in segment.reads if name not in available]
        if early:
            raise WrongError(f"{where}.stages[{number}] reads {early[0]!r} before it is there")
        available |= set(segment.writes)
    if list(segments.exits) != sorted(set(segments.exits)) or any(i >= len(segments.stages) for i in segments.exits):
        raise WrongError(f"{where}.exits must be stages in order, not {list(segments.exits)}")
    for index in segments.exits:
        reads = segments.stages[index].reads
        hidden = segments.values[reads[0]] if reads else None
        if hidden is None:
            raise WrongError(f"{where}.exits: stage {index} behind an exit reads no value")
        if hidden.dtype != "float32" or len(hidden.shape) < 2:
            raise WrongError(f"{where}.exits: {reads[0]!r} ({hidden.dtype} {hidden.shape}) is no hidden state")
    if not segments.outputs:
        raise WrongError(f"{where}.outputs must name what the module returns")
    return segments


def _look_up(tree: Any, where: str) -> LookUp:
    tree = object_of(tree, where, "table input")
    return LookUp(str_of(tree["table"], where + ".table"), str_of(tree["input"], where + ".input"))


def _segment(tree: Any, where: str) -> Segment:
    tree = object_of(tree, where, "kind reads writes weights constants")
    names = (_names(tree[key], f"{where}.{key}") for key in ("reads", "writes", "weights", "constants"))
    return Segment(str_of(tree["kind"], where + ".kind", _KIND), *names)


def _items(tree: Any, where: str) -> Any:
    if not isinstance(tree, dict):
        raise WrongError(f"{where} must be an object")
    return tree.items()


def _names(tree: Any, where: str) -> Tuple[str, ...]:
    return tuple(str_of(name, where) for name in list_of(tree, where))


def _value(tree: Any, where: str) -> Value:
    tree = object_of(tree, where, "dtype shape")
    shape = tuple(int_of(extent, where + ".shape") for extent in list_of(tree["shape"], where + ".shape"))
    if len(shape) > MAX_RANK:
        raise WrongError(f"{where}.shape has {len(shape)} extents, at most {MAX_RANK} are read")
    return Value(str_of(tree["dtype"], where + ".dtype"), shape)


def _flow(tree: Any, where: str) -> Flow:
    tree = object_of(tree, where, "start values hidden")
    start, hidden = tree["start"], tree["hidden"]
    if start is not None:
        start = object_of(start, where + ".start", "module number")
        start = Call(str_of(start["module"], where + ".start"), int_of(start["number"], where + ".start", 1))
    values = tuple(_value(value, where + ".values") for value in list_of(tree["values"], where + ".values"))
    if hidden is not None:
        int_of(hidden, where + ".hidden", 0, len(values) - 1)
    return Flow(start, values, hidden)
