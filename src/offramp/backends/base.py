"""The part of a backend that does not depend on its library: loading, lifetimes of values, rows and memory.

A subclass loads kernels by template and knows how much memory they take. Values have the axes that the program gives
them; they are NumPy arrays unless the subclass wraps them.

Shapes: B rows, S tokens, T = B S.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from bisect import bisect_right
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import numpy as np

from offramp.errors import StoreError
from offramp.program.dtypes import DTYPES, OF_ARRAYS
from offramp.program.encoder import misfit, parts_of
from offramp.program.heads import HeadForm, Shapes
from offramp.program.program import (
    ATTENTION_MASK,
    BATCH,
    BATCH_TOKENS,
    BEGIN,
    CAPTURED,
    EXIT_KERNEL,
    Kernel,
    Program,
    Step,
    Value,
)
from offramp.runtime.backend import Backend, State, Weights
from offramp.runtime.slots import Slot
from offramp.store import Store, Tensor
from offramp.store.exits import read_exits

LoadedKernel = Callable[[State, Dict[str, Any]], Sequence[Any]]
"""Runs one kernel: (state, input of the kernel -> value) -> its results, in the order of `Step.writes`."""
CAPTURED_FACTOR = 1.5
"""Safety factor on the bytes of values that lived at once when a program was captured: allocators round sizes up, and
operations make temporary copies that the capture does not see."""
CAPTURED_SCRATCH_BYTES = 8 << 20
"""Bytes for each thread that libraries take in captured kernels: packed operands of matrix products, columns of
convolutions."""
REMEDY = "divide the model again"
_BACKENDS: weakref.WeakSet[ProgramBackend] = weakref.WeakSet()
"""Backends of this process: their libraries keep buffers for all of them."""
BLOCKS = ("heads", "product", "join", "join-norm", "first")
"""Templates of programs with blocks."""
MASK = "mask"
"""Template of the kernel whose result tells attention which tokens are padding."""


class ProgramBackend(Backend):
    """A backend that runs each kernel of a program by its template.

    Raises StoreError where the program has kernels that the backend does not run, or weights that do not fit them.
    """

    templates: Tuple[str, ...] = ()
    """Templates that `load` knows."""
    scratch_bytes = 0
    """Bytes for each thread that the library takes in kernels of templates, besides values."""

    def __init__(self, store: Store, num_threads: int, *, trust_kernels: bool = False) -> None:
        self.store, self.program, self.num_threads = store, store.program, num_threads
        self.trust_kernels = trust_kernels
        if not self.program.stages:
            remedy = "divide with --method export, or run it with offramp.stream"
            raise StoreError("the stages of this store are not graphs", store.path, remedy)
        self._tensors = store.manifest.taken
        self.exit_form: Optional[HeadForm] = None
        exits, kernel = read_exits(store), self.program.kernels.get(EXIT_KERNEL)
        if exits is not None and kernel is not None:
            # Heads that this program cannot have are refused where they are read.
            fits = kernel.template != "pooled-linear" or exits.form == HeadForm("mean", 1)
            self.exit_form = exits.form if fits else None
        names = dict.fromkeys(step.kernel for step in self.program.steps())
        if self.exit_form is not None:
            names[EXIT_KERNEL] = None  # no step, but a kernel
        self._require_runnable(names)
        self.kernels: Dict[str, LoadedKernel] = _Kernels(self)
        self.kernels.update({name: self.load(name, self.program.kernels[name]) for name in names})
        self.values, self.lifetimes = self.program.values(), lifetimes_of(self.program)
        self._waiting_bytes: Dict[int, int] = {}
        """Tokens of a trial -> most bytes of one row between two steps, in captured programs."""
        self.is_captured = any(kernel.template == CAPTURED for kernel in self.program.kernels.values())
        self._constants = _read_constants(self)
        _BACKENDS.add(self)

    def wrong_inputs(self, name: str, line: str) -> StoreError:
        """Return the error of a kernel that does not take its inputs; `line` is what the library says."""
        is_captured = self.program.kernels[name].template == CAPTURED
        remedy = "divide the model with such an input as its example" if is_captured else REMEDY
        return StoreError(f"graph {name!r} does not take these inputs: {line[-200:]}", self.store.path, remedy)

    @abstractmethod
    def load(self, name: str, kernel: Kernel) -> LoadedKernel:
        """Return a kernel of one of `templates`, ready to run."""

    def wrap(self, array: np.ndarray) -> Any:
        """Return an array as a value of the library, without a copy where possible."""
        return array

    def unwrap(self, value: Any) -> np.ndarray:
        """Return a value of the library as an array, without a copy."""
        return value

    def take(self, value: Any, rows_B: np.ndarray, axis: int) -> Any:
        """Return a copy of some rows of a value."""
        return np.take(value, rows_B, axis=axis)

    @abstractmethod
    def num_elements(self, kernel: Kernel, num_rows: int, length: int) -> int:
        """Return the most elements of values that live at once while a kernel of a template runs on [B, S] tokens, its
        inputs included."""

    @abstractmethod
    def mask_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes that the masks of a state of [B, S] tokens take."""

    def activation_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of the kernel that takes most. Captured programs: in proportion to their example."""
        scratch = CAPTURED_SCRATCH_BYTES if self.is_captured else self.scratch_bytes
        return self.value_bytes(num_rows, length) + self.num_threads * scratch

    def value_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of `activation_bytes` without scratch of threads."""
        if self.is_captured:
            return lived_bytes(self.program, num_rows, length)
        return most_bytes(self, self.num_elements, num_rows, length)

    def state_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of values with which a batch can wait. Captured programs: the most that live at once, until
        a trial has shown what lies between two steps."""
        if not self.is_captured:
            kept = [[self.values[name] for name in names] for names in self.lifetimes.between]
            most = max(_num_bytes(values, num_rows, length) for values in kept)
            return most + self.mask_bytes(num_rows, length)
        seen = self._waiting_bytes.get(length)
        return lived_bytes(self.program, num_rows, length) if seen is None else num_rows * seen

    def begin(self, arrays: Mapping[str, np.ndarray], mask_BS: Optional[np.ndarray], shape: Tuple[int, int]) -> State:
        """Return the state of a batch: those of its inputs and rows that a step reads."""
        read = self.lifetimes.read
        values = {name: self.wrap(np.ascontiguousarray(array)) for name, array in arrays.items() if name in read}
        return State(shape[0], shape[1], values, mask_BS)

    def run(self, state: State, step: Step, weights: Weights) -> None:
        """Run one step. Raises StoreError where a kernel does not give what the program says."""
        inputs = {role: state.values[name] for role, name in step.reads.items()}
        inputs.update((role, self.wrap(array)) for role, array in weights.items())
        inputs.update((role, self._constants[name]) for role, name in step.constants.items())
        results = self.kernels[step.kernel](state, inputs)
        if len(results) != len(step.writes):
            what = f"kernel {step.kernel!r} gives {len(results)} values, not {len(step.writes)}"
            raise StoreError(what, self.store.path, REMEDY)
        for (name, value), result in zip(step.writes.items(), results):
            if self.program.kernels[step.kernel].template != CAPTURED:
                self._require_shape(step.kernel, result, value.shape(state.num_rows, state.length))
            else:
                _require_rows(self, step.kernel, result, value, state)
            state.values[name] = result
        for name in self.lifetimes.ended[id(step)]:
            state.values.pop(name, None)

    def exit_logits(self, state: State, value: str, weights: Weights) -> np.ndarray:
        """Return the logits [B, C] of an exit head."""
        hidden, declared = state.values[value], self.values[value]
        if hidden.ndim != len(declared.axes) or hidden.shape[declared.width_axis] != declared.width:
            what = f"the exit reads {value!r} of the shape {tuple(hidden.shape)}, not {declared.axes}"
            raise StoreError(what, self.store.path, REMEDY)
        inputs = {"hidden": hidden}
        inputs.update((role, self.wrap(array)) for role, array in weights.items())
        (logits,) = self.kernels[EXIT_KERNEL](state, inputs)
        assert self.program.output is not None, "exits stand on classifiers"
        self._require_shape(EXIT_KERNEL, logits, (state.num_rows, self.program.output.num_labels))
        return self.unwrap(logits)

    def logits(self, state: State) -> np.ndarray:
        """Return a copy of the output value. Raises StoreError unless it has a number for each label."""
        output = self.program.output
        assert output is not None, "checked when the store is loaded"
        found = state.values[output.value]
        if output.num_labels:
            self._require_shape(output.value, found, (state.num_rows, output.num_labels))
        return np.array(self.unwrap(found))

    def keep(self, state: State, rows_B: np.ndarray) -> None:
        """Take these rows along the axis `batch`, or in groups of S along `batch*tokens`."""
        for name, held in state.values.items():
            axis = self.values[name].row_axis
            if axis is None or held is None:
                continue
            if self.values[name].axes[axis] == BATCH:
                state.values[name] = self.take(held, rows_B, axis)
            else:
                before, after = held.shape[:axis], held.shape[axis + 1 :]
                grouped = held.reshape((*before, state.num_rows, state.length, *after))
                state.values[name] = self.take(grouped, rows_B, axis).reshape((*before, -1, *after))
        if state.mask_BS is not None:
            state.mask_BS = state.mask_BS[rows_B]
        state.num_rows = len(rows_B)

    def warm_up(self, num_rows: int, length: int) -> None:
        """Run each kernel once, and each captured step, because sizes differ from step to step there."""
        program, ran = self.program, set()
        mask_BS = None
        if program.texts is not None:
            mask_BS = np.ones((num_rows, length), np.int64)
            mask_BS[-1, (length + 1) // 2 :] = 0  # so that kernels use their mask
        shape = (num_rows, length)
        state = self.begin(_blank_inputs(self, shape, mask_BS), mask_BS, shape)
        zeros = _zeros({name: self._tensors[name][1] for step in program.steps() for name in step.weights.values()})
        for stage in program.stages:
            for step in stage.steps:
                if step.kernel in ran and program.kernels[step.kernel].template != CAPTURED:
                    continue
                ran.add(step.kernel)
                for name in set(step.reads.values()) - set(state.values):  # written by steps that are left out
                    value = self.values[name]
                    state.values[name] = self.wrap(np.ones(value.shape(*shape), value.dtype))
                self.run(state, step, {role: zeros[name] for role, name in step.weights.items()})
                if self.is_captured:
                    row_bytes = _row_bytes(self, state)
                    self._waiting_bytes[length] = max(self._waiting_bytes.get(length, 0), row_bytes)
            if stage.exit in state.values and self.exit_form is not None and EXIT_KERNEL not in ran:
                ran.add(EXIT_KERNEL)
                shapes = self.head_shapes(self.values[stage.exit].width)
                zero_head = {role: np.zeros(shape, np.float32) for role, shape in shapes.items()}
                self.exit_logits(state, stage.exit, zero_head)

    def head_shapes(self, width: int) -> Shapes:
        """Return the shapes of the weights of an exit head."""
        assert self.exit_form is not None and self.program.output is not None, "loaded where there are exits"
        return self.exit_form.shapes(width, self.program.output.num_labels)

    def _require_runnable(self, kernels: Iterable[str]) -> None:
        where = self.store.path
        fault = misfit(self.program, {name: (each.dtype, each.shape) for name, (_, each) in self._tensors.items()})
        if fault is not None:
            raise StoreError(fault, where, REMEDY)
        for name in kernels:
            template = self.program.kernels[name].template
            if template not in self.templates:
                what = f"kernel {name!r} is of the template {template!r}, which backend {self.name} does not run"
                raise StoreError(what, where, "run it with --backend ort or torch" if template == CAPTURED else REMEDY)
        for step in self.program.steps():
            for name in (*step.weights.values(), *step.constants.values()):
                dtype = self._tensors[name][1].dtype
                if not DTYPES[dtype].computes:
                    what = f"tensor {name!r} is {dtype}, which kernels do not take"
                    raise StoreError(what, where, "run it with offramp.stream")
            for name, value in step.writes.items():
                if value.dtype not in OF_ARRAYS:
                    what = f"value {name!r} is {value.dtype}, which NumPy does not have"
                    raise StoreError(what, where, "run it with offramp.stream")

    def _require_shape(self, kernel: str, result: Any, wanted: Tuple[int, ...]) -> None:
        if result is not None and tuple(result.shape) != wanted:
            what = f"kernel {kernel!r} gives {tuple(result.shape)}, not {wanted}"
            raise StoreError(what, self.store.path, REMEDY)


def _read_constants(backend: ProgramBackend) -> Dict[str, Any]:
    found, store = {}, backend.store
    for name in {name for step in backend.program.steps() for name in step.constants.values()}:
        shard, tensor = store.manifest.tensors()[name]
        data = np.frombuffer(store.read_tensor(shard.name, tensor), DTYPES[tensor.dtype].numpy)
        found[name] = backend.wrap(data.reshape(tensor.shape))
    return found


def _num_bytes(values: Iterable[Value], num_rows: int, length: int) -> int:
    return sum(math.prod(each.shape(num_rows, length)) * np.dtype(each.dtype).itemsize for each in values)


def is_alone(backend: ProgramBackend) -> bool:
    """Return whether the process has no other backend of this kind."""
    return sum(type(other) is type(backend) for other in _BACKENDS) == 1


def lived_bytes(program: Program, num_rows: int, length: int) -> int:
    """Return the bytes that live at once in a captured program, in proportion to its example."""
    rows, tokens = program.example
    lived = program.activation_bytes * num_rows / max(rows, 1)
    return int(CAPTURED_FACTOR * lived * (length / max(tokens, 1) if program.texts else 1))


def most_bytes(backend: ProgramBackend, elements: Callable[[Kernel, int, int], int], num_rows: int, length: int) -> int:
    """Return the bytes of the kernel that takes most by its number of elements, with the values that live beside it."""
    program, values, beside = backend.program, backend.values, backend.lifetimes.beside
    return max(
        elements(program.kernels[step.kernel], num_rows, length) * np.dtype(value.dtype).itemsize
        + _num_bytes((values[name] for name in beside[id(step)]), num_rows, length)
        for step in program.steps()
        for value in step.writes.values()
    )


def _row_bytes(backend: ProgramBackend, state: State) -> int:
    """Return the bytes of one row of the values of a state, inputs excluded."""
    given = {*backend.program.inputs, *backend.program.lookups}
    made = (value for name, value in state.values.items() if name not in given and value is not None)
    return -(-sum(backend.unwrap(value).nbytes for value in made) // state.num_rows)


class _Kernels(Dict[str, LoadedKernel]):
    """Kernels by name. One that was freed is loaded again when it is used."""

    def __init__(self, backend: ProgramBackend) -> None:
        super().__init__()
        self._backend = weakref.proxy(backend)  # else only the collector of cycles would free a closed backend

    def __missing__(self, name: str) -> LoadedKernel:
        self[name] = self._backend.load(name, self._backend.program.kernels[name])
        return self[name]


def _require_rows(backend: ProgramBackend, kernel: str, result: Any, value: Value, state: State) -> None:
    """Raise StoreError unless a result of a captured kernel has the axes of its value, and a row for each input."""
    shape, axis = result.shape, value.row_axis
    wanted = None if axis is None else value.shape(state.num_rows, state.length)[axis]
    if len(shape) != len(value.axes) or (axis is not None and shape[axis] != wanted):
        what = f"kernel {kernel!r} gives {tuple(shape)} for {state.num_rows} rows, not {value.axes}"
        raise StoreError(what, backend.store.path, REMEDY)


class Lifetimes(NamedTuple):
    """The values of a program that are needed at each place."""

    read: Set[str]
    """Values that a step, an exit or the output reads."""
    ended: Mapping[int, Sequence[str]]
    """Identity of a step (steps hold dicts and cannot be hashed) -> values that nothing needs after it."""
    between: Tuple[Tuple[str, ...], ...]
    """Values made by steps, masks excluded, that are needed where another batch may run: after each stage, and in a
    layer after each step whose kernel does not keep intermediates."""
    beside: Mapping[int, Sequence[str]]
    """Identity of a step -> values made by earlier steps, masks excluded, that live while it runs, and that it does not
    read."""


def lifetimes_of(program: Program) -> Lifetimes:
    """Return the lifetimes of a program's values. The output has no end."""
    steps, bounds = list(program.steps()), []
    made: Dict[str, int] = {}
    last: Dict[str, int] = {}
    read = {name for step in steps for name in step.reads.values()}
    index = 0
    for stage in program.stages:
        for step in stage.steps:
            last.update(dict.fromkeys((*step.writes, *step.reads.values()), index))
            if program.kernels[step.kernel].template != MASK:
                made.update(dict.fromkeys(step.writes, index))
            index += 1
            may_wait = stage.role != BEGIN and not program.kernels[step.kernel].keeps_intermediates
            bounds += [index] if may_wait and step is not stage.steps[-1] else []
        if stage.exit is not None:
            last[stage.exit] = index  # the exit runs before the next step
            read.add(stage.exit)
        bounds.append(index)
    if program.output is not None:
        last[program.output.value] = len(steps)
        read.add(program.output.value)
    ended: Dict[int, List[str]] = {id(step): [] for step in steps}
    for name, index in last.items():
        if index < len(steps):
            ended[id(steps[index])].append(name)
    between: List[List[str]] = [[] for _ in bounds]
    for name, index in made.items():
        for place in range(bisect_right(bounds, index), bisect_right(bounds, last[name])):
            between[place].append(name)
    beside: Dict[int, List[str]] = {id(step): [] for step in steps}
    for name, at in made.items():
        for step in steps[at + 1 : last[name]]:
            if name not in step.reads.values():
                beside[id(step)].append(name)
    return Lifetimes(read, ended, tuple(map(tuple, between)), beside)


