"""The weights of a store's exit heads, checked against the program."""

from __future__ import annotations

from typing import Dict, List

import numpy as np

from offramp.errors import StoreError, UsageError
from offramp.policies import Policy
from offramp.program.program import EXIT_KERNEL, POOLED_LINEAR, Program
from offramp.store import Store
from offramp.store.exits import read_exits
from offramp.store.reader import load_tensors

_REMEDY = "train the exits again, and divide again"
_NO_EXIT = "--exit none runs the whole model"


def load_exits(store: Store, policy: Policy, *, needs_all: bool = False) -> Dict[int, Dict[str, np.ndarray]]:
    """Return the exit heads that a policy needs, or all of them for a deadline (`needs_all`): exit -> role -> array.

    Raises UsageError where there are none, StoreError where they do not fit the program.
    """
    program, exits, description = store.program, store.manifest.exits, read_exits(store)
    num_exits = len(program.layers)
    if num_exits == 1 and needs_all:
        raise UsageError("a deadline needs exits and this model has one layer", store.path, "run it without a deadline")
    if num_exits == 1 or (policy.earliest_exit(num_exits) >= num_exits and not needs_all):
        return {}
    if exits is None or description is None:
        what = f"{'a deadline' if needs_all else f'exit {policy}'} needs exits and this store has none"
        raise UsageError(what, store.path, f"{_NO_EXIT}; train exits and divide again")
    if not description.trained:
        raise StoreError("the exits were never trained", store.path, _NO_EXIT)
    form = description.form
    if program.kernels[EXIT_KERNEL].template == POOLED_LINEAR and (form.pool, form.depth) != ("mean", 1):
        what = f"exits that read the {form.pool} token with {form.depth} layers are for encoders of texts"
        raise StoreError(what, store.path, _REMEDY)
    assert program.output is not None, "a kernel for exits"
    tensors, heads = load_tensors(store, exits.heads), {}
    for index, width in enumerate(exit_widths(program), 1):
        heads[index] = {}
        for role, shape in form.shapes(width, program.output.num_labels).items():
            array = heads[index][role] = tensors.get(form.tensor_name(role, index), np.empty(0))
            if array.shape != shape or array.dtype != np.float32:
                what = f"exit {index}: {role} is {array.dtype} {array.shape}, not float32 {shape}"
                raise StoreError(what, store.path, _REMEDY)
    return heads


def exit_widths(program: Program) -> List[int]:
    """Return the width of the value that each exit but the last reads."""
    values = program.values()
    return [values[layer.exit].width for layer in program.layers if layer.exit is not None]
