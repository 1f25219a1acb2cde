"""Division of any module by a run of it: the run decides the stages, the weights become a store, and runs from that
store prove that the answers are equal bit for bit.

Weights of a checkpoint are read in parts; a module that is in memory is not changed.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offramp.checkpoints.inputs import task_of
from offramp.checkpoints.source import EXITS, TRAINING, read_training
from offramp.checkpoints.weights import read_small
from offramp.division.config import DivisionConfig
from offramp.division.export import with_graphs
from offramp.division.proof import Original, prove_all, prove_slices, require_divisible, verdict
from offramp.errors import SourceError, StageError, UsageError
from offramp.program.captured import captured_inputs
from offramp.program.dtypes import ALIGNMENT_BYTES
from offramp.program.program import REGRESSION, SINGLE_LABEL, Call, Module, Output, Program, Texts
from offramp.store import Shard, StoreWriter
from offramp.store import manifest as m
from offramp.store.exits import parse_exits
from offramp.store.files import write_atomic
from offramp.store.trained_rows import FILE_NAME as TRAINED_ROWS
from offramp.streaming import attributes, layouts, placeholders
from offramp.streaming.capture import Arguments, LastUsed, value_of
from offramp.streaming.placement import NAMES
from offramp.streaming.stages import StagePlan, Trace, plan_stages
from offramp.units import format_size

Weights = Mapping[str, placeholders.Weight]
Chunks = Callable[[str], Iterator[bytes | memoryview]]
"""Function from a weight to its data in pieces."""
CHUNK_BYTES = 2 << 20
KEPT_BYTES = 64 << 20
"""Bytes of weights that are kept while a run is traced, in addition to the one in use."""
MIN_SLICED_ROWS = 4
"""Fewest rows of a weight that is read some rows at a time."""
KEPT = "kept"
"""Name of the shard of weights that stay in memory."""


@dataclass(frozen=True)
class TrainedExits:
    """Two files, and the problem and labels of the model that they were trained with."""

    heads: Path
    description: Path
    task: tuple[str | None, tuple[str, ...]]
    companions: tuple[Path, ...] = ()
    """Further files of the training that the store keeps, where no checkpoint brings them."""

    @property
    def calls(self) -> tuple[Call, ...]:
        """Calls that begin after an exit. Raises SourceError for a description that cannot be read."""
        data = read_small(self.description, m.MAX_EXITS_BYTES)
        points = parse_exits(data, self.description.parent, SourceError).points
        return tuple(Call(module, number) for module, number, _ in points)

    def added_to(self, manifest: m.Manifest, writer: StoreWriter) -> m.Manifest:
        """Copy the exits and return the manifest with them. Raises SourceError unless layers begin where they stand."""
        program = manifest.program
        assert program.module is not None and program.stages, "divided by export"
        steps = accumulate(len(layer.steps) for layer in program.layers[:-1])
        starts = tuple(program.module.parts[index].start for index in steps)
        if not self.calls:
            what = "the exits belong to the layers of a text encoder, which a division by a run does not tell apart"
            raise SourceError(what, self.description.parent, "divide with --method names")
        if starts != self.calls:
            what = f"{len(self.calls)} exits were trained, and the graphs of this division have {len(starts)} places"
            raise SourceError(what, self.description.parent, "train the exits again")
        files = (*manifest.files, *(writer.add_copy(path.name, path) for path in self.companions))
        return replace(manifest, exits=writer.add_exits(self.heads, self.description), files=files)


def own_exits(folder: Path, weights_sha256: str) -> TrainedExits:
    """Return the exits that `training.train_exits` wrote for a module that is no checkpoint.

    Raises SourceError for another folder, and where the exits were trained with other weights than the module has.
    """
    heads, description, _ = paths = [folder / name for name in (*EXITS, TRAINING)]
    missing = next((path.name for path in paths if not path.is_file()), None)
    if missing:
        raise SourceError(f"no run folder with exits: {missing} is missing", folder, "train them with train_exits")
    found = parse_exits(read_small(description, m.MAX_EXITS_BYTES), folder, SourceError)
    if not found.trained or found.weights_sha256 != weights_sha256:
        what = "the exits were trained with other weights than the module has"
        raise SourceError(what, folder, "safetensors.torch.load_model(module, FOLDER/model.safetensors)")
    described = read_training(folder)
    if described is None or described.labels is None:
        raise SourceError(f"{TRAINING} does not name the labels", folder, "train the exits again")
    labels = described.labels
    task = (SINGLE_LABEL, labels) if labels else (REGRESSION, ("score",))
    rows = folder / TRAINED_ROWS
    return TrainedExits(heads, description, task, (rows,) if rows.is_file() else ())


@dataclass(frozen=True)
class Origin:
    """Source of a module's weights, and of the files that come with them."""

    fetch: Callable[[str], Tensor]
    chunks: Chunks
    source: m.Source
    write_files: Callable[[StoreWriter], Sequence[m.File]] = lambda writer: ()
    """Writes the companions: config, tokenizer."""
    exits: TrainedExits | None = None
    """Exits that come with the weights."""
    texts: Texts | None = None
    """Set where the module classifies texts."""


