"""The heads of a store's exits, checked against what it computes with."""

from __future__ import annotations

from typing import Dict

import numpy as np

from offramp.errors import StoreError, UsageError
from offramp.policies import Policy
from offramp.runtime.course import Course
from offramp.runtime.segments import exit_widths
from offramp.store import Store
from offramp.store.exits import DEFAULT_FORM, exit_name, exit_shapes, read_exits
from offramp.store.manifest import Manifest
from offramp.store.reader import load_tensors
from offramp.store.shapes import Shapes, linear_shapes


def load_exits(
    store: Store, course: Course, policy: Policy, *, needs_all: bool = False
) -> Dict[int, Dict[str, np.ndarray]]:
    """The exit heads that a policy needs, or, for a deadline (`needs_all`), all of them: exit -> role -> array.

    Raises UsageError where there are none, StoreError where they are not what they say.
    """
    num_exits = len(course.layers)
    if num_exits == 1 and needs_all:
        raise UsageError("a deadline needs exits and this model has one layer", store.path, "run it without a deadline")
    if num_exits == 1 or (policy.earliest_exit(num_exits) >= num_exits and not needs_all):
        return {}
    if store.contents.exits is None:
        raise UsageError(
            f"{'a deadline' if needs_all else f'exit {policy}'} needs exits and this store has none",
            store.path,
            "--exit none runs the whole model; train exits and divide again",
        )
    description = read_exits(store)
    assert description is not None, "the manifest has exits"
    if not description.trained:
        raise StoreError("the exits were never trained", store.path, "--exit none runs the whole model")
    tensors = load_tensors(store, store.contents.exits.heads)
    exits = {}
    for index in range(1, num_exits):
        shapes = _shapes(store, index, description.form)
        names = {role: exit_name(role, index, description.form) for role in shapes}
        exits[index] = {role: tensors.get(name, np.empty(0)) for role, name in names.items()}
        for role, shape in shapes.items():
            array = exits[index][role]
            if array.shape != shape or array.dtype != np.float32:
                raise StoreError(
                    f"exit {index}: {role} is {array.dtype} {array.shape}, not float32 {shape}",
                    store.path,
                    "train the exits again",
                )
    return exits


def _shapes(store: Store, index: int, form: str) -> Shapes:
    if isinstance(store.contents, Manifest):
        return exit_shapes(store.contents.encoder, form)
    if form != DEFAULT_FORM:
        raise StoreError(f"exits of the form {form!r} are for encoders of texts", store.path, "train the exits again")
    program = store.module.program
    return linear_shapes("exit", len(program.labels), exit_widths(program)[index - 1])
