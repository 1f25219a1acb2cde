"""Manifests of formats 1 and 2: their description of the computation becomes a program.

Format 1 describes a text encoder by its sizes, format 2 a module by the calls between its stages and, where it could be
exported, by one captured graph for each stage.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

from offramp.program import encoder as e
from offramp.program import program as p
from offramp.program.captured import Piece, captured_inputs, captured_program
from offramp.program.checks import MAX_RANK, NAMED, POSITIVE, WrongError, read, require_distinct, require_listed
from offramp.program.dtypes import FLOAT
from offramp.program.program import LookUp, Module, Output, Part, Program, Texts, Value
from offramp.store.manifest import ENCODER_FORMAT, Common, Manifest, Proof, ProvenExample, ProvenInput, Shard

Shards = Mapping[str, Shard]
_ROLES = {"embedding": p.BEGIN, "layer": p.LAYER, "head": p.END}
"""Role of a stage in formats 1 and 2 -> its role in a program."""


@dataclass(frozen=True)
class OldStep:
    """A step of formats 1 and 2."""

    kind: str = field(metadata=NAMED)
    shards: Tuple[str, ...] = field(metadata=NAMED)


@dataclass(frozen=True)
class OldStage:
    """A stage of formats 1 and 2."""

    name: str = field(metadata=NAMED)
    role: str
    steps: Tuple[OldStep, ...]

    @property
    def shards(self) -> Tuple[str, ...]:
        """Shards of all steps."""
        return tuple(name for step in self.steps for name in step.shards)


@dataclass(frozen=True)
class _Example:
    """A tensor as it was in the example of the division."""

    dtype: str
    shape: Tuple[int, ...] = field(metadata={"most": MAX_RANK})

    def value(self, batch_axis: Optional[int] = None) -> Value:
        axes = (p.BATCH if axis == batch_axis else size for axis, size in enumerate(self.shape))
        return Value(self.dtype, tuple(axes))


@dataclass(frozen=True)
class _Flow:
    """Start of a stage of format 2, and the values that it or a later stage reads."""

    start: Optional[p.Call]
    values: Tuple[_Example, ...]
    hidden: Optional[int]


@dataclass(frozen=True)
class _Segment:
    """One captured graph of format 2."""

    kind: str = field(metadata=NAMED)
    reads: Tuple[str, ...]
    writes: Tuple[str, ...]
    weights: Tuple[str, ...]
    constants: Tuple[str, ...]


@dataclass(frozen=True)
class _OldLookUp:
    table: str
    input: str


@dataclass(frozen=True)
class _Segments:
    """The captured graphs of format 2, one for each stage."""

    stages: Tuple[_Segment, ...]
    outputs: Tuple[str, ...]
    values: Dict[str, _Example]
    batch: Dict[str, int]
    exits: Tuple[int, ...] = field(metadata=POSITIVE)
    look_ups: Dict[str, _OldLookUp]


@dataclass(frozen=True)
class _OldTexts:
    vocab_size: int = field(metadata=POSITIVE)
    max_length: int = field(metadata=POSITIVE)
    num_token_types: int
    pad_token: int


@dataclass(frozen=True)
class _OldExample(ProvenExample):
    inputs: Dict[str, Tuple[str, Tuple[int, ...]]] = field(metadata={"most": MAX_RANK})  # type: ignore[assignment]


@dataclass(frozen=True)
class _OldProof(Proof):
    examples: Tuple[_OldExample, ...] = ()


@dataclass(frozen=True)
class OldProgram:
    """Description of the module in format 2."""

    module: str
    weights_sha256: str
    versions: Dict[str, str]
    inputs: Dict[str, _Example]
    flows: Tuple[_Flow, ...]
    activation_bytes: int
    problem: Optional[str] = field(metadata={"choices": p.PROBLEMS})
    labels: Tuple[str, ...]
    segments: Optional[_Segments]
    texts: Optional[_OldTexts]
    aliases: Dict[str, Tuple[str, ...]]
    buffers: Tuple[str, ...]
    pinned: Tuple[str, ...]
    sliced: Tuple[str, ...]
    unused: Tuple[str, ...]


@dataclass(frozen=True)
class _EncoderManifest(Common):
    encoder: e.Encoder
    stages: Tuple[OldStage, ...]
    proof: Optional[Dict[str, Any]]
    """Free-form proof of format 1, which nothing reads."""


@dataclass(frozen=True)
class _ModuleManifest(Common):
    program: OldProgram
    stages: Tuple[OldStage, ...]
    proof: Optional[Dict[str, Any]]


def lift(tree: Mapping[str, Any], version: int) -> Manifest:
    """Return a manifest of format 1 or 2 with its computation as a program. Raises WrongError."""
    if version == ENCODER_FORMAT:
        encoder: _EncoderManifest = read(_EncoderManifest, tree, "")
        program, labels = lift_encoder(encoder.encoder, encoder.stages, encoder.shards_by_name())
        return encoder.manifest(program, inline_labels=labels)
    module: _ModuleManifest = read(_ModuleManifest, tree, "")
    proof = lift_proof(module.proof)
    program, labels = lift_module(module.program, module.stages, module.shards_by_name(), proof)
    return module.manifest(program, proof, inline_labels=labels)


def lift_encoder(encoder: e.Encoder, stages: Sequence[OldStage], shards: Shards) -> Tuple[Program, Tuple[str, ...]]:
    """Return the program and the labels of a manifest of format 1. Raises WrongError."""
    wrong = e.wrong_heads(encoder.hidden_size, encoder.num_heads)
    if wrong is not None:
        raise WrongError(f"encoder: {wrong}")
    if not (encoder.head_activation is None) == (encoder.problem is None) == (not encoder.labels):
        raise WrongError("encoder: head_activation, problem and labels go together")
    _check_stages(stages, shards)
    num_layers = sum(stage.role == "layer" for stage in stages)
    if num_layers != encoder.num_layers:
        raise WrongError(f"{num_layers} layers are listed, the encoder has {encoder.num_layers}")
    head = ["head"] if encoder.problem is not None else []
    if [stage.role for stage in stages] != ["embedding", *["layer"] * num_layers, *head]:
        raise WrongError(f"stages must be an embedding, the layers and {'a' if head else 'no'} head, in this order")
    placed = [_placed(stage, shards) for stage in stages]
    gathered = tuple(name for name, shard in shards.items() if shard.blocks is not None)
    for name in gathered:
        found = {tensor.role: (tensor.dtype, tensor.shape) for tensor in shards[name].tensors}
        if found != {role: (FLOAT, shape) for role, shape in e.table_shapes(encoder).items()}:
            raise WrongError(f"shard {name!r} must hold the tables of the encoder, not {found}")
    return e.encoder_program(encoder, placed, gathered), encoder.labels


def _check_stages(stages: Sequence[OldStage], shards: Shards) -> None:
    require_distinct((stage.name for stage in stages), "stage")
    for stage in stages:
        require_listed(stage.shards, shards, f"stage {stage.name!r} needs shard")


def _placed(stage: OldStage, shards: Shards) -> e.PlacedStage:
    num_gathered = sum(shards[name].blocks is not None for name in stage.shards)
    if stage.role == "embedding" and (len(stage.steps), num_gathered) != (1, 1):
        raise WrongError(f"stage {stage.name!r} must be one step that gathers rows from one shard")
    if stage.role != "embedding" and (not stage.steps or num_gathered):
        raise WrongError(f"stage {stage.name!r} must have steps, and gather no rows")
    kinds = tuple(step.kind for step in stage.steps)
    wanted = e.LAYER_KERNELS if stage.role == "layer" else (stage.role,)
    if kinds != wanted:
        raise WrongError(f"stage {stage.name} has the steps {kinds}, not {wanted}")
    steps = []
    for step in stage.steps:
        tensors = [tensor for name in step.shards for tensor in shards[name].tensors]
        by_role = {tensor.role: tensor.name for tensor in tensors}
        if len(by_role) != len(tensors):
            raise WrongError(f"stage {stage.name!r}, step {step.kind!r}: two tensors have one role")
        steps.append(e.PlacedStep(step.kind, step.shards, by_role))
    return e.PlacedStage(stage.name, _ROLES[stage.role], tuple(steps))


def lift_proof(tree: Optional[Mapping[str, Any]]) -> Proof:
    """Return the proof of a manifest of format 2, whose keys may be missing. Raises WrongError."""
    found = read(_OldProof, {**p.plain(Proof()), **(tree or {})}, "proof")
    examples = []
    for example in found.examples:
        inputs = {name: ProvenInput(*described) for name, described in example.inputs.items()}
        examples.append(ProvenExample(**{**vars(example), "inputs": inputs}))
    return Proof(tuple(examples), found.is_paged, found.unsaved_buffers_sha256)


def lift_module(
    old: OldProgram, stages: Sequence[OldStage], shards: Shards, proof: Proof
) -> Tuple[Program, Tuple[str, ...]]:
    """Return the program and the labels of a manifest of format 2. Raises WrongError."""
    _check_stages(stages, shards)
    if old.texts is not None and (p.INPUT_IDS not in old.inputs or len(old.inputs[p.INPUT_IDS].shape) != 2):
        raise WrongError(f"program.inputs: no {p.INPUT_IDS!r} where texts are the input")
    proven = [{name: Value(each.dtype, each.shape) for name, each in part.inputs.items()} for part in proof.examples]
    divided = {name: example.value() for name, example in old.inputs.items()}
    inputs, example = captured_inputs([divided, *proven], old.texts is not None)
    output = None if old.problem is None else Output("", old.problem, len(old.labels))
    texts = None if old.texts is None else Texts(**vars(old.texts))
    program = Program(inputs, {}, {}, (), output, texts, _module(old, stages), old.activation_bytes, example)
    if old.segments is not None:
        program = _with_steps(old.segments, program, stages, shards)
    return program, old.labels if old.problem is not None else ()


def _module(old: OldProgram, stages: Sequence[OldStage]) -> Module:
    if not stages or len(old.flows) != len(stages):
        raise WrongError(f"program.flows has {len(old.flows)} entries for {len(stages)} stages")
    parts = []
    for stage, flow in zip(stages, old.flows):
        if stage.role != "layer" or len(stage.steps) != 1:
            raise WrongError(f"stage {stage.name!r} must be one step of a layer")
        parts.append(Part(stage.shards, flow.start, tuple(value.value() for value in flow.values), flow.hidden))
    tensors = (old.aliases, old.buffers, old.pinned, old.sliced, old.unused)
    return Module(old.module, old.weights_sha256, old.versions, tuple(parts), *tensors)


def _with_steps(old: _Segments, program: Program, stages: Sequence[OldStage], shards: Shards) -> Program:
    """Return a program that runs the captured graphs: one stage for each stretch between exits."""
    where = "program.segments"
    if len(old.stages) != len(stages):
        raise WrongError(f"{where} has {len(old.stages)} stages, not {len(stages)}")
    if list(old.exits) != sorted(set(old.exits)) or any(index >= len(stages) for index in old.exits):
        raise WrongError(f"{where}.exits must be stages in order, not {[*old.exits]}")
    if not old.outputs:
        raise WrongError(f"{where}.outputs must name what the module returns")
    named = [name for segment in old.stages for name in (*segment.reads, *segment.writes)]
    require_listed((*old.outputs, *named, *old.batch, *old.look_ups), old.values, f"{where} names the value")
    for index in old.exits:
        if not old.stages[index].reads:
            raise WrongError(f"{where}.exits: stage {index} behind an exit reads no value")
    for name, axis in old.batch.items():
        if axis >= len(old.values[name].shape):
            raise WrongError(f"{where}.batch: {name!r} has no axis {axis}")
    values = {name: example.value(old.batch.get(name)) for name, example in old.values.items()}
    pieces = [_placed_piece(segment, stage, shards) for segment, stage in zip(old.stages, stages)]
    lookups = {}
    for name, part in old.look_ups.items():
        if part.input not in program.inputs:
            raise WrongError(f"{where}.look_ups: {name!r} is looked up by {part.input!r}, no input of ids")
        value = Value(values[name].dtype, (*program.inputs[part.input].axes, *values[name].axes[-1:]))
        lookups[name] = LookUp(part.table, part.input, value)
    return captured_program(program, pieces, values, old.exits, lookups, old.outputs[0])


def _placed_piece(segment: _Segment, stage: OldStage, shards: Shards) -> Piece:
    """Return the piece of a segment with those shards of its stage that contain a weight of its graph."""
    taken = set(segment.weights)
    needed = tuple(name for name in stage.shards if any(tensor.name in taken for tensor in shards[name].tensors))
    return Piece(*vars(segment).values(), shards=needed)
