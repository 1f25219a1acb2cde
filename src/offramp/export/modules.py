"""The verb divide for any module: one run tells its stages, its weights become a store, and runs from that store prove
that the answers are the same.

At most a part of the weights is in memory at a time where they come from a checkpoint; a module that is in memory as a
whole stays as it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp import __version__
from offramp.division.capture import Arguments, LastUsed, Touches, are_equal, bits, tensors_of, trace_run
from offramp.division.placeholders import Placeholder, Weight, fingerprint, unsaved_buffers, weights_of
from offramp.division.stages import Sizes, StagePlan, plan_stages
from offramp.errors import OfframpError, StageError, UsageError
from offramp.export.segments import with_segments
from offramp.models.placement import NAMES
from offramp.models.streamed import Stream, streamed_shards
from offramp.models.streaming import data_bytes, sliceable_shards
from offramp.policies.evidence import REGRESSION, SINGLE_LABEL
from offramp.runtime.weight_plan import plan_weights, smallest_bytes
from offramp.store import Shard, Stage, Step, Store, StoreWriter
from offramp.store import manifest as m
from offramp.store.files import write_atomic
from offramp.store.program import Program, Value

CHUNK_BYTES = 2 << 20
CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification")
"""How classes of transformers end whose first output are logits of a batch."""
KEPT_BYTES = 64 << 20
"""Weights that are kept while a run is traced, beside the one in use."""
PLAIN = (Tensor, nn.Parameter, Placeholder)
"""Kinds of weights whose data are all that they are."""
SLICES = 4
"""Rows that a weight must have to be read some at a time."""
KEPT = "kept"
"""The shard of weights that stay in memory."""
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
    with_exits: Callable[[m.ModuleManifest, StoreWriter], m.ModuleManifest] = lambda manifest, writer: manifest
    """Write the exits that come with the weights, if there are any."""


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

    Raises StageError where the module cannot be divided or its answers from the store differ, UsageError.
    """
    if module.training:
        raise UsageError("the module is in training mode", None, "call eval() on it")
    _require_divisible(module)
    weights, buffers_sha256 = weights_of(module), unsaved_buffers(module)
    is_ours, origin = origin is not None, origin or in_memory(module, weights)
    example = Arguments(example_inputs)
    fetch = LastUsed(origin.fetch, KEPT_BYTES)
    try:
        with _undisturbed(module):
            trace, _ = trace_run(module, weights, example.copy(), fetch)
    except OfframpError:
        raise
    except Exception as error:
        if not is_ours:
            raise  # as it would come out of the module itself
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        what = f"the example inputs do not suit a {type(module).__name__} ({type(error).__name__}: {said})"
        raise UsageError(what, None, "give --inputs FILE.safetensors with what it takes, by name") from None
    parameters = {name: weight for name, weight in weights.items() if not weight.is_buffer}
    sizes = Sizes(
        {name: weight.num_bytes for name, weight in parameters.items()},
        {name: weight.owners for name, weight in parameters.items()},
    )
    plan = plan_stages(trace, sizes, stage_bytes)
    say(f"{len(plan.stages)} stages of at most {max(sizes.of(stage.uses) for stage in plan.stages)} bytes")
    examples = [(example, _plain(module, weights, example, fetch))]
    if not examples[0][1]:
        raise StageError("the module gives no tensor, so nothing can be compared", type(module).__name__)
    examples += _further(module, weights, example, [Arguments(inputs) for inputs in more_inputs], fetch, say)
    identity = f"{origin.source.fingerprint} {fingerprint(weights)} offramp {__version__} format {m.MODULE_FORMAT}"
    with StoreWriter(store, identity, force=force) as writer:
        writer.require_space(sum(weight.num_bytes for weight in weights.values()))
        files = tuple(origin.write_files(writer))
        kept: set[str] = set()
        while True:
            layout = _Layout(weights, plan, kept)
            program = _program(module, weights, plan, example, (KEPT,) if kept else ())
            shards = layout.write(writer, origin)
            manifest = m.ModuleManifest(origin.source, program, layout.stages(), shards, {}, files)
            write_atomic(writer.partial / m.FILE_NAME, [m.dumps(manifest)])
            proofs, wayward = _prove_all(module, weights, examples, writer.partial)
            if wayward <= kept:
                whole = _touched_whole(module, weights, examples, writer.partial)
                if not whole:
                    break
                say(f"{len(whole)} weights cannot be read some rows at a time")
            else:
                whole = set()
                say(f"{len(wayward)} weights stay in memory: the code refers to them from other stages than theirs")
            kept |= wayward
            plan = replace(plan, sliced=tuple(name for name in plan.sliced if name not in kept | whole))
        proof = {**_judged(proofs, module, say), "unsaved_buffers_sha256": buffers_sha256}
        manifest = replace(manifest, proof=proof)
        if method == "export" or (method == "auto" and program.problem is not None):
            manifest = _with_segments(module, weights, manifest, plan.blocks, examples, fetch, writer, method, say)
        return writer.finish(origin.with_exits(manifest, writer))


