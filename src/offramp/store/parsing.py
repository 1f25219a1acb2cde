"""Reading a manifest: the one place that checks it.

Unknown or missing keys, types, names and sizes are refused here by name, so that the rest of the house trusts a
`Manifest`. That the bytes of the files are the promised ones is `store.reader` and `store.checking`'s matter; that the
tensors fit the computation is the backend's.
"""

from __future__ import annotations

import re
from typing import Any, Dict, Iterable, List, Set, Tuple, Union

from offramp.errors import DamagedError, VersionError
from offramp.program.checks import WrongError, choice_of, int_of, list_of, object_of, str_of
from offramp.program.program import Program, program_of
from offramp.store.manifest import (
    ACTIVATIONS,
    FILE_NAME,
    FORMAT,
    MAX_GRAPH_BYTES,
    MAX_MANIFEST_BYTES,
    MODULE_FORMAT,
    PROBLEMS,
    Encoder,
    Exits,
    File,
    Graph,
    Manifest,
    ModuleManifest,
    Shard,
    Source,
    Stage,
    Step,
    Tensor,
    all_files,
    is_sealed,
)
from offramp.store.safetensors import ITEM_BYTES, MAX_RANK, PAGE_BYTES, strict_json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FILE = re.compile(r"(graphs/)?[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "divide the model again"


def loads(data: bytes, where: object = FILE_NAME) -> Union[Manifest, ModuleManifest]:
    """Parse and check a manifest. Raises VersionError for another format, DamagedError naming the key otherwise."""
    try:
        tree = strict_json(data)
    except ValueError as error:
        raise DamagedError(f"manifest is not JSON ({error})", where, _REMEDY) from None
    if not isinstance(tree, dict):
        raise DamagedError("manifest is not a JSON object", where, _REMEDY)
    version = tree.pop("format", None)
    if type(version) is not int or version not in (FORMAT, MODULE_FORMAT):
        what = f"manifest has format {version!r}, this version reads {FORMAT} and {MODULE_FORMAT}"
        raise VersionError(what, where, "use the offramp that wrote it, or divide again")
    try:
        manifest = _manifest(tree) if version == FORMAT else _module_manifest(tree)
        _require_distinct((file.file.lower() for file in all_files(manifest)), "file")  # some file systems fold case
        _check_graphs(manifest)
    except WrongError as error:
        raise DamagedError(f"manifest: {error}", where, _REMEDY) from None
    if not is_sealed(data):
        raise DamagedError("manifest was changed: it does not end in its own sha256", where, _REMEDY)
    return manifest


def _file_fields(tree: dict, where: str) -> Tuple[str, int, str]:
    return (
        str_of(tree["file"], where + ".file", _FILE),
        int_of(tree["bytes"], where + ".bytes"),
        str_of(tree["sha256"], where + ".sha256", _SHA256),
    )


def _file(tree: Any, where: str) -> File:
    return File(*_file_fields(object_of(tree, where, "file bytes sha256"), where))


def _graph(tree: Any, where: str) -> Graph:
    tree = object_of(tree, where, "file bytes sha256 opset ir")
    graph = Graph(
        *_file_fields(tree, where), int_of(tree["opset"], where + ".opset", 1), int_of(tree["ir"], where + ".ir", 1)
    )
    if graph.bytes > MAX_GRAPH_BYTES:
        raise WrongError(f"{where} of {graph.bytes} bytes is larger than {MAX_GRAPH_BYTES}")
    return graph


def _tensor(tree: Any, where: str) -> Tensor:
    tree = object_of(tree, where, "name role dtype shape offset")
    shape = tuple(int_of(extent, where + ".shape") for extent in list_of(tree["shape"], where + ".shape"))
    if len(shape) > MAX_RANK:
        raise WrongError(f"{where}.shape has {len(shape)} extents, at most {MAX_RANK} are read")
    return Tensor(
        str_of(tree["name"], where + ".name"),
        str_of(tree["role"], where + ".role"),
        choice_of(tree["dtype"], where + ".dtype", tuple(ITEM_BYTES)),
        shape,
        int_of(tree["offset"], where + ".offset"),
    )


def _shard(tree: Any, where: str) -> Shard:
    tree = object_of(tree, where, "name file bytes sha256 data_start tensors blocks")
    file, size, sha256 = _file_fields(tree, where)
    shard = Shard(
        str_of(tree["name"], where + ".name", _NAME),
        file,
        size,
        sha256,
        int_of(tree["data_start"], where + ".data_start", PAGE_BYTES, min(size, MAX_MANIFEST_BYTES)),
        tuple(
            _tensor(tensor, f"{where}.tensors[{i}]")
            for i, tensor in enumerate(list_of(tree["tensors"], where + ".tensors"))
        ),
        None if tree["blocks"] is None else _file(tree["blocks"], where + ".blocks"),
    )
    _check_layout(shard, where)
    return shard


def _check_layout(shard: Shard, where: str) -> None:
    if shard.data_start % PAGE_BYTES:
        raise WrongError(f"{where}.data_start {shard.data_start} is not a multiple of {PAGE_BYTES}")
    end = 0
    for tensor in sorted(shard.tensors, key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            raise WrongError(f"{where}: tensor {tensor.name!r} begins at {tensor.offset}, not at {end}")
        end += tensor.num_bytes
    if end != shard.data_bytes:
        raise WrongError(f"{where}: tensors take {end} bytes, the file holds {shard.data_bytes}")


def _step(tree: Any, where: str) -> Step:
    tree = object_of(tree, where, "kind shards")
    shards = tuple(str_of(name, where + ".shards", _NAME) for name in list_of(tree["shards"], where + ".shards"))
    return Step(str_of(tree["kind"], where + ".kind", _NAME), shards)


def _stage(tree: Any, where: str, roles: Tuple[str, ...]) -> Stage:
    tree = object_of(tree, where, "name role steps")
    steps = tuple(_step(step, f"{where}.steps[{i}]") for i, step in enumerate(list_of(tree["steps"], where + ".steps")))
    role = choice_of(tree["role"], where + ".role", roles)
    return Stage(str_of(tree["name"], where + ".name", _NAME), role, steps)


def _source(tree: Any) -> Source:
    tree = object_of(tree, "source", "fingerprint architecture model_type method widened_from")
    widened = tree["widened_from"]
    return Source(
        str_of(tree["fingerprint"], "source.fingerprint", _SHA256),
        str_of(tree["architecture"], "source.architecture"),
        str_of(tree["model_type"], "source.model_type"),
        str_of(tree["method"], "source.method"),
        None if widened is None else choice_of(widened, "source.widened_from", tuple(ITEM_BYTES)),
    )


def _encoder(tree: Any) -> Encoder:
    sizes = "hidden_size embedding_size num_layers num_heads intermediate_size vocab_size max_length"
    counts = "position_offset num_token_types pad_token"
    tree = object_of(tree, "encoder", f"{sizes} {counts} activation norm_epsilon head_activation problem labels")
    numbers = {key: int_of(tree[key], "encoder." + key, 1, 1 << 40) for key in sizes.split()}
    numbers.update({key: int_of(tree[key], "encoder." + key, 0, 1 << 40) for key in counts.split()})
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
        labels=tuple(str_of(label, "encoder.labels") for label in labels),
        **numbers,
    )


_COMMON = "source stages shards graphs files exits proof sha256"


def _manifest(tree: dict) -> Manifest:
    tree = object_of(tree, "manifest", _COMMON + " encoder")
    manifest = Manifest(encoder=_encoder(tree["encoder"]), **_common(tree, ("embedding", "layer", "head")))
    _check_stages(manifest)
    _check_tables(manifest)
    return manifest


def _module_manifest(tree: dict) -> ModuleManifest:
    tree = object_of(tree, "manifest", _COMMON + " program")
    manifest = ModuleManifest(program=program_of(tree["program"]), **_common(tree, ("layer",)))
    _check_program(manifest)
    return manifest


def _common(tree: dict, roles: Tuple[str, ...]) -> Dict[str, Any]:
    """The fields that both kinds of manifest have."""
    shards = [_shard(shard, f"shards[{i}]") for i, shard in enumerate(list_of(tree["shards"], "shards"))]
    _require_distinct((shard.name for shard in shards), "shard")
    _require_distinct((tensor.name for shard in shards for tensor in shard.tensors), "tensor")
    stages = list_of(tree["stages"], "stages")
    graphs, exits, proof = tree["graphs"], tree["exits"], tree["proof"]
    if not isinstance(graphs, dict):
        raise WrongError("graphs must be an object")
    if exits is not None:
        exits = object_of(exits, "exits", "heads description")
        exits = Exits(_file(exits["heads"], "exits.heads"), _file(exits["description"], "exits.description"))
    if proof is not None and not isinstance(proof, dict):
        raise WrongError("proof must be an object or null")
    return {
        "source": _source(tree["source"]),
        "stages": tuple(_stage(stage, f"stages[{i}]", roles) for i, stage in enumerate(stages)),
        "shards": {shard.name: shard for shard in shards},
        "graphs": {str_of(kind, "graphs", _NAME): _graph(graph, "graphs." + kind) for kind, graph in graphs.items()},
        "files": tuple(_file(file, f"files[{i}]") for i, file in enumerate(list_of(tree["files"], "files"))),
        "exits": exits,
        "proof": proof,
    }


def _require_distinct(names: Iterable[str], what: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise WrongError(f"{what} {name!r} is listed twice")
        seen.add(name)


def _check_stages(manifest: Manifest) -> None:
    """One embedding that gathers from one shard, the layers, and a head if the encoder has one."""
    stages, num_layers = manifest.stages, manifest.encoder.num_layers
    if len(manifest.layers) != num_layers:
        raise WrongError(f"{len(manifest.layers)} layers are listed, the encoder has {num_layers}")
    head = ["head"] if manifest.encoder.problem is not None else []
    if [stage.role for stage in stages] != ["embedding", *["layer"] * num_layers, *head]:
        raise WrongError(f"stages must be an embedding, the layers and {'a' if head else 'no'} head, in this order")
    _require_distinct((stage.name for stage in stages), "stage")
    for stage in stages:
        _check_steps(stage, manifest)


def _check_steps(stage: Stage, manifest: Manifest) -> None:
    names = _shards_of(stage, manifest)
    for step in stage.steps:
        roles = [tensor.role for name in step.shards for tensor in manifest.shards[name].tensors]
        if len(set(roles)) != len(roles):
            raise WrongError(f"stage {stage.name!r}, step {step.kind!r}: two tensors have one role")
    num_gathered = sum(manifest.shards[name].blocks is not None for name in names)
    if stage.role == "embedding" and (len(stage.steps), num_gathered) != (1, 1):
        raise WrongError(f"stage {stage.name!r} must be one step that gathers rows from one shard")
    if stage.role != "embedding" and (not stage.steps or num_gathered):
        raise WrongError(f"stage {stage.name!r} must have steps, and gather no rows")


def _shards_of(stage: Stage, manifest: Union[Manifest, ModuleManifest]) -> List[str]:
    """The shards that a stage needs, all of which are listed."""
    names = [name for step in stage.steps for name in step.shards]
    for name in names:
        if name not in manifest.shards:
            raise WrongError(f"stage {stage.name!r} needs shard {name!r}, which is not listed")
    return names


def _check_program(manifest: ModuleManifest) -> None:
    """One flow and one step a stage, the first stage begins with the pass, and all names are those of tensors."""
    program, stages = manifest.program, manifest.stages
    if not stages or len(program.flows) != len(stages):
        raise WrongError(f"program.flows has {len(program.flows)} entries for {len(stages)} stages")
    if [flow.start is None for flow in program.flows] != [True] + [False] * (len(stages) - 1):
        raise WrongError("program.flows: the first stage, and no other, has no start")
    _require_distinct((stage.name for stage in stages), "stage")
    _require_distinct((f"{flow.start.module}, {flow.start.number}" for flow in program.flows if flow.start), "start")
    for stage in stages:
        if len(stage.steps) != 1:
            raise WrongError(f"stage {stage.name!r} must be one step")
        _require_distinct(_shards_of(stage, manifest), f"in stage {stage.name!r}, shard")
    segments = program.segments
    if segments is not None and len(segments.stages) != len(stages):
        raise WrongError(f"program.segments has {len(segments.stages)} stages, not {len(stages)}")
    known: Set[str] = {tensor.name for shard in manifest.shards.values() for tensor in shard.tensors}
    aliases = [name for names in program.aliases.values() for name in names]
    if segments is not None:
        taken = {name for segment in segments.stages for name in (*segment.weights, *segment.constants)}
        lost = sorted(taken - known)
        if lost:
            raise WrongError(f"program.segments takes the tensor {lost[0]!r}, which is not listed")
        for number, (segment, stage) in enumerate(zip(segments.stages, stages)):
            shards = [manifest.shards[name] for step in stage.steps for name in step.shards]
            there = {tensor.name for shard in shards for tensor in shard.tensors}
            lost = [name for name in segment.weights if name not in there]
            if lost:
                raise WrongError(f"program.segments.stages[{number}] takes {lost[0]!r}, not in the shards of its stage")
    tables = [] if segments is None else [look_up.table for look_up in segments.look_ups.values()]
    named = [*program.aliases, *program.buffers, *program.sliced, *program.unused, *tables]
    for what, names, there in (("tensor", named, known), ("shard", program.pinned, set(manifest.shards))):
        lost = [name for name in names if name not in there]
        if lost:
            raise WrongError(f"program names the {what} {lost[0]!r}, which is not listed")
    _require_distinct([*known, *aliases], "tensor")
    _check_shards(manifest)


def _check_shards(manifest: ModuleManifest) -> None:
    """A shard that is read by rows is one table, what may be sliced is one, and buffers are in no stage."""
    program, shards = manifest.program, manifest.shards
    for shard in shards.values():
        is_table = len(shard.tensors) == 1 and len(shard.tensors[0].shape) == 2 and shard.tensors[0].shape[0] > 0
        if shard.blocks is not None and not is_table:
            raise WrongError(f"shard {shard.name!r}, of which rows are gathered, must hold one table")
    home = {tensor.name: shard for shard in shards.values() for tensor in shard.tensors}
    for name in program.sliced:
        if home[name].blocks is None:
            raise WrongError(f"program.sliced names {name!r}, of whose shard no rows are gathered")
    for value, look_up in (program.segments.look_ups if program.segments else {}).items():
        _check_look_up(program, value, look_up.input, home[look_up.table])
    placed = {name for stage in manifest.stages for step in stage.steps for name in step.shards}
    for name in program.pinned:
        if shards[name].blocks is not None:
            raise WrongError(f"program.pinned names {name!r}, of which rows are gathered")
    for name in program.buffers:
        if home[name].name in placed | set(program.pinned):
            raise WrongError(f"program.buffers names {name!r}, which is in a stage")


def _check_look_up(program: Program, value: str, ids: str, shard: Shard) -> None:
    """What is looked up are rows of a table of numbers, one for each id; of texts it has one for every token."""
    (table,) = shard.tensors[:1]
    if shard.blocks is None or table.role != "rows":
        raise WrongError(f"program.segments looks up {table.name!r}, of whose shard no rows are gathered")
    assert program.segments is not None
    found, expected = program.segments.values[value], (*program.inputs[ids].shape, table.shape[1])
    if table.dtype != "F32" or found.dtype != "float32" or found.shape != expected:
        raise WrongError(f"program.segments.values: {value!r} is {found}, its rows are {table.dtype} {expected}")
    if program.texts is not None and table.shape[0] < program.texts.vocab_size:
        raise WrongError(f"program.texts.vocab_size is more than the {table.shape[0]} rows of {table.name!r}")


def _check_tables(manifest: Manifest) -> None:
    """The tables that rows are gathered from have a row for everything that may be asked for."""
    encoder, width = manifest.encoder, manifest.encoder.embedding_size
    expected = {"word": encoder.vocab_size, "position": encoder.max_length + encoder.position_offset}
    if encoder.num_token_types:
        expected["type"] = encoder.num_token_types
    for shard in manifest.shards.values():
        found = {tensor.role: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
        if shard.blocks is not None and found != {role: ("F32", (rows, width)) for role, rows in expected.items()}:
            raise WrongError(f"shard {shard.name!r} must hold the tables of the encoder, not {found}")


def _check_graphs(manifest: Union[Manifest, ModuleManifest]) -> None:
    """None, or one for each kind, and, of an encoder, one named `exit` where there are exits."""
    if isinstance(manifest, ModuleManifest):
        segments = manifest.program.segments
        needed = set() if segments is None else {segment.kind for segment in segments.stages}
    else:
        needed = {step.kind for stage in manifest.stages for step in stage.steps}
        needed |= set() if manifest.exits is None else {"exit"}
    if manifest.graphs and needed - set(manifest.graphs):
        raise WrongError(f"kinds {sorted(needed - set(manifest.graphs))} have no graph")
