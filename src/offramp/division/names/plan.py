"""Plan of a division by names: the shard, name and role of each tensor, and the program that takes them.

Everything is decided from the config and from the names, dtypes and shapes of the tensors; no data are read, nothing is
written. A family is assumed to compute what its table says; tests compare the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from offramp.checkpoints.families import Family, family_of, shown
from offramp.errors import SourceError
from offramp.program.encoder import (
    LAYER_KERNELS,
    Encoder,
    PlacedStage,
    PlacedStep,
    encoder_program,
    encoder_shapes,
)
from offramp.program.program import BEGIN, END, LAYER, Program
from offramp.store.safetensors import num_bytes

Entry = tuple[str, tuple[int, ...]]
"""Dtype, as safetensors spells it, and shape."""

DTYPES = ("F32", "F16", "BF16")
"""Dtypes of checkpoints that can be divided by names; the narrow ones are converted to F32, which is exact."""
ALIGNMENT_BYTES = 64
ROWS = "embedding-rows"
"""The shard of embedding tables, from which rows are gathered."""
_LISTED = 5


class PlannedTensor(NamedTuple):
    """One tensor: its name in the source and in the store, its name in the computation, and its shape."""

    source_name: str
    canonical_name: str
    role: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardPlan:
    """One shard, its tensors in the order of the file."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    gathered: bool = False
    """Rows of its tensors are fetched singly."""


@dataclass(frozen=True)
class Division:
    """What to build. The shard `other`, if there is one, belongs to no stage: it only keeps the checkpoint whole."""

    program: Program
    labels: tuple[str, ...]
    architecture: str
    model_type: str
    shards: tuple[ShardPlan, ...]
    widened_from: str | None
    """The narrow dtype of the source; None if all of it is F32."""


def plan_division(config: Mapping[str, Any], entries: Mapping[str, Entry], where: object = None) -> Division:
    """Plan the division of a model with this `config.json` and these tensors, name -> (dtype, shape).

    Raises SourceError for an unknown architecture or setting, and for tensors that are missing, unexpected, mis-shaped
    or of another dtype than F32, F16 and BF16, by name; `where` is where they are.
    """
    family = family_of(config)
    encoder = family.encoder(config)
    found = _canonical_names(entries, where)
    base = family.base if any(name.startswith(family.base) for name in found) else ""
    widened_from = _widened_from({source: entries[source] for source in found.values()}, where)
    wanted = _wanted(family, encoder, base)
    expected = {name for tensors in wanted.values() for name, _, _ in tensors}
    passed_through = family.passed_through(base, family.has_head(config))
    other = sorted(name for name in found if name not in expected and name.startswith(passed_through))
    _check(wanted, {name: entries[source][1] for name, source in found.items()}, other, where)
    shards = [_shard(name, tensors, found) for name, tensors in wanted.items()]
    if other:
        shards.append(_shard("other", [(name, "other", entries[found[name]][1]) for name in other], found))
    program, architecture = _program(encoder, wanted), family.architecture(config)
    return Division(program, encoder.labels, architecture, family.model_type, tuple(shards), widened_from)


class _Wanted(NamedTuple):
    name: str
    role: str
    shape: tuple[int, ...]


def _canonical_names(entries: Mapping[str, Entry], where: object) -> dict[str, str]:
    """Return canonical name -> name in the source, without position buffers that old versions of transformers saved."""
    found: dict[str, str] = {}
    for source in entries:
        name = _canonical(source)
        if name.endswith("embeddings.position_ids"):
            continue
        if name in found:
            raise SourceError(
                f"{shown(source)} and {shown(found[name])} are the same tensor", where, "get the model again"
            )
        found[name] = source
    return found


