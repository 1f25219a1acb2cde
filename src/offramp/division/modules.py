"""Division of any module by a run of it: the run decides the stages, the weights become a store, and runs from that
store prove that the answers are equal bit for bit.

Weights of a checkpoint are read in parts; a module that is in memory is not changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offramp.checkpoints.inputs import task_of
from offramp.division.config import DivisionConfig, identity
from offramp.division.exits import TrainedExits, own_exits
from offramp.division.export import with_graphs
from offramp.division.layout import KEPT, Layout, sliced_weights
from offramp.division.original import Fetch, Original, require_divisible, run_examples, trace
from offramp.division.proof import prove_all, prove_slices, verdict
from offramp.errors import StageError, UsageError
from offramp.program.captured import captured_inputs
from offramp.program.program import Module, Output, Part, Program, Texts
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.store.files import write_atomic
from offramp.streaming.capture import Arguments, LastUsed
from offramp.streaming.placeholders import (
    Placeholder,
    Weight,
    content_sha256,
    fingerprint,
    pieces,
    sizes_of,
    unsaved_buffers,
    weights_of,
)
from offramp.streaming.stages import StagePlan, plan_stages

CHUNK_BYTES = 2 << 20
KEPT_BYTES = 64 << 20
"""Bytes of weights that are kept while a run is traced, in addition to the one in use."""


@dataclass(frozen=True)
class Origin:
    """Where the weights of a module come from, and the files that come with them."""

    fetch: Fetch
    chunks: Callable[[str], Iterator[bytes | memoryview]]
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
    if module.training:
        raise UsageError("the module is in training mode", None, "call eval() on it")
    require_divisible(module)
    weights, buffers_sha256, say = weights_of(module), unsaved_buffers(module), config.say
    example = Arguments(example_inputs)
    made_up = origin is not None
    origin = origin or in_memory(module, weights)
    if config.exits is not None:
        origin = replace(origin, exits=own_exits(Path(config.exits), origin.source.fingerprint))
    fetch = LastUsed(origin.fetch, KEPT_BYTES)
    run = trace(module, weights, example, fetch, made_up)
    sizes = sizes_of(weights)
    plan = plan_stages(run, sizes, config.stage_bytes, points=() if origin.exits is None else origin.exits.calls)
    say(f"{len(plan.stages)} stages of at most {max(sizes.of(stage.uses) for stage in plan.stages)} bytes")
    more = [Arguments(inputs) for inputs in config.more_inputs]
    original = Original(module, weights, fetch, run_examples(module, weights, example, more, fetch, say), say)
    made_from = f"{origin.source.fingerprint} {fingerprint(weights)}"
    with StoreWriter(store, identity(made_from), force=config.force) as writer:
        writer.require_space(sum(weight.num_bytes for weight in weights.values()))
        manifest = _proven(original, plan, origin, writer)
        assert manifest.proof is not None
        manifest = replace(manifest, proof=replace(manifest.proof, unsaved_buffers_sha256=buffers_sha256))
        if origin.exits is not None:
            manifest = with_graphs(original, manifest, plan.exits, writer)
            return writer.finish(origin.exits.added_to(manifest, writer))
        if config.method == "export" or (config.method == "auto" and manifest.program.problem is not None):
            manifest = _try_graphs(original, manifest, plan.exits, writer, required=config.method == "export")
        return writer.finish(manifest)


def _proven(original: Original, plan: StagePlan, origin: Origin, writer: StoreWriter) -> m.Manifest:
    """Write the shards and return the manifest with its proof.

    This is repeated until all weights that are used outside their stages stay in memory, and all that are planned to be
    read by rows can be.
    """
    files = tuple(origin.write_files(writer))
    problem, labels = task_of(original.module) if origin.exits is None else origin.exits.task
    output = None if problem is None else Output("", problem, len(labels))
    listed = writer.add_labels(labels)
    kept: set[str] = set()
    while True:
        layout = Layout(original.weights, plan, kept)
        inputs, example = captured_inputs([e.described() for e in original.examples], origin.texts is not None)
        program = Program(
            inputs=inputs,
            output=output,
            texts=origin.texts,
            module=_module(original, plan, layout.parts(), (KEPT,) if kept else ()),
            activation_bytes=plan.activation_bytes,
            example=example,
        )
        shards = layout.write(writer, origin.chunks)
        manifest = m.Manifest(origin.source, program, shards, {}, files, labels=listed)
        write_atomic(writer.partial / m.FILE_NAME, [m.dumps(manifest)])
        proven, escaped = prove_all(original, writer.partial)
        whole: set[str] = set()
        if escaped <= kept:
            whole = prove_slices(original, writer.partial)
            if not whole:
                break
            original.say(f"{len(whole)} weights cannot be read some rows at a time")
        else:
            original.say(f"{len(escaped)} weights stay in memory: the code uses them outside their stages")
        kept |= escaped
        plan = replace(plan, sliced=tuple(name for name in plan.sliced if name not in kept | whole))
    proof = verdict(proven, original)
    if proof.is_paged:
        original.say("some weights are read outside their stages: the store is marked as paged, and strict refuses it")
    return replace(manifest, proof=proof)


def _try_graphs(
    original: Original, manifest: m.Manifest, exits: Sequence[int], writer: StoreWriter, *, required: bool
) -> m.Manifest:
    try:
        return with_graphs(original, manifest, exits, writer)
    except StageError as error:
        if required:
            raise
        original.say(f"no graphs of stages, the store runs by offramp.stream only: {error}")
        return manifest


def in_memory(module: nn.Module, weights: Mapping[str, Weight]) -> Origin:
    """Return the origin of a module that holds its weights. Raises StageError for weights without data."""

    for name, weight in weights.items():
        if weight.tensor.is_meta or isinstance(weight.tensor, Placeholder):
            raise StageError(f"weight {name} has no data", type(module).__name__, "give a module with its weights")
    config = getattr(module, "config", None)
    kind = str(getattr(config, "model_type", None) or "module")
    source = m.Source(content_sha256(weights), type(module).__name__, kind, "eager")

    def write_files(writer: StoreWriter) -> list[m.File]:
        """Write the config, with which the module can be built again by its class."""
        data = (
            config.to_json_string(use_diff=True).encode()
            if config is not None and hasattr(config, "to_json_string")
            else b""
        )
        return [writer.add_file("config.json", data)] if data else []

    return Origin(
        lambda name: weights[name].tensor.detach().clone(),
        lambda name: pieces(weights[name].tensor, CHUNK_BYTES),
        source,
        write_files,
    )


def _module(original: Original, plan: StagePlan, parts: tuple[Part, ...], pinned: tuple[str, ...]) -> Module:
    cls, weights = type(original.module), original.weights
    return Module(
        name=f"{cls.__module__}.{cls.__qualname__}",
        weights_sha256=fingerprint(weights),
        versions=versions(original.module),
        parts=parts,
        aliases={name: weight.aliases for name, weight in weights.items() if weight.aliases},
        buffers=tuple(name for name, weight in weights.items() if weight.is_buffer),
        pinned=pinned,
        sliced=sliced_weights(weights, plan),
        unused=plan.unused,
    )


def versions(module: nn.Module) -> dict[str, str]:
    """Return the versions of torch and of the package that the module comes from."""
    found = {"torch": torch.__version__.partition("+")[0]}
    package = type(module).__module__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    return {**found, package: str(version)} if version and package != "torch" else found
