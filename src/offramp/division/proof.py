"""The proof of a division: each example run from the store under the least memory, and compared bit for bit with what
the module says by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from offramp.errors import StageError
from offramp.runtime.weight_plan import plan_weights, smallest_bytes
from offramp.store import Store
from offramp.streaming.capture import Arguments, Touches, are_equal, tensors_of
from offramp.streaming.opening import data_bytes, sliceable_shards
from offramp.streaming.placeholders import Weight, bits
from offramp.streaming.streamed import Stream, streamed_shards

Examples = Sequence[tuple[Arguments, list[Tensor]]]


def prove_all(
    module: nn.Module, weights: Mapping[str, Weight], examples: Examples, folder: Path
) -> tuple[list[dict[str, Any]], set[str]]:
    """Each example run from the store, the first one twice, under the least memory that it can run in: the proofs, and
    the weights that were touched where they should not have been.
    """
    found = [
        _prove(module, weights, folder, inputs, expected, num_passes=1 if index else 2)
        for index, (inputs, expected) in enumerate(examples)
    ]
    return [proof for proof, _ in found], {name for _, names in found for name in names}


def touched_whole(module: nn.Module, weights: Mapping[str, Weight], examples: Examples, folder: Path) -> set[str]:
    """Of the weights that seemed to be used some rows at a time, those that are not, where memory is that short."""
    found: set[str] = set()
    with Store(folder, verify="never") as store:
        sliceable, program = sliceable_shards(store), store.module.program
    for inputs, _ in examples if sliceable else ():
        with _streamed(module, weights, folder, sliceable) as stream:
            inputs.copy().call(stream)
            found |= stream.counts.unplanned & set(program.sliced)
    return found


def judged(proofs: Sequence[dict[str, Any]], module: nn.Module) -> dict[str, Any]:
    """What the manifest says of them. Raises StageError where an answer differs."""
    wrong = [proof for proof in proofs if not proof["equal"]]
    if wrong:
        inputs = ", ".join(f"{name} {tuple(shape)}" for name, (_, shape) in wrong[0]["inputs"].items())
        raise StageError(f"the divided module answers otherwise than the whole one for {inputs}", type(module).__name__,
                         "if it answers otherwise each time, make it deterministic")  # fmt: skip
    is_paged = any(proof["unplanned_loads"] or proof["disorders"] for proof in proofs)
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
        with undisturbed(module), Stream(module, store, plan, sizes) as stream:
            yield stream
    finally:
        for weight in weights.values():
            weight.put(weight.tensor)


def _prove(
    module: nn.Module,
    weights: Mapping[str, Weight],
    folder: Path,
    inputs: Arguments,
    expected: Sequence[Tensor],
    num_passes: int,
) -> tuple[dict[str, Any], set[str]]:
    """Run one example from the store: what came of it, and the weights that were touched beside the plan."""
    own = {name: weight.tensor for name, weight in weights.items() if not weight.is_buffer}
    with _streamed(module, weights, folder) as stream:
        with Touches(own) as touches:
            outputs = [tensors_of(inputs.copy().call(stream))]
        outputs += [tensors_of(inputs.copy().call(stream)) for _ in range(num_passes - 1)]
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
        "weight_budget_bytes": plan.resident_bytes + plan.pool_bytes,
    }
    return proof, counts.held | counts.unplanned


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(bits(tensor))
    return digest.hexdigest()


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
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