def divide_module(
    module: nn.Module, example_inputs: Any, store: Path, config: DivisionConfig, origin: Origin | None = None
) -> Path:
    """Divide a module by a run of it.

    Args:
        module: in evaluation mode; its weights may be on the meta device if `origin` has them.
        example_inputs: a tensor, a tuple of positional arguments, or a dictionary of named ones.
        origin: weights and files of a checkpoint; None for a module that holds its weights.

    Raises StageError where the module cannot be divided or its answers from the store differ, UsageError.
    """
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"a {type(module).__name__} is no torch.nn.Module", None, "give the module that it was made of"
        )
    require_divisible(module)
    if module.training:
        raise UsageError("the module is in training mode", None, "call eval() on it")
    weights, buffers_sha256 = placeholders.weights_of(module), placeholders.unsaved_buffers(module)
    example, made_up = Arguments(example_inputs), origin is not None
    origin = origin or in_memory(module, weights)
    if config.exits is not None:
        origin = replace(origin, exits=own_exits(Path(config.exits), origin.source.fingerprint))
    original = Original(module, weights, LastUsed(origin.fetch, KEPT_BYTES), config.say)
    if made_up:
        run, outputs = original.trace(example, made_up=True)
    else:
        run, outputs = _own_run(original, origin, example)
    sizes = placeholders.sizes_of(weights)
    plan = plan_stages(run, sizes, config.stage_bytes, points=() if origin.exits is None else origin.exits.calls)
    config.say(
        f"{len(plan.stages)} stages of at most {format_size(max(sizes.of(stage.uses) for stage in plan.stages))}"
    )
    original = original.with_examples(example, [Arguments(inputs) for inputs in config.more_inputs], outputs)
    with config.writer(store, f"{origin.source.fingerprint} {placeholders.fingerprint(weights)}") as writer:
        writer.require_space(sum(weight.num_bytes for weight in weights.values()))
        manifest, proof = _proven(original, plan, origin, writer)
        manifest = replace(manifest, proof=replace(proof, unsaved_buffers_sha256=buffers_sha256))
        if origin.exits is not None:
            manifest = _as_graphs(original, manifest, plan.exits, writer, config.dtype)
            return writer.finish(origin.exits.added_to(manifest, writer))
        needs_graphs = config.method == "export" or config.dtype != m.FP32
        if needs_graphs or (config.method == "auto" and manifest.program.problem is not None):
            try:
                manifest = _as_graphs(original, manifest, plan.exits, writer, config.dtype)
            except StageError as error:
                if needs_graphs:
                    raise
                config.say(f"no graphs of stages, the store runs by offramp.stream only: {error}")
        return writer.finish(manifest)


def _own_run(original: Original, origin: Origin, example: Arguments) -> tuple[Trace, list[Tensor]]:
    """Return the operations and the answer of a module that holds its weights.

    Raises StageError where it writes to a weight, or answers otherwise with its own weights in their places.
    """
    own = {name: weight.tensor for name, weight in original.weights.items()}
    copies = LastUsed(origin.fetch, KEPT_BYTES, own)
    run, outputs = replace(original, fetch=copies).trace(example, made_up=False)
    copies.clear()
    original.require_plain(example, outputs)
    return run, outputs


