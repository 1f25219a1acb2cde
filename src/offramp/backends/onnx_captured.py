"""A captured kernel in ONNX Runtime. Its graph is checked when it is loaded, its sizes for each new shape of inputs."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from offramp.backends.base import REMEDY, ProgramBackend
from offramp.backends.onnx_checks import (
    MOST_FREE_WORK,
    MOST_STORE_NODES,
    Allowance,
    Taken,
    TooLargeError,
    UnlistedError,
    checked_model,
    operations,
    require_time,
    sizes_of,
)
from offramp.backends.onnx_operators import Known
from offramp.backends.onnx_session import KernelError, StopClock, open_session, run_session
from offramp.errors import StoreError
from offramp.program.checks import WrongError, require_listed
from offramp.program.dtypes import DTYPES
from offramp.program.program import Step
from offramp.runtime.backend import State
from offramp.units import format_size

_MOST_SHAPES = 4096
"""Shapes of inputs for which a kernel keeps its sizes. When there are more, they are computed again."""
_TRUST = "run it with --backend torch, or with --trust-kernels if you trust who made the store"
_Shapes = Tuple[Tuple[int, ...], ...]


class CapturedKernel:
    """Runs one captured kernel of a backend. Raises StoreError for a graph that is not allowed.

    Args:
        clock: stops runs at their deadline.
        num_loaded: operations of the kernels that the backend has loaded.
    """

    def __init__(self, backend: ProgramBackend, name: str, graph: bytes, clock: StopClock, num_loaded: int = 0) -> None:
        self._backend, self._name, self._clock = backend, name, clock
        self._checked: Dict[_Shapes, Taken] = {}
        """Shapes of the inputs whose shapes vary from call to call -> what the kernel takes for them."""
        program = backend.program
        self._given = {*program.inputs, *program.lookups}
        steps = [step for step in program.steps() if step.kernel == name]
        values, rows, tokens = program.values(), max(program.example[0], 1), max(program.example[1], 1)
        bytes_read: Dict[str, int] = {}
        try:
            self._model = checked_model(graph, trusted=backend.trust_kernels)
            self._taken, self._made = tuple(self._model.graph.inputs), list(self._model.graph.outputs)
            examples = [self._example(step, values, rows, tokens) for step in steps]
            for example in examples or [{}]:
                require_listed(self._taken, example, "the graph takes")
            for step, example in zip(steps, examples):
                for port in step.reads:
                    bytes_read[port] = max(bytes_read.get(port, 0), example[port].num_bytes)
            shapes = {port: {example[port].shape for example in examples} for port in self._taken}
            self._varying = tuple(port for port, each in shapes.items() if port in bytes_read or len(each) > 1)
            self._allowance = Allowance(bytes_read, program.activation_bytes)
            taken = [self._check(example) for example in examples]
            require_time(sum(each.free_work for each in taken))
            self.example_bytes = _most_bytes(steps, examples, taken)
            """Most bytes of the values that one step reads and makes for the example of the program."""
            self.num_operations = sum(1 for _ in operations(self._model.graph))
            if num_loaded + self.num_operations > MOST_STORE_NODES:
                raise TooLargeError(f"the graphs of the store have more than {MOST_STORE_NODES} operations")
        except WrongError as error:
            raise self._refused(error) from None
        # Folding computes at load what only depends on constants, whatever the arena's limit is (tried with 1.32).
        self.session = open_session(graph, backend.num_threads, backend.store, name, ("ConstantFolding",))

    def __call__(self, state: State, inputs: Dict[str, Any]) -> List[np.ndarray]:
        """Return the results of the kernel. Raises StoreError for inputs that it does not take, StoppedError."""
        taken = self._checked.get(tuple([inputs[name].shape for name in self._varying])) or self._taken_by(inputs)
        state.made_bytes += taken.made_bytes
        state.free_work += taken.free_work
        if state.free_work > MOST_FREE_WORK or state.made_bytes > taken.spare_bytes:
            self._require_room(state, taken.spare_bytes)
        options = None if state.latest is None else self._clock.options(state.latest)
        try:
            return run_session(self.session, self._made, {name: inputs[name] for name in self._taken}, options)
        except KernelError as error:
            raise self._backend.wrong_inputs(self._name, str(error)) from None

    def _taken_by(self, inputs: Mapping[str, np.ndarray]) -> Taken:
        """Check inputs of a new shape."""
        try:
            return self._check({name: Known(array.dtype.name, array.shape) for name, array in inputs.items()})
        except TooLargeError as error:
            raise self._refused(error) from None
        except WrongError as error:
            raise self._backend.wrong_inputs(self._name, str(error)) from None

    def _require_room(self, state: State, spare_bytes: int) -> None:
        """Raise StoreError where the kernels of a pass together take too much: their work, or values that they hold."""
        try:
            require_time(state.free_work)
            held = sum(value.nbytes for name, value in state.values.items() if name not in self._given)
            if held > spare_bytes:
                raise TooLargeError(f"values of the program take {format_size(held)} beside it")
        except TooLargeError as error:
            raise self._refused(error) from None

    def _check(self, inputs: Mapping[str, Known]) -> Taken:
        """Return what the kernel takes for inputs of these shapes.

        Raises WrongError for inputs that the graph does not take, and for sizes that are not allowed.
        """
        shapes = tuple(inputs[name].shape for name in self._varying)
        if shapes not in self._checked:
            if len(self._checked) >= _MOST_SHAPES:
                self._checked.clear()
            self._checked[shapes] = self._allowance.taken(sizes_of(self._model, inputs), inputs)
        return self._checked[shapes]

    def _example(self, step: Step, values: Mapping[str, Any], rows: int, tokens: int) -> Dict[str, Known]:
        """Return the inputs of a step in the example of its program."""
        found = {}
        for port, name in step.reads.items():
            found[port] = Known(values[name].dtype, tuple(values[name].shape(rows, tokens)))
        for port, name in (*step.weights.items(), *step.constants.items()):
            tensor = self._backend.store.manifest.tensors()[name][1]
            found[port] = Known(np.dtype(DTYPES[tensor.dtype].numpy).name, tuple(tensor.shape))
        return found

    def _refused(self, error: WrongError) -> StoreError:
        remedy = _TRUST if isinstance(error, UnlistedError) else REMEDY
        return StoreError(f"graph {self._name!r} is refused: {error}", self._backend.store.path, remedy)


def _most_bytes(steps: Sequence[Step], examples: Sequence[Mapping[str, Known]], taken: Sequence[Taken]) -> int:
    """Return the most bytes of the values that one of the steps reads and makes."""
    read = [sum(example[port].num_bytes for port in step.reads) for step, example in zip(steps, examples)]
    return max((size + each.made_bytes for size, each in zip(read, taken)), default=0)
