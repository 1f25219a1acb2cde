"""What an `Encoder` promises of a store: which kinds a layer is made of, and the shape of every tensor of each kind.

`loads` asks that a manifest is sound in itself; this asks that it is the manifest of the model that it says it is.
"""

from __future__ import annotations

from typing import Dict, Tuple

from offramp.errors import StoreError
from offramp.store.manifest import Encoder, Manifest, Stage, Step

LAYER_KINDS = ("attention", "up", "down")
Shapes = Dict[str, Tuple[int, ...]]


def shapes(encoder: Encoder) -> Dict[str, Shapes]:
    """Shape of each role of each kind, the same in all families; what the model does not have is absent."""
    hidden, inner, width = encoder.hidden_size, encoder.intermediate_size, encoder.embedding_size
    rows = {"word": (encoder.vocab_size, width), "position": (encoder.max_length + encoder.position_offset, width)}
    if encoder.num_token_types:
        rows["type"] = (encoder.num_token_types, width)
    project = linear_shapes("project", hidden, width) if width != hidden else {}
    attention = {role: shape for part in "qkvo" for role, shape in linear_shapes(part, hidden, hidden).items()}
    kinds: Dict[str, Shapes] = {
        "embedding-rows": rows,
        "embedding": {**_norm(width), **project},
        "attention": {**attention, **_norm(hidden)},
        "up": linear_shapes("up", inner, hidden),
        "down": {**linear_shapes("down", hidden, inner), **_norm(hidden)},
    }
    if encoder.problem is not None:
        kinds["head"] = {**linear_shapes("dense", hidden, hidden), **linear_shapes("out", len(encoder.labels), hidden)}
    return kinds


def require_fitting(manifest: Manifest, where: object) -> None:
    """Raise StoreError unless every stage has the steps, and every step the tensors, that the encoder promises."""
    promised = shapes(manifest.encoder)
    promised["embedding"] = {**promised.pop("embedding-rows"), **promised["embedding"]}
    kinds = {"embedding": ("embedding",), "layer": LAYER_KINDS, "head": ("head",)}
    for stage in manifest.stages:
        found = tuple(step.kind for step in stage.steps)
        if found != kinds[stage.role]:
            raise _foreign(f"stage {stage.name} has the steps {found}, not {kinds[stage.role]}", where)
        for step in stage.steps:
            _require_tensors(manifest, stage, step, promised[step.kind], where)


def _require_tensors(manifest: Manifest, stage: Stage, step: Step, promised: Shapes, where: object) -> None:
    tensors = [tensor for name in step.shards for tensor in manifest.shards[name].tensors]
    found = {tensor.role: (tensor.dtype, tensor.shape) for tensor in tensors}
    for role in sorted({*found, *promised}):
        wanted = ("F32", promised[role]) if role in promised else None
        if found.get(role) != wanted:
            what = f"stage {stage.name}, {step.kind}: {role} is {found.get(role)}, the encoder promises {wanted}"
            raise _foreign(what, where)


def _foreign(what: str, where: object) -> StoreError:
    return StoreError(what, where, "divide the model again")


def linear_shapes(role: str, outputs: int, inputs: int) -> Shapes:
    """Weight and bias of a linear layer."""
    return {f"{role}.weight": (outputs, inputs), f"{role}.bias": (outputs,)}


def _norm(width: int) -> Shapes:
    return {"norm.weight": (width,), "norm.bias": (width,)}
