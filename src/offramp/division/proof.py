"""The proof of a division: each example is run from the store under the smallest weight budget.

The results are compared bit for bit with the answers of the module itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from offramp.division.original import Example, Original, undisturbed
from offramp.errors import StageError
from offramp.store import Store
from offramp.store.manifest import Proof, ProvenExample, ProvenInput
from offramp.streaming.capture import Touches, are_equal, tensors_of
from offramp.streaming.placeholders import bits
from offramp.streaming.placement import data_bytes, plan_within, sliceable_shards, smallest_weights
from offramp.streaming.streamed import Stream, StreamConfig


def prove_all(original: Original, folder: Path) -> tuple[list[ProvenExample], set[str]]:
    """Run each example from the store, the first one twice, under the smallest weight budget.

    Returns the results, and the weights that were used outside their stages.
    """
    found = [_prove(original, folder, example, 1 if index else 2) for index, example in enumerate(original.examples)]
    return [proven for proven, _ in found], {name for _, names in found for name in names}


def prove_slices(original: Original, folder: Path) -> set[str]:
    """Return the weights that were planned to be read some rows at a time, and are used as a whole."""
    found: set[str] = set()
    with Store(folder, verify="never") as store:
        sliceable, module = sliceable_shards(store), store.program.module
    assert module is not None, "divided by a run"
    for example in original.examples if sliceable else ():
        with _streamed(original, folder, sliceable) as stream:
            example.inputs.copy().call(stream)
            found |= stream.counts.unplanned & set(module.sliced)
    return found


def verdict(proven: Sequence[ProvenExample], original: Original) -> Proof:
    """Return the proof that the manifest contains. Raises StageError where an answer differs."""
    wrong = next((example for example in proven if not example.equal), None)
    if wrong is not None:
        inputs = ", ".join(f"{name} {tuple(each.shape)}" for name, each in wrong.inputs.items())
        raise StageError(f"the divided module gives other answers than the whole one for {inputs}", original.name,
                         "if its answers differ from run to run, make it deterministic")  # fmt: skip
    return Proof(tuple(proven), any(example.unplanned_loads or example.disorders for example in proven))


@contextmanager
def _streamed(original: Original, folder: Path, sliceable: Sequence[str] = ()) -> Iterator[Stream]:
    """Yield the module as it runs from a store under the smallest weight budget; afterwards it has its own weights."""
    store = Store(folder, verify="never")
    sizes, config = data_bytes(store), StreamConfig(reads="buffered")
    plan = plan_within(store, sizes, smallest_weights(store, sizes, sliceable), sliceable)
    try:
        with undisturbed(original.module), Stream(original.module, store, plan, sizes, config) as stream:
            yield stream
    finally:
        for weight in original.weights.values():
            weight.put(weight.tensor)


def _prove(original: Original, folder: Path, example: Example, num_passes: int) -> tuple[ProvenExample, set[str]]:
    """Run one example from the store. Returns the result, and the weights that were used outside their stages."""
    own = {name: weight.tensor for name, weight in original.weights.items() if not weight.is_buffer}
    inputs = example.inputs
    with _streamed(original, folder) as stream:
        with Touches(own) as touches:
            outputs = [tensors_of(inputs.copy().call(stream))]
        outputs += [tensors_of(inputs.copy().call(stream)) for _ in range(num_passes - 1)]
        counts, plan = stream.counts, stream.plan
    if touches.found:
        what = f"weight {min(touches.found)} is used through a reference outside its module, which cannot be replaced"
        remedy = "have the code take it from its module each time it runs"
        raise StageError(what, original.name, remedy)
    tensors = inputs.tensors()
    proven = ProvenExample(
        {name: ProvenInput(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()},
        _digest(tensors),
        all(are_equal(output, example.outputs) for output in outputs),
        unplanned_loads=-(-counts.unplanned_loads // counts.passes),
        disorders=-(-counts.disorders // counts.passes),
        peak_weight_bytes=counts.peak_weight_bytes,
        weight_budget_bytes=plan.resident_bytes + plan.pool_bytes,
    )
    return proven, counts.held | counts.unplanned


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(bits(tensor))
    return digest.hexdigest()