def _with_segments(
    module: nn.Module,
    weights: Mapping[str, Weight],
    manifest: m.ModuleManifest,
    blocks: Sequence[int],
    examples: Sequence[tuple[Arguments, list[Tensor]]],
    fetch: Fetch,
    writer: StoreWriter,
    method: str,
    say: Say,
) -> m.ModuleManifest:
    try:
        return with_segments(module, weights, manifest, blocks, examples, fetch, writer, say)
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
        if weight.tensor.dtype not in NAMES or weight.tensor.layout != torch.strided:
            what = f"weight {name} is {weight.tensor.dtype}, {weight.tensor.layout}"
            raise StageError(what, type(module).__name__, "divide the module before it is quantised")


def in_memory(module: nn.Module, weights: Mapping[str, Weight]) -> Origin:
    """A module that holds its weights."""

    def chunks(name: str) -> Iterator[memoryview]:
        data = weights[name].tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    digest = hashlib.sha256(fingerprint(weights).encode())
    for name, weight in weights.items():
        if weight.tensor.is_meta or isinstance(weight.tensor, Placeholder):
            raise StageError(f"weight {name} has no data", type(module).__name__, "give a module with its weights")
        for chunk in chunks(name):
            digest.update(chunk)
    config = getattr(module, "config", None)
    kind = str(getattr(config, "model_type", None) or "module")
    source = m.Source(digest.hexdigest(), type(module).__name__, kind, "eager")

    def write_files(writer: StoreWriter) -> list[m.File]:
        """So that the module can be built again by its class alone."""
        data = (
            config.to_json_string(use_diff=True).encode()
            if config is not None and hasattr(config, "to_json_string")
            else b""
        )
        return [writer.add_file("config.json", data)] if data else []

    return Origin(lambda name: weights[name].tensor.detach().clone(), chunks, source, write_files)


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
    """One row more, and of tensors whose second extent is `length` about half of it."""

    def vary(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        leaf = torch.cat([leaf, leaf[:1]])
        shorter = length and leaf.dim() > 1 and leaf.shape[1] == length
        return leaf[:, : length // 2 + 1].contiguous() if shorter else leaf

    made = Arguments(())
    made.args, made.kwargs = pytree.tree_map(vary, (example.args, example.kwargs))
    return made


def _plain(module: nn.Module, weights: Mapping[str, Weight], inputs: Arguments, fetch: Fetch) -> list[Tensor]:
    """What the module says by itself; weights that it does not hold are fetched as they are touched."""
    absent = [weight for weight in weights.values() if weight.tensor.is_meta]
    try:
        for weight in absent:
            weight.put(Placeholder(weight.name, weight.tensor, lambda name, operation: fetch(name)))
        with _undisturbed(module):
            return [tensor.detach().clone() for tensor in tensors_of(inputs.copy().call(module))]
    finally:
        for weight in absent:
            weight.put(weight.tensor)


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """A run may write to buffers: each begins with those that the module had."""
    before = [(part, dict(part._buffers)) for part in module.modules()]
    copies: dict[int, Tensor] = {}
    for part, buffers in before:
        for name, buffer in buffers.items():
            if buffer is not None and not isinstance(buffer, nn.Parameter):
                part._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
    try:
        yield
    finally:
        for part, buffers in before:
            part._buffers.update(buffers)


class _Layout:
    """Which weights share a shard: those that one stage needs alone; those that the same stages need; each table and
    each weight that is larger than a stage by itself; those that are kept; the buffers; what no stage needs.
    """

    def __init__(self, weights: Mapping[str, Weight], plan: StagePlan, kept: Set[str]) -> None:
        self._weights, self._plan = weights, plan
        self.shards: dict[str, list[str]] = {}
        self._needs: list[list[str]] = [[] for _ in plan.stages]
        homes: dict[str, list[int]] = {}
        for index, stage in enumerate(plan.stages):
            for name in (*stage.uses, *stage.tables):
                homes.setdefault(name, []).append(index)
        self._tables = {name for stage in plan.stages for name in stage.tables}
        groups: dict[tuple, list[str]] = {}
        for name, indices in homes.items():
            alone = name in self._tables or name in sliced_weights(weights, plan)
            if name not in kept:
                groups.setdefault((tuple(indices), name if alone else ""), []).append(name)
        for (indices, _), names in groups.items():
            self._add(f"weights-{len(self.shards):03d}", names, indices)
        self._add(KEPT, [name for name in weights if name in kept], [0])
        self._add("buffers", [name for name, weight in weights.items() if weight.is_buffer], [])
        self._add("unused", [name for name in plan.unused if name not in kept], [])

    def _add(self, shard: str, names: list[str], stages: Sequence[int]) -> None:
        if names:
            self.shards[shard] = names
            for index in stages:
                self._needs[index].append(shard)

    def write(self, writer: StoreWriter, origin: Origin) -> dict[str, Shard]:
        """All shards."""
        return {name: self._write(name, names, writer, origin) for name, names in self.shards.items()}

    def stages(self) -> tuple[Stage, ...]:
        """As the manifest lists them."""
        return tuple(
            Stage(f"{index:03d}", "layer", (Step("module", tuple(shards)),)) for index, shards in enumerate(self._needs)
        )

    def _write(self, shard: str, names: Sequence[str], writer: StoreWriter, origin: Origin) -> Shard:
        tensors = [(name, self._weights[name].tensor) for name in names]
        tensors.sort(key=lambda pair: self._weights[pair[0]].num_bytes % 64 != 0)  # stable: else in order of use
        rows = shard != KEPT and (names[0] in self._tables or names[0] in sliced_weights(self._weights, self._plan))
        entries = [(n, "rows" if rows else n, NAMES[t.dtype], tuple(t.shape)) for n, t in tensors]
        return writer.add_shard(shard, entries, origin.chunks, gathered=rows)


def sliced_weights(weights: Mapping[str, Weight], plan: StagePlan) -> tuple[str, ...]:
    """Weights that need more than a stage should, each alone, but not as a whole at once."""
    tables = {name for stage in plan.stages for name in stage.tables}
    large = [name for name in plan.sliced if name not in tables and weights[name].num_bytes > plan.stage_bytes]
    shapes = {name: weights[name].tensor.shape for name in large}
    return tuple(name for name in large if len(shapes[name]) == 2 and shapes[name][0] >= SLICES)


def _program(
    module: nn.Module, weights: Mapping[str, Weight], plan: StagePlan, example: Arguments, pinned: tuple[str, ...]
) -> Program:
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
        *task_of(module),
    )


def task_of(module: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    """Problem and labels of a classifier of transformers; None and none of any other module."""
    config = getattr(module, "config", None)
    if config is None or not getattr(config, "id2label", None) or not type(module).__name__.endswith(CLASSIFIERS):
        return None, ()
    labels = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    problem = getattr(config, "problem_type", None) or (REGRESSION if len(labels) == 1 else SINGLE_LABEL)
    return str(problem), labels


def versions(module: nn.Module) -> dict[str, str]:
    """Of torch, and of the package that the module comes from."""
    import sys

    found = {"torch": torch.__version__.partition("+")[0]}
    package = type(module).__module__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", None)
    return {**found, package: str(version)} if version and package != "torch" else found


def value_of(tensor: Tensor) -> Value:
    """Dtype and shape."""
    return Value(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


Examples = Sequence[tuple[Arguments, list[Tensor]]]


def _prove_all(
    module: nn.Module, weights: Mapping[str, Weight], examples: Examples, folder: Path
) -> tuple[list[dict[str, Any]], set[str]]:
    """Each example run from the store, under the least memory that it can run in: the proofs, and the weights that were
    touched where they should not have been.
    """
    found = [_prove(module, weights, folder, inputs, expected) for inputs, expected in examples]
    return [proof for proof, _ in found], {name for _, names in found for name in names}


def _touched_whole(module: nn.Module, weights: Mapping[str, Weight], examples: Examples, folder: Path) -> set[str]:
    """Of the weights that seemed to be used some rows at a time, those that are not, where memory is that short."""
    found: set[str] = set()
    with Store(folder, verify="never") as store:
        sliceable, program = sliceable_shards(store), store.module.program
    for inputs, _ in examples if sliceable else ():
        with _streamed(module, weights, folder, sliceable) as stream:
            inputs.copy().call(stream)
            found |= stream.counts.unplanned & set(program.sliced)
    return found


def _judged(proofs: Sequence[dict[str, Any]], module: nn.Module, say: Say) -> dict[str, Any]:
    """What the manifest says of them. Raises StageError where an answer differs."""
    wrong = [proof for proof in proofs if not proof["equal"]]
    if wrong:
        inputs = ", ".join(f"{name} {tuple(shape)}" for name, (_, shape) in wrong[0]["inputs"].items())
        raise StageError(f"the divided module answers otherwise than the whole one for {inputs}", type(module).__name__,
                         "if it answers otherwise each time, make it deterministic")  # fmt: skip
    is_paged = any(proof["unplanned_loads"] or proof["disorders"] for proof in proofs)
    if is_paged:
        say("some weights are read outside their stages: the store is marked as paged, and strict refuses it")
    return {"examples": list(proofs), "is_paged": is_paged}


@contextmanager
def _streamed(
    module: nn.Module, weights: Mapping[str, Weight], folder: Path, sliceable: Sequence[str] = ()
) -> Iterator[Stream]:
    """The module run from a store under the least memory; it has its own weights again afterwards."""
    store = Store(folder, verify="never")
    sizes, stages, pinned = data_bytes(store), streamed_shards(store), store.module.program.pinned
    plan = plan_weights(stages, sizes, pinned, smallest_bytes(stages, sizes, pinned, sliceable), sliceable)
    try:
        with _undisturbed(module), Stream(module, store, plan, sizes) as stream:
            yield stream
    finally:
        for weight in weights.values():
            weight.put(weight.tensor)


def _prove(
    module: nn.Module, weights: Mapping[str, Weight], folder: Path, inputs: Arguments, expected: Sequence[Tensor]
) -> tuple[dict[str, Any], set[str]]:
    """Run one example from the store twice: what came of it, and the weights that were touched beside the plan."""
    own = {name: weight.tensor for name, weight in weights.items() if not weight.is_buffer}
    with _streamed(module, weights, folder) as stream:
        with Touches(own) as touches:
            outputs = [tensors_of(inputs.copy().call(stream))]
        outputs.append(tensors_of(inputs.copy().call(stream)))
        counts, plan = stream.counts, stream.plan
    if touches.found:
        what = (
            f"weight {min(touches.found)} is used from elsewhere than the parameter, where no other can take its place"
        )
        remedy = "have the code take it from its module each time it runs"
        raise StageError(what, type(module).__name__, remedy)
    described = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in inputs.tensors().items()}
    proof = {
        "inputs": described,
        "inputs_sha256": _digest(inputs.tensors()),
        "equal": all(are_equal(output, expected) for output in outputs),
        "unplanned_loads": -(-counts.unplanned_loads // counts.passes),
        "disorders": -(-counts.disorders // counts.passes),
        "peak_weight_bytes": counts.peak_weight_bytes,
        "weight_budget_bytes": plan.resident_bytes + plan.room_bytes,
    }
    return proof, counts.held | counts.unplanned


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(bits(tensor))
    return digest.hexdigest()