def _as_graphs(
    original: Original, manifest: m.Manifest, exits: Sequence[int], writer: StoreWriter, dtype: str
) -> m.Manifest:
    """Write graphs of the parts, and integers for floats where they are asked for."""
    if dtype == m.FP32:
        return with_graphs(original, manifest, exits, writer)[0]
    try:
        manifest, run = with_graphs(original, manifest, exits, writer)
    except StageError as error:  # whose remedy is another method, which has no integers
        what = f"integer weights need graphs: {error.what}"
        raise StageError(what, error.where, "divide it with --dtype fp32 --method eager") from None
    from offramp.division.narrowing import with_integers

    return with_integers(run, manifest, writer)


def _proven(original: Original, plan: StagePlan, origin: Origin, writer: StoreWriter) -> tuple[m.Manifest, m.Proof]:
    """Write the shards and return the manifest and its proof.

    This is repeated until all weights that are used outside their stages stay in memory, and all that are planned to be
    read by rows can be.
    """
    say, files = original.say, (*origin.write_files(writer), *_layout_files(original.weights, writer))
    problem, labels = _task(original) if origin.exits is None else origin.exits.task
    output = None if problem is None else Output("", problem, len(labels))
    listed = writer.add_labels(labels)
    described = [
        {name: value_of(tensor) for name, tensor in each.inputs.tensors().items()} for each in original.examples
    ]
    inputs, example = captured_inputs(described, origin.texts is not None)
    kept: set[str] = set()
    while True:
        sliced = _sliced_weights(original.weights, plan)
        shelves = _layout(original.weights, plan, sliced, kept)
        program = Program(
            inputs=inputs,
            output=output,
            texts=origin.texts,
            module=_module(original, plan, sliced, shelves),
            activation_bytes=plan.activation_bytes,
            example=example,
        )
        shards = {name: shelf.write(name, original.weights, writer, origin.chunks) for name, shelf in shelves.items()}
        manifest = m.Manifest(origin.source, program, shards, {}, files, labels=listed)
        write_atomic(writer.partial / m.FILE_NAME, [m.dumps(manifest)])
        proven, escaped = prove_all(original, writer.partial)
        whole: set[str] = set()
        if escaped <= kept:
            whole = prove_slices(original, writer.partial)
            if not whole:
                break
            say(f"{len(whole)} weights cannot be read some rows at a time")
        else:
            say(f"{len(escaped)} weights stay in memory: the code uses them outside their stages")
        kept |= escaped
        plan = replace(plan, sliced=tuple(name for name in plan.sliced if name not in kept | whole))
    proof = verdict(proven, original, writer.partial)
    if proof.is_paged:
        say("some weights are read outside their stages: the store is marked as paged, and strict refuses it")
    return manifest, proof


def _task(original: Original) -> tuple[str | None, tuple[str, ...]]:
    """Return problem and labels of a classifier; (None, ()) where its first output is not a number for each label."""
    problem, labels = task_of(original.module)
    if problem is None:
        return None, labels
    example = original.examples[0]
    rows = next((tensor.shape[:1] for tensor in example.inputs.tensors().values()), ())
    shape = example.outputs[0].shape
    if rows and shape == (*rows, len(labels)):
        return problem, labels
    what = f"the first output has shape {[*shape]}, expected logits {[*rows, len(labels)]} of {len(labels)} labels"
    original.say(f"no classifier, the store runs by offramp.stream only: {what}")
    return None, ()


def in_memory(module: nn.Module, weights: Weights) -> Origin:
    """Return the origin of a module that holds its weights. Raises StageError for weights without data."""
    for name, weight in weights.items():
        if weight.tensor.is_meta or isinstance(weight.tensor, placeholders.Placeholder):
            is_offloaded = any(hasattr(part, "_hf_hook") for part in module.modules())
            keeper, remedy = ("", "give a module with its weights")
            if is_offloaded:
                keeper, remedy = (
                    ": accelerate has offloaded it",
                    "load the model without device_map, or divide its folder",
                )
            raise StageError(f"weight {name} has no data{keeper}", type(module).__name__, remedy)
    config: Any = getattr(module, "config", None)
    kind = str(getattr(config, "model_type", None) or "module")

    def write_files(writer: StoreWriter) -> list[m.File]:
        """Write the config, with which the module can be built again by its class, and what a class must make equal."""
        text = config.to_json_string(use_diff=True) if hasattr(config, "to_json_string") else ""
        files = [writer.add_file("config.json", text.encode())] if text else []
        if not hasattr(module, "from_pretrained"):  # else its class makes it of the config
            files.append(writer.add_file(attributes.FILE_NAME, attributes.dumps(module)))
        return files

    return Origin(
        lambda name: layouts.copied(weights[name].tensor),
        lambda name: placeholders.pieces(weights[name].tensor, CHUNK_BYTES),
        m.Source(placeholders.content_sha256(weights), type(module).__name__, kind, "eager"),
        write_files,
    )


