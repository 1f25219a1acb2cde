"""The verb divide for any module: one run tells its stages, its weights become a store, and runs from that store prove
that the answers are the same.

At most a part of the weights is in memory at a time where they come from a checkpoint; a module that is in memory as a
whole stays as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp import __version__
from offramp.checkpoints.inputs import task_of
from offramp.division.exits import TrainedExits, own_exits
from offramp.division.layout import KEPT, Layout, sliced_weights
from offramp.division.proof import Examples, judged, prove_all, touched_whole, undisturbed
from offramp.division.segments import with_segments
from offramp.errors import OfframpError, StageError, UsageError
from offramp.program.program import Program, Texts
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.store.files import write_atomic
from offramp.streaming.capture import Arguments, LastUsed, tensors_of, trace_run, value_of
from offramp.streaming.graph import Trace
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
from offramp.streaming.placement import ALIGNMENT_BYTES, NAMES
from offramp.streaming.stages import StagePlan, plan_stages

CHUNK_BYTES = 2 << 20
KEPT_BYTES = 64 << 20
"""Weights that are kept while a run is traced, beside the one in use."""
PLAIN = (Tensor, nn.Parameter, Placeholder)
"""Kinds of weights whose data are all that they are."""
Say = Callable[[str], None]
Fetch = Callable[[str], Tensor]


@dataclass(frozen=True)
class Origin:
    """Where the weights of a module come from."""

    fetch: Fetch
    chunks: Callable[[str], Iterator[bytes | memoryview]]
    source: m.Source
    write_files: Callable[[StoreWriter], Sequence[m.File]] = lambda writer: ()
    """Companions: config, tokenizer."""
    exits: TrainedExits | None = None
    """Those that come with the weights."""
    texts: Texts | None = None
    """What is asked of texts, where the module classifies them."""


def divide_module(
    module: nn.Module,
    example_inputs: Any,
    store: Path,
    *,
    more_inputs: Sequence[Any] = (),
    stage_bytes: int | None = None,
    method: str = "eager",
    force: bool = False,
    origin: Origin | None = None,
    exits: Path | None = None,
    say: Say = lambda message: None,
) -> Path:
    """Divide a module by a run of it.

    Args:
        module: in evaluation mode; its weights may be on the meta device if `origin` has them.
        example_inputs: a tensor, a tuple of positional arguments, or a dictionary of named ones.
        more_inputs: further examples that the division is proven with; None given: another batch size and length of the
            first, where the module takes them.
        stage_bytes: the most that a stage should need.
        method: `eager`: it runs in PyTorch by its own code; `export`: its stages become graphs as well; `auto`: those
            of a classifier do, if they can.
        exits: the run folder that `training.train_exits` left for this module; its stages become graphs then.

    Raises StageError where the module cannot be divided or its answers from the store differ, UsageError.
    """
    if module.training:
        raise UsageError("the module is in training mode", None, "call eval() on it")
    _require_divisible(module)
    weights, buffers_sha256 = weights_of(module), unsaved_buffers(module)
    example = Arguments(example_inputs)
    is_made_up = origin is not None
    origin = origin or in_memory(module, weights)
    if exits is not None:
        origin = replace(origin, exits=own_exits(exits, origin.source.fingerprint))
    fetch = LastUsed(origin.fetch, KEPT_BYTES)
    trace = _traced(module, weights, example, fetch, is_made_up)
    sizes = sizes_of(weights)
    plan = plan_stages(trace, sizes, stage_bytes, points=() if origin.exits is None else origin.exits.calls)
    say(f"{len(plan.stages)} stages of at most {max(sizes.of(stage.uses) for stage in plan.stages)} bytes")
    examples = [(example, _plain(module, weights, example, fetch))]
    if not examples[0][1]:
        raise StageError("the module gives no tensor, so nothing can be compared", type(module).__name__)
    examples += _further(module, weights, example, [Arguments(inputs) for inputs in more_inputs], fetch, say)
    identity = f"{origin.source.fingerprint} {fingerprint(weights)} offramp {__version__} format {m.MODULE_FORMAT}"
    with StoreWriter(store, identity, force=force) as writer:
        writer.require_space(sum(weight.num_bytes for weight in weights.values()))
        manifest = _proven(module, weights, plan, origin, examples, writer, say)
        proof = {**(manifest.proof or {}), "unsaved_buffers_sha256": buffers_sha256}
        manifest = replace(manifest, proof=proof)
        method = "export" if origin.exits else method
        if method == "export" or (method == "auto" and manifest.program.problem is not None):
            manifest = _with_segments(module, weights, manifest, plan.exits, examples, fetch, writer, method, say)
        return writer.finish(manifest if origin.exits is None else origin.exits.added_to(manifest, writer))


def _traced(
    module: nn.Module, weights: Mapping[str, Weight], example: Arguments, fetch: Fetch, is_made_up: bool
) -> Trace:
    """What a run of the module does. Raises UsageError for an example `is_made_up` that the module does not take; of
    another one, what the module raises.
    """
    try:
        with undisturbed(module):
            return trace_run(module, weights, example.copy(), fetch)[0]
    except OfframpError:
        raise
    except Exception as error:
        if not is_made_up:
            raise  # as it would come out of the module itself
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        what = f"the example inputs do not suit a {type(module).__name__} ({type(error).__name__}: {said})"
        raise UsageError(what, None, "give --inputs FILE.safetensors with what it takes, by name") from None


def _proven(
    module: nn.Module,
    weights: Mapping[str, Weight],
    plan: StagePlan,
    origin: Origin,
    examples: Examples,
    writer: StoreWriter,
    say: Say,
) -> m.ModuleManifest:
    """Write the shards and prove them, until all weights that stray are kept, and all that are to be read by rows can
    be. Returns the manifest with its proof.
    """
    files = tuple(origin.write_files(writer))
    kept: set[str] = set()
    while True:
        layout = Layout(weights, plan, kept)
        program = _program(module, weights, plan, origin, examples[0][0], (KEPT,) if kept else ())
        shards = layout.write(writer, origin.chunks)
        manifest = m.ModuleManifest(origin.source, program, layout.stages(), shards, {}, files)
        write_atomic(writer.partial / m.FILE_NAME, [m.dumps(manifest)])
        proofs, wayward = prove_all(module, weights, examples, writer.partial)
        whole: set[str] = set()
        if wayward <= kept:
            whole = touched_whole(module, weights, examples, writer.partial)
            if not whole:
                break
            say(f"{len(whole)} weights cannot be read some rows at a time")
        else:
            say(f"{len(wayward)} weights stay in memory: the code refers to them from other stages than theirs")
        kept |= wayward
        plan = replace(plan, sliced=tuple(name for name in plan.sliced if name not in kept | whole))
    proof = judged(proofs, module)
    if proof["is_paged"]:
        say("some weights are read outside their stages: the store is marked as paged, and strict refuses it")
    return replace(manifest, proof=proof)


def _with_segments(
    module: nn.Module,
    weights: Mapping[str, Weight],
    manifest: m.ModuleManifest,
    exits: Sequence[int],
    examples: Examples,
    fetch: Fetch,
    writer: StoreWriter,
    method: str,
    say: Say,
) -> m.ModuleManifest:
    try:
        return with_segments(module, weights, manifest, exits, examples, fetch, writer, say)
    except StageError as error:
        if method == "export":
            raise
        say(f"no graphs of stages, the store runs by offramp.stream only: {error}")
        return manifest


def _require_divisible(module: nn.Module) -> None:
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            what = f"{path or 'the module'} is compiled by torch.jit, so its weights cannot be taken out"
            raise StageError(what, type(module).__name__, "divide the module that it was compiled from")
    weights = weights_of(module)
    if all(weight.is_buffer for weight in weights.values()):
        raise StageError("the module has no weights, so there is nothing to divide", type(module).__name__)
    for name, buffer in module.named_buffers():
        if buffer.is_meta:
            raise StageError(f"buffer {name} has no data", type(module).__name__, "build the module with its buffers")
    for name, weight in weights.items():
        kind = type(weight.tensor)
        if kind not in PLAIN:
            remedy = "divide the module before it is quantised, and after it has run once"
            raise StageError(f"weight {name} is a {kind.__name__}", type(module).__name__, remedy)
        if weight.tensor.device.type not in ("cpu", "meta"):
            what = f"weight {name} is on {weight.tensor.device}, and a stream computes on the CPU"
            raise StageError(what, type(module).__name__, "divide module.cpu()")
        if weight.tensor.dtype not in NAMES or weight.tensor.layout != torch.strided:
            what = f"weight {name} is {weight.tensor.dtype}, {weight.tensor.layout}"
            raise StageError(what, type(module).__name__, "divide the module before it is quantised")


def in_memory(module: nn.Module, weights: Mapping[str, Weight]) -> Origin:
    """A module that holds its weights."""

    for name, weight in weights.items():
        if weight.tensor.is_meta or isinstance(weight.tensor, Placeholder):
            raise StageError(f"weight {name} has no data", type(module).__name__, "give a module with its weights")
    config = getattr(module, "config", None)
    kind = str(getattr(config, "model_type", None) or "module")
    source = m.Source(content_sha256(weights), type(module).__name__, kind, "eager")

    def write_files(writer: StoreWriter) -> list[m.File]:
        """So that the module can be built again by its class alone."""
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


def _further(
    module: nn.Module,
    weights: Mapping[str, Weight],
    example: Arguments,
    more: Sequence[Arguments],
    fetch: Fetch,
    say: Say,
) -> list[tuple[Arguments, list[Tensor]]]:
    """More examples with the answers of the module itself."""
    if more:
        return [(inputs, _plain(module, weights, inputs, fetch)) for inputs in more]
    for name, inputs in variations(example):
        try:
            expected = _plain(module, weights, inputs, fetch)
        except StageError:
            raise
        except Exception as error:  # whatever the module says of an input that is none of its kind
            say(f"no proof with another {name}: {type(error).__name__}")
            continue
        return [(inputs, expected)]
    return []


def variations(example: Arguments) -> Iterator[tuple[str, Arguments]]:
    """The example with another batch size and length, from more to less of a change."""
    tensors = example.tensors()
    batched = {tensor.shape[0] for tensor in tensors.values() if tensor.dim()}
    lengths = {tensor.shape[1] for tensor in tensors.values() if tensor.dim() == 2 and not tensor.is_floating_point()}
    for longer, name in ((True, "batch size and length"), (False, "batch size")):
        if len(batched) == 1 and (not longer or (len(lengths) == 1 and max(lengths) > 2)):
            yield name, _varied(example, max(lengths, default=0) if longer else 0)


def _varied(example: Arguments, length: int) -> Arguments:
    """One row less, of a single one two, and of tensors whose second extent is `length` about half of it."""

    def vary(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        leaf = leaf[:-1].contiguous() if len(leaf) > 1 else torch.cat([leaf, leaf])
        shorter = length and leaf.dim() > 1 and leaf.shape[1] == length
        return leaf[:, : length // 2 + 1].contiguous() if shorter else leaf

    made = Arguments(())
    made.args, made.kwargs = pytree.tree_map(vary, (example.args, example.kwargs))
    return made


def _plain(module: nn.Module, weights: Mapping[str, Weight], inputs: Arguments, fetch: Fetch) -> list[Tensor]:
    """What the module says by itself; weights that it does not hold are fetched as they are touched. So are those that
    do not begin where a stream puts them, as of a mapped checkpoint: with one row that changes the last bits.
    """
    absent = [weight for weight in weights.values() if weight.tensor.is_meta or not _is_aligned(weight)]
    try:
        for weight in absent:
            weight.put(Placeholder(weight.name, weight.tensor, lambda name, operation: fetch(name)))
        with undisturbed(module):
            return [tensor.detach().clone() for tensor in tensors_of(inputs.copy().call(module))]
    finally:
        for weight in absent:
            weight.put(weight.tensor)


def _is_aligned(weight: Weight) -> bool:
    return weight.is_buffer or weight.tensor.data_ptr() % ALIGNMENT_BYTES == 0


def _program(
    module: nn.Module,
    weights: Mapping[str, Weight],
    plan: StagePlan,
    origin: Origin,
    example: Arguments,
    pinned: tuple[str, ...],
) -> Program:
    problem, labels = task_of(module) if origin.exits is None else origin.exits.task
    described = {name: value_of(tensor) for name, tensor in example.tensors().items()}
    return Program(
        f"{type(module).__module__}.{type(module).__qualname__}",
        fingerprint(weights),
        versions(module),
        described,
        tuple(stage.flow for stage in plan.stages),
        {name: weight.aliases for name, weight in weights.items() if weight.aliases},
        tuple(name for name, weight in weights.items() if weight.is_buffer),
        pinned,
        sliced_weights(weights, plan),
        plan.unused,
        plan.activation_bytes,
        problem,
        labels,
        texts=origin.texts,
    )


def versions(module: nn.Module) -> dict[str, str]:
    """Of torch, and of the package that the module comes from."""
    found = {"torch": torch.__version__.partition("+")[0]}
    package = type(module).__module__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    return {**found, package: str(version)} if version and package != "torch" else found
