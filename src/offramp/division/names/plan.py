"""The plan of a division: which tensor goes into which shard, under which name and role, and which stages need it.

Everything is decided from the config and from the names, dtypes and shapes of the tensors; no data are read, nothing is
written. It trusts that a family computes as its table says: that the answers are the same is for the builder to prove.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from offramp.checkpoints.families import Family, family_of, shown
from offramp.errors import SourceError
from offramp.store.manifest import Encoder, Stage, Step
from offramp.store.shapes import LAYER_KINDS, shapes

Entry = tuple[str, tuple[int, ...]]
"""Dtype, as safetensors spells it, and shape."""

DTYPES = ("F32", "F16", "BF16")
ALIGNMENT_BYTES = 64
_LISTED = 5


class PlannedTensor(NamedTuple):
    """One tensor: its name in the source and in the store, what the computation calls it, and its shape."""

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

    encoder: Encoder
    architecture: str
    model_type: str
    stages: tuple[Stage, ...]
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
    return Division(
        encoder, family.architecture(config), family.model_type, _stages(encoder), tuple(shards), widened_from
    )


class _Wanted(NamedTuple):
    name: str
    role: str
    shape: tuple[int, ...]


def _canonical_names(entries: Mapping[str, Entry], where: object) -> dict[str, str]:
    """Canonical name -> name in the source, without the position buffers that old versions of transformers saved."""
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
    """`LayerNorm.gamma` and `.beta`, as TensorFlow called them, under today's names."""
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


def _layout(encoder: Encoder) -> Iterable[tuple[str, str, int | None]]:
    """(shard, kind, layer) of everything that is read, in order of use."""
    yield "embedding-rows", "embedding-rows", None
    yield "embedding", "embedding", None
    for layer in range(encoder.num_layers):
        for kind in LAYER_KINDS:
            yield _layer_shard(layer, kind), kind, layer
    if encoder.problem is not None:
        yield "head", "head", None


def _layer_shard(layer: int, kind: str) -> str:
    return f"layer-{layer:02d}-{kind}"


def _wanted(family: Family, encoder: Encoder, base: str) -> dict[str, list[_Wanted]]:
    """shard -> its tensors in order of use."""
    promised = shapes(encoder)
    wanted = {}
    for shard, kind, layer in _layout(encoder):
        names = family.names(kind, base, layer)
        wanted[shard] = [_Wanted(names[role], role, shape) for role, shape in promised[kind].items()]
    return wanted


def _stages(encoder: Encoder) -> tuple[Stage, ...]:
    stages = [Stage("embedding", "embedding", (Step("embedding", ("embedding-rows", "embedding")),))]
    for layer in range(encoder.num_layers):
        steps = tuple(Step(kind, (_layer_shard(layer, kind),)) for kind in LAYER_KINDS)
        stages.append(Stage(f"layer.{layer}", "layer", steps))
    if encoder.problem is not None:
        stages.append(Stage("head", "head", (Step("head", ("head",)),)))
    return tuple(stages)


def _shard(name: str, wanted: Iterable[tuple[str, str, tuple[int, ...]]], found: Mapping[str, str]) -> ShardPlan:
    tensors = [PlannedTensor(found[canonical], canonical, role, shape) for canonical, role, shape in wanted]
    tensors.sort(key=lambda tensor: 4 * math.prod(tensor.shape) % ALIGNMENT_BYTES != 0)  # stable: else in order of use
    return ShardPlan(name, tuple(tensors), gathered=name == "embedding-rows")


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