def _canonical(name: str) -> str:
    """Return a name with today's names of `LayerNorm.gamma` and `.beta`, which come from TensorFlow."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _widened_from(entries: Mapping[str, Entry], where: object) -> str | None:
    for name, (dtype, _) in entries.items():
        if dtype not in DTYPES:
            raise SourceError(
                f"tensor {shown(name)} has dtype {dtype}",
                where,
                f"divide a model of {', '.join(DTYPES)}, not a quantised one",
            )
    return next((dtype for dtype, _ in entries.values() if dtype != "F32"), None)


def _steps(encoder: Encoder) -> Iterator[tuple[str, str, int | None]]:
    """Yield (stage, kernel, layer) of each step that takes weights, in order."""
    yield "embedding", "embedding", None
    for layer in range(encoder.num_layers):
        for kernel in LAYER_KERNELS:
            yield f"layer.{layer}", kernel, layer
    if encoder.problem is not None:
        yield "head", "head", None


def _shard_name(kernel: str, layer: int | None) -> str:
    return kernel if layer is None else f"layer-{layer:02d}-{kernel}"


def _wanted(family: Family, encoder: Encoder, base: str) -> dict[str, list[_Wanted]]:
    """Return shard -> its tensors in order of use."""
    shapes, wanted = encoder_shapes(encoder), {}
    for kernel, layer in ((ROWS, None), *((kernel, layer) for _, kernel, layer in _steps(encoder))):
        names = family.names(kernel, base, layer)
        tensors = [_Wanted(names[role], role, shape) for role, shape in shapes[kernel].items()]
        wanted[_shard_name(kernel, layer)] = tensors
    return wanted


def _program(encoder: Encoder, wanted: Mapping[str, Sequence[_Wanted]]) -> Program:
    stages: dict[str, list[PlacedStep]] = {}
    for stage, kernel, layer in _steps(encoder):
        shards = (*([ROWS] if kernel == "embedding" else []), _shard_name(kernel, layer))
        tensors = {tensor.role: tensor.name for shard in shards for tensor in wanted[shard]}
        stages.setdefault(stage, []).append(PlacedStep(kernel, shards, tensors))
    roles = {"embedding": BEGIN, "head": END}
    placed = [PlacedStage(name, roles.get(name, LAYER), tuple(steps)) for name, steps in stages.items()]
    return encoder_program(encoder, placed, [ROWS])


def _shard(name: str, wanted: Iterable[tuple[str, str, tuple[int, ...]]], found: Mapping[str, str]) -> ShardPlan:
    tensors = [PlannedTensor(found[canonical], canonical, role, shape) for canonical, role, shape in wanted]
    tensors.sort(
        key=lambda tensor: num_bytes("F32", tensor.shape) % ALIGNMENT_BYTES != 0
    )  # stable: else in order of use
    return ShardPlan(name, tuple(tensors), gathered=name == ROWS)


def _check(
    wanted: Mapping[str, list[_Wanted]], found: Mapping[str, tuple[int, ...]], other: Iterable[str], where: object
) -> None:
    """Raise SourceError naming what is missing, unexpected or mis-shaped among the tensors `found`, name -> shape."""
    expected = {tensor.name: tensor.shape for tensors in wanted.values() for tensor in tensors}
    missing = [name for name in expected if name not in found]
    unexpected = sorted(set(found) - set(expected) - set(other))
    mis_shaped = [name for name in expected if name in found and found[name] != expected[name]]
    complaints = [
        _complaint("missing", missing, lambda name: f"{shown(name)} {expected[name]}"),
        _complaint("unexpected", unexpected, lambda name: f"{shown(name)} {found[name]}"),
        _complaint("mis-shaped", mis_shaped, lambda name: f"{shown(name)} {found[name]} not {expected[name]}"),
    ]
    if any(complaints):
        what = "; ".join(filter(None, complaints))
        raise SourceError(f"tensors do not fit config.json: {what}", where, "get the whole model again")


def _complaint(what: str, names: list[str], show: Callable[[str], str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > _LISTED else ""
    return f"{len(names)} {what}: {', '.join(show(name) for name in names[:_LISTED])}{more}"
