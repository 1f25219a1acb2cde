"""Manifests of formats 1 and 2: their description of the computation becomes a program.

Format 1 describes a text encoder by its sizes, format 2 a module by the calls between its stages and, where it could be
exported, by one captured graph for each stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from offramp.program.captured import Piece, captured_inputs, captured_program
from offramp.program.checks import WrongError, choice_of, int_of, items_of, list_of, names_of, object_of, str_of
from offramp.program.encoder import (
    ACTIVATIONS,
    LAYER_KERNELS,
    MAX_SIZE,
    Encoder,
    PlacedStage,
    PlacedStep,
    encoder_program,
    table_shapes,
)
from offramp.program.parsing import MAX_RANK, NAME, call_of, require_distinct, texts_of
from offramp.program.program import (
    BATCH,
    BEGIN,
    END,
    INPUT_IDS,
    LAYER,
    PROBLEMS,
    Axis,
    LookUp,
    Module,
    Output,
    Part,
    Program,
    Texts,
    Value,
)
from offramp.store.manifest import Proof, Shard

Shards = Mapping[str, Shard]
_ROLES = {"embedding": BEGIN, "layer": LAYER, "head": END}
"""Role of a stage in formats 1 and 2 -> its role in a program."""


@dataclass(frozen=True)
class _OldStage:
    """A stage of formats 1 and 2: its steps are pairs of a kind and the shards that it needs."""

    name: str
    role: str
    steps: Tuple[Tuple[str, Tuple[str, ...]], ...]

    @property
    def shards(self) -> Tuple[str, ...]:
        return tuple(name for _, names in self.steps for name in names)


def lift_encoder(tree: Any, stages_tree: Any, shards: Shards) -> Tuple[Program, Tuple[str, ...]]:
    """Return the program and the labels of a manifest of format 1. Raises WrongError."""
    encoder = _encoder(tree)
    stages = _old_stages(stages_tree, tuple(_ROLES), shards)
    num_layers = sum(stage.role == "layer" for stage in stages)
    if num_layers != encoder.num_layers:
        raise WrongError(f"{num_layers} layers are listed, the encoder has {encoder.num_layers}")
    head = ["head"] if encoder.problem is not None else []
    if [stage.role for stage in stages] != ["embedding", *["layer"] * num_layers, *head]:
        raise WrongError(f"stages must be an embedding, the layers and {'a' if head else 'no'} head, in this order")
    for stage in stages:
        _check_gathering(stage, shards)
    gathered = tuple(name for name, shard in shards.items() if shard.blocks is not None)
    for name in gathered:
        found = {tensor.role: (tensor.dtype, tensor.shape) for tensor in shards[name].tensors}
        if found != {role: ("F32", shape) for role, shape in table_shapes(encoder).items()}:
            raise WrongError(f"shard {name!r} must hold the tables of the encoder, not {found}")
    placed = [_placed(stage, shards) for stage in stages]
    return encoder_program(encoder, placed, gathered), encoder.labels


def _encoder(tree: Any) -> Encoder:
    sizes = "hidden_size embedding_size num_layers num_heads intermediate_size vocab_size max_length"
    counts = "position_offset num_token_types pad_token"
    tree = object_of(tree, "encoder", f"{sizes} {counts} activation norm_epsilon head_activation problem labels")
    numbers = {key: int_of(tree[key], "encoder." + key, 1, MAX_SIZE) for key in sizes.split()}
    numbers.update({key: int_of(tree[key], "encoder." + key, 0, MAX_SIZE) for key in counts.split()})
    epsilon = tree["norm_epsilon"]
    if not isinstance(epsilon, float) or not 0 <= epsilon < 1:
        raise WrongError(f"encoder.norm_epsilon must be a small number, not {epsilon!r}")
    if numbers["hidden_size"] % numbers["num_heads"]:
        raise WrongError(
            f"encoder: hidden_size {numbers['hidden_size']} is not a multiple of num_heads {numbers['num_heads']}"
        )
    head, problem, labels = tree["head_activation"], tree["problem"], list_of(tree["labels"], "encoder.labels")
    if not (head is None) == (problem is None) == (not labels):
        raise WrongError("encoder: head_activation, problem and labels go together")
    if problem == "regression" and len(labels) != 1:
        raise WrongError(f"encoder: a regression has one label, not {len(labels)}")
    return Encoder(
        activation=choice_of(tree["activation"], "encoder.activation", ACTIVATIONS),
        norm_epsilon=epsilon,
        head_activation=None if head is None else choice_of(head, "encoder.head_activation", ACTIVATIONS),
        problem=None if problem is None else choice_of(problem, "encoder.problem", PROBLEMS),
        labels=names_of(labels, "encoder.labels"),
        **numbers,
    )


def _old_stages(tree: Any, roles: Tuple[str, ...], shards: Shards) -> List[_OldStage]:
    stages = []
    for index, part in enumerate(list_of(tree, "stages")):
        where = f"stages[{index}]"
        part = object_of(part, where, "name role steps")
        steps = []
        for number, step in enumerate(list_of(part["steps"], where + ".steps")):
            step = object_of(step, f"{where}.steps[{number}]", "kind shards")
            names = names_of(step["shards"], f"{where}.steps[{number}].shards", NAME)
            steps.append((str_of(step["kind"], f"{where}.steps[{number}].kind", NAME), names))
        role = choice_of(part["role"], where + ".role", roles)
        stages.append(_OldStage(str_of(part["name"], where + ".name", NAME), role, tuple(steps)))
    require_distinct((stage.name for stage in stages), "stage")
    for stage in stages:
        for name in stage.shards:
            if name not in shards:
                raise WrongError(f"stage {stage.name!r} needs shard {name!r}, which is not listed")
    return stages


def _check_gathering(stage: _OldStage, shards: Shards) -> None:
    """Raise WrongError unless the embedding gathers rows from one shard, and no other stage from any."""
    num_gathered = sum(shards[name].blocks is not None for name in stage.shards)
    if stage.role == "embedding" and (len(stage.steps), num_gathered) != (1, 1):
        raise WrongError(f"stage {stage.name!r} must be one step that gathers rows from one shard")
    if stage.role != "embedding" and (not stage.steps or num_gathered):
        raise WrongError(f"stage {stage.name!r} must have steps, and gather no rows")


def _placed(stage: _OldStage, shards: Shards) -> PlacedStage:
    kinds = tuple(kind for kind, _ in stage.steps)
    wanted = LAYER_KERNELS if stage.role == "layer" else (stage.role,)
    if kinds != wanted:
        raise WrongError(f"stage {stage.name} has the steps {kinds}, not {wanted}")
    steps = []
    for kind, names in stage.steps:
        tensors = [tensor for name in names for tensor in shards[name].tensors]
        by_role = {tensor.role: tensor.name for tensor in tensors}
        if len(by_role) != len(tensors):
            raise WrongError(f"stage {stage.name!r}, step {kind!r}: two tensors have one role")
        steps.append(PlacedStep(kind, names, by_role))
    return PlacedStage(stage.name, _ROLES[stage.role], tuple(steps))


def lift_proof(tree: Any) -> Dict[str, Any]:
    """Return the proof of a manifest of format 2 as format 3 writes it. Raises WrongError."""
    proof = {"examples": [], "is_paged": False, "unsaved_buffers_sha256": None}
    proof.update(items_of({} if tree is None else tree, "proof"))
    examples = [dict(items_of(part, "proof.examples")) for part in list_of(proof["examples"], "proof.examples")]
    for example in examples:
        inputs = {name: list_of(part, "proof.examples") for name, part in items_of(example.get("inputs"), "proof")}
        if any(len(part) != 2 for part in inputs.values()):
            raise WrongError("proof.examples: an input is a dtype and a shape")
        example["inputs"] = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in inputs.items()}
    return {**proof, "examples": examples}


@dataclass(frozen=True)
class _Example:
    """A tensor as it was in the example of the division."""

    dtype: str
    shape: Tuple[int, ...]

    def value(self, batch_axis: Optional[int]) -> Value:
        axes: List[Axis] = list(self.shape)
        if batch_axis is not None:
            axes[batch_axis] = BATCH
        return Value(self.dtype, tuple(axes))


def lift_module(tree: Any, stages_tree: Any, shards: Shards, proof: Proof) -> Tuple[Program, Tuple[str, ...]]:
    """Return the program and the labels of a manifest of format 2. Raises WrongError."""
    about = "module weights_sha256 versions inputs flows activation_bytes problem labels segments texts"
    tree = object_of(tree, "program", about + " aliases buffers pinned sliced unused")
    stages = _old_stages(stages_tree, ("layer",), shards)
    examples = _examples(tree["inputs"], "program.inputs")
    texts, labels = _texts(tree["texts"]), names_of(tree["labels"], "program.labels")
    problem = None if tree["problem"] is None else choice_of(tree["problem"], "program.problem", PROBLEMS)
    if texts is not None and len(examples.get(INPUT_IDS, _Example("", ())).shape) != 2:
        raise WrongError(f"program.inputs: no {INPUT_IDS!r} where texts are the input")
    proven = [{name: Value(each.dtype, each.shape) for name, each in part.inputs.items()} for part in proof.examples]
    divided = {name: example.value(None) for name, example in examples.items()}
    inputs, example = captured_inputs([divided, *proven], texts is not None)
    program = Program(
        inputs=inputs,
        output=None if problem is None else Output("", problem, len(labels)),
        texts=texts,
        module=_module(tree, stages),
        activation_bytes=int_of(tree["activation_bytes"], "program.activation_bytes"),
        example=example,
    )
    if tree["segments"] is not None:
        program = _with_steps(tree["segments"], program, stages, shards)
    return program, labels if problem is not None else ()


def _texts(tree: Any) -> Optional[Texts]:
    if tree is None:
        return None
    tree = object_of(tree, "program.texts", "vocab_size max_length num_token_types pad_token")
    return texts_of({**tree, "position_offset": 0}, "program.texts")


def _examples(tree: Any, where: str) -> Dict[str, _Example]:
    found = {}
    for name, part in items_of(tree, where):
        part = object_of(part, where, "dtype shape")
        shape = tuple(int_of(size, where + ".shape") for size in list_of(part["shape"], where + ".shape"))
        if len(shape) > MAX_RANK:
            raise WrongError(f"{where}.shape has {len(shape)} dimensions, at most {MAX_RANK} are read")
        found[name] = _Example(str_of(part["dtype"], where + ".dtype"), shape)
    return found


def _module(tree: Dict[str, Any], stages: Sequence[_OldStage]) -> Module:
    flows = list_of(tree["flows"], "program.flows")
    if not stages or len(flows) != len(stages):
        raise WrongError(f"program.flows has {len(flows)} entries for {len(stages)} stages")
    for stage in stages:
        if len(stage.steps) != 1:
            raise WrongError(f"stage {stage.name!r} must be one step")
    versions, aliases = (items_of(tree[key], f"program.{key}") for key in ("versions", "aliases"))
    return Module(
        str_of(tree["module"], "program.module"),
        str_of(tree["weights_sha256"], "program.weights_sha256"),
        {name: str_of(version, "program.versions") for name, version in versions},
        tuple(_part(flow, stage, f"program.flows[{i}]") for i, (flow, stage) in enumerate(zip(flows, stages))),
        {name: names_of(names, "program.aliases") for name, names in aliases},
        *(names_of(tree[key], f"program.{key}") for key in ("buffers", "pinned", "sliced", "unused")),
    )


def _part(tree: Any, stage: _OldStage, where: str) -> Part:
    tree = object_of(tree, where, "start values hidden")
    values = list_of(tree["values"], where + ".values")
    flows = tuple(_examples({"": value}, where + ".values")[""].value(None) for value in values)
    hidden = tree["hidden"]
    hidden = None if hidden is None else int_of(hidden, where + ".hidden", 0, len(flows) - 1)
    return Part(stage.shards, call_of(tree["start"], where + ".start"), flows, hidden)


def _with_steps(tree: Any, program: Program, stages: Sequence[_OldStage], shards: Shards) -> Program:
    """Return a program that runs the captured graphs: one stage for each stretch between exits."""
    where = "program.segments"
    tree = object_of(tree, where, "stages outputs values batch exits look_ups")
    values = _values(tree, where)
    segments = [_segment(part, f"{where}.stages[{i}]") for i, part in enumerate(list_of(tree["stages"], where))]
    if len(segments) != len(stages):
        raise WrongError(f"{where} has {len(segments)} stages, not {len(stages)}")
    exits = [int_of(index, where + ".exits", 1) for index in list_of(tree["exits"], where + ".exits")]
    if exits != sorted(set(exits)) or any(index >= len(segments) for index in exits):
        raise WrongError(f"{where}.exits must be stages in order, not {exits}")
    outputs = names_of(tree["outputs"], where + ".outputs")
    if not outputs:
        raise WrongError(f"{where}.outputs must name what the module returns")
    named = [name for segment in segments for name in (*segment.reads, *segment.writes)]
    lost = [name for name in (*outputs, *named) if name not in values]
    if lost:
        raise WrongError(f"{where} names the value {lost[0]!r}, which is not listed")
    empty = [index for index in exits if not segments[index].reads]
    if empty:
        raise WrongError(f"{where}.exits: stage {empty[0]} behind an exit reads no value")
    pieces = [_placed_piece(piece, stage, shards) for piece, stage in zip(segments, stages)]
    lookups = {
        name: _look_up(name, part, program, values) for name, part in items_of(tree["look_ups"], where + ".look_ups")
    }
    return captured_program(program, pieces, values, exits, lookups, outputs[0])


def _values(tree: Dict[str, Any], where: str) -> Dict[str, Value]:
    examples = _examples(tree["values"], where + ".values")
    batch = {name: int_of(axis, where + ".batch") for name, axis in items_of(tree["batch"], where + ".batch")}
    for name, axis in batch.items():
        if name not in examples:
            raise WrongError(f"{where} names the value {name!r}, which is not listed")
        if axis >= len(examples[name].shape):
            raise WrongError(f"{where}.batch: {name!r} has no axis {axis}")
    return {name: example.value(batch.get(name)) for name, example in examples.items()}


def _segment(tree: Any, where: str) -> Piece:
    tree = object_of(tree, where, "kind reads writes weights constants")
    names = (names_of(tree[key], f"{where}.{key}") for key in ("reads", "writes", "weights", "constants"))
    return Piece(str_of(tree["kind"], where + ".kind", NAME), *names)


def _placed_piece(piece: Piece, stage: _OldStage, shards: Shards) -> Piece:
    """Return a piece with those shards of its stage that contain a weight of its graph."""
    taken = set(piece.weights)
    needed = (name for name in stage.shards if any(tensor.name in taken for tensor in shards[name].tensors))
    return replace(piece, shards=tuple(needed))


def _look_up(name: str, tree: Any, program: Program, values: Mapping[str, Value]) -> LookUp:
    where = "program.segments.look_ups"
    tree = object_of(tree, where, "table input")
    table, ids = (str_of(tree[key], f"{where}.{key}") for key in ("table", "input"))
    if name not in values:
        raise WrongError(f"program.segments names the value {name!r}, which is not listed")
    if ids not in program.inputs:
        raise WrongError(f"{where}: {name!r} is looked up by {ids!r}, no input of ids")
    value = values[name]
    return LookUp(table, ids, Value(value.dtype, (*program.inputs[ids].axes, *value.axes[-1:])))