def _blank_inputs(backend: Backend, shape: Tuple[int, int], mask_BS: Optional[np.ndarray]) -> Dict[str, np.ndarray]:
    """Return zeros for the inputs of a program, ones for its looked-up rows: pages of zeros would take no memory."""
    program, values = backend.program, backend.program.values()
    backend.prepare(*shape)
    found = {name: np.zeros(values[name].shape(*shape), each.dtype) for name, each in program.inputs.items()}
    if ATTENTION_MASK in found and mask_BS is not None:
        found[ATTENTION_MASK] = mask_BS.astype(found[ATTENTION_MASK].dtype)
    for name, lookup in program.lookups.items():
        sizes = lookup.value.shape(*shape)
        if BATCH_TOKENS not in lookup.value.axes:  # axes are those of the example
            sizes = (*found[lookup.input].shape, sizes[-1])
        dtype = np.dtype(lookup.value.dtype)
        found[name] = backend.allocate(math.prod(sizes) * dtype.itemsize).view(dtype).reshape(sizes)
        found[name].fill(1)
    return found


def _zeros(tensors: Mapping[str, Tensor]) -> Dict[str, np.ndarray]:
    """Return zeros in place of tensors.

    All of them are views of one mapping that is never written, so its pages are the kernel's zero page and take no
    memory.
    """
    zeros = Slot(max((tensor.num_bytes for tensor in tensors.values()), default=0) or 1).array
    return {
        name: zeros[: tensor.num_bytes].view(np.dtype(DTYPES[tensor.dtype].numpy)).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }


def join(state: State, inputs: Mapping[str, Any]) -> Tuple[np.ndarray]:
    """Run a kernel `join`: return a copy of its blocks of outputs, side by side."""
    return (np.concatenate(parts_of(inputs), axis=1),)


def first(state: State, inputs: Mapping[str, Any]) -> Tuple[np.ndarray]:
    """Run a kernel `first`: return a copy of the first token of each row, [B, H]."""
    return (np.array(inputs["hidden"][:: state.length]),)


def lines_of(error: Exception) -> List[str]:
    """Return the lines of the message of a library's error; the name of its type, if it has none."""
    return str(error).splitlines() or [type(error).__name__]