def _layout_files(weights: Weights, writer: StoreWriter) -> list[m.File]:
    """Write the layouts of the weights that do not lie row by row, if there are some."""
    found = {name: layouts.layout_of(weight.tensor) for name, weight in weights.items()}
    described = {name: layout for name, layout in found.items() if layout is not None}
    return [writer.add_file(layouts.FILE_NAME, layouts.dumps(described))] if described else []


@dataclass(frozen=True)
class Shelf:
    """Weights that lie in one shard, and the indices of the stages that need it."""

    names: Sequence[str]
    stages: Sequence[int] = ()
    gathered: bool = False
    """Rows of the weight are read singly."""

    def write(self, shard: str, weights: Weights, writer: StoreWriter, chunks: Chunks) -> Shard:
        """Write the shard."""
        # In order of use, but those that leave the next one aligned come first.
        aligned = sorted(self.names, key=lambda name: weights[name].num_bytes % ALIGNMENT_BYTES != 0)
        tensors = [(name, weights[name].tensor) for name in aligned]
        entries = [(name, "rows" if self.gathered else name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors]
        return writer.add_shard(shard, entries, chunks, gathered=self.gathered)


def _layout(weights: Weights, plan: StagePlan, sliced: Sequence[str], kept: Set[str]) -> dict[str, Shelf]:
    """Return shard -> its weights.

    One shard holds the weights that the same stages need. Each table and each weight that is read some rows at a time
    has a shard of its own; so have the weights that are kept, the buffers, and the weights that no stage needs.
    """
    by_rows = {name for stage in plan.stages for name in stage.tables}.union(sliced)
    homes: dict[str, list[int]] = {}
    for index, stage in enumerate(plan.stages):
        for name in (*stage.uses, *stage.tables):
            homes.setdefault(name, []).append(index)
    groups: dict[tuple, list[str]] = {}
    for name, indices in homes.items():
        if name not in kept:
            groups.setdefault((tuple(indices), name if name in by_rows else ""), []).append(name)
    found = {
        f"weights-{number:03d}": Shelf(names, stages, gathered=bool(table))
        for number, ((stages, table), names) in enumerate(groups.items())
    }
    found[KEPT] = Shelf([name for name in weights if name in kept], (0,))
    found["buffers"] = Shelf([name for name, weight in weights.items() if weight.is_buffer])
    found["unused"] = Shelf([name for name in plan.unused if name not in kept])
    return {shard: shelf for shard, shelf in found.items() if shelf.names}


def _sliced_weights(weights: Weights, plan: StagePlan) -> tuple[str, ...]:
    """Return the weights that are larger than a stage should be, and that can be read some rows at a time."""
    tables = {name for stage in plan.stages for name in stage.tables}
    large = [name for name in plan.sliced if name not in tables and weights[name].num_bytes > plan.stage_bytes]
    shapes = {name: weights[name].tensor.shape for name in large}
    return tuple(name for name in large if len(shapes[name]) == 2 and shapes[name][0] >= MIN_SLICED_ROWS)


def _module(original: Original, plan: StagePlan, sliced: tuple[str, ...], shelves: Mapping[str, Shelf]) -> Module:
    cls, weights = type(original.module), original.weights
    versions = {"torch": torch.__version__.partition("+")[0]}
    package = cls.__module__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    if version and package != "torch":
        versions[package] = str(version)
    parts = []
    for index, stage in enumerate(plan.stages):
        needed = tuple(shard for shard, shelf in shelves.items() if index in shelf.stages)
        parts.append(replace(stage.part, shards=needed))
    return Module(
        name=f"{cls.__module__}.{cls.__qualname__}",
        weights_sha256=placeholders.fingerprint(weights),
        versions=versions,
        parts=tuple(parts),
        aliases={name: weight.aliases for name, weight in weights.items() if weight.aliases},
        buffers=tuple(name for name, weight in weights.items() if weight.is_buffer),
        pinned=(KEPT,) if KEPT in shelves else (),
        sliced=sliced,
        unused=plan.unused,
    )
