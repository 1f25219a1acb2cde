"""The ONNX Runtime backend: one session for each kernel, with weights as inputs. No torch, no onnx.

Graphs of templates are derived from their attributes (`onnx_templates`); only captured kernels come from the store.

Shapes: B rows, S tokens of the longest row, T = B S, H hidden, C labels.
"""

from __future__ import annotations

import ctypes
from typing import Any, Callable, Dict, List, Set, Tuple

import numpy as np

from offramp.backends import onnx_templates
from offramp.backends.base import (
    BLOCKS,
    CAPTURED_FACTOR,
    REMEDY,
    LoadedKernel,
    ProgramBackend,
    first,
    is_alone,
    join,
    lived_bytes,
)
from offramp.backends.onnx_session import (
    KernelError,
    StopClock,
    arena_array,
    open_session,
    reserve_arena,
    returns_arena,
    run_session,
    shrink_arena,
)
from offramp.backends.onnx_templates import BUILDERS, UNFUSED, Sizes, graph_of
from offramp.errors import StoreError
from offramp.program.narrow import plain
from offramp.program.program import CAPTURED, Kernel
from offramp.runtime.backend import State
from offramp.store import Store

_MASKED = np.float32(np.finfo(np.float32).min)


class OnnxBackend(ProgramBackend):
    """Runs programs in ONNX Runtime. Raises StoreError for a captured kernel without a graph, MissingExtraError without
    onnxruntime.
    """

    name = "ort"
    templates = ("mask", *BUILDERS, "exit", "pooled-linear", "join", "first", CAPTURED)
    keeps_buffers = True

    def __init__(self, store: Store, num_threads: int, *, trust_kernels: bool = False) -> None:
        self._sessions: Dict[str, Any] = {}
        self._clock = StopClock()
        self._num_operations: Dict[str, int] = {}
        self._example_bytes: Dict[str, int] = {}
        self._reserved_bytes = 0
        self._prepared: Set[Tuple[int, int]] = set()
        super().__init__(store, num_threads, trust_kernels=trust_kernels)
        # Now, so that the session that it takes is in memory when the process is measured.
        self.keeps_rows = bool(self.program.lookups) and returns_arena()
        unknown = sorted(set(store.manifest.graphs) - set(self.kernels))
        if unknown:
            raise StoreError(f"graphs of unknown kernels {unknown}", store.path, REMEDY)

    def load(self, name: str, kernel: Kernel) -> LoadedKernel:
        """Open the session of a kernel; masks and pooled exits of captured programs are computed by NumPy."""
        if kernel.template in _IN_NUMPY:
            return _IN_NUMPY[kernel.template]
        if kernel.template == CAPTURED:
            return self._captured(name)
        graph = graph_of(kernel, self.exit_form)
        try:
            session = self._sessions[name] = open_session(graph, self.num_threads, self.store, name, UNFUSED)
        except StoreError:
            if plain(kernel.template) == kernel.template:
                raise
            raise self._no_integers() from None  # the graph is our own
        return self._run_of(session, name, kernel)

    def _no_integers(self) -> StoreError:
        """Return the error of an ONNX Runtime that does not multiply integers."""
        import onnxruntime

        lacks = f"has no operator {onnx_templates.INTEGER_PRODUCT}, which stores with integer weights take"
        remedy = "run it with --backend numpy, or install a complete onnxruntime from 1.10 on"
        return StoreError(f"ONNX Runtime {onnxruntime.__version__} {lacks}", self.store.path, remedy)

    def _captured(self, name: str) -> LoadedKernel:
        """Return a captured kernel, whose graph comes from the store."""
        graphs, path = self.store.manifest.graphs, self.store.path
        if name not in graphs:
            missing = f"the store has no graph {name!r} for ONNX Runtime"
            what = missing if graphs else "the store has no graphs for ONNX Runtime"
            remedy = "run it with --backend torch, or divide it with onnxscript installed, and read why it has none"
            raise StoreError(what, path, remedy)
        from offramp.backends.onnx_captured import CapturedKernel  # checks that templates need not, 5 ms

        num_loaded = sum(number for other, number in self._num_operations.items() if other != name)
        kernel = CapturedKernel(self, name, self.store.read_file(graphs[name]), self._clock, num_loaded)
        self._sessions[name], self._num_operations[name] = kernel.session, kernel.num_operations
        self._example_bytes[name] = kernel.example_bytes
        return kernel

    def _run_of(self, session: Any, name: str, kernel: Kernel) -> LoadedKernel:
        """Return the call of a session. Inputs of its graph that are not inputs of its template are derived."""
        taken = {node.name for node in session.get_inputs()}
        derived = {name: derive for name, derive in _DERIVED.get(plain(kernel.template), {}).items() if name in taken}

        def run(state: State, inputs: Dict[str, Any]) -> List[np.ndarray]:
            feeds = {name: array for name, array in inputs.items() if name in taken}
            feeds.update((name, derive(kernel.attributes, state, inputs)) for name, derive in derived.items())
            try:
                return run_session(session, None, feeds)
            except KernelError as error:
                raise self.wrong_inputs(name, str(error)) from None

        return run

    def prepare(self, num_rows: int, length: int) -> None:
        """Make the arena one region for the largest batch so far."""
        if (num_rows, length) in self._prepared:
            return
        num_bytes = self.activation_bytes(num_rows, length)
        if self.is_captured:
            num_bytes = self._captured_bytes(num_rows, length)
        if num_bytes > self._reserved_bytes:
            reserve_arena(num_bytes)
            self._reserved_bytes = num_bytes
        self._prepared.add((num_rows, length))

    def _captured_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of values that live at once, as the program says, but no more than its kernels make.

        Without a factor: what does not fit beside others takes regions of its own.
        """
        most, named = max(self._example_bytes.values(), default=0), self.program.activation_bytes
        return int(lived_bytes(self.program, num_rows, length) / CAPTURED_FACTOR * min(1, most / max(named, 1)))

    def allocate(self, num_bytes: int) -> np.ndarray:
        """Return memory of the arena if possible: it is free when rows are gathered, and they end before the first
        layer.
        """
        return arena_array(num_bytes) if num_bytes and self.keeps_rows else super().allocate(num_bytes)

    def set_aside(self, state: State) -> None:
        """Copy values that lie in the arena. What a trial of one batch has taken is then what each batch takes."""
        for name, value in state.values.items():
            if value is not None and not value.flags.owndata:
                state.values[name] = value.copy()

    def num_elements(self, kernel: Kernel, num_rows: int, length: int) -> int:
        """Return the elements of the largest set of buffers that live at once, as ONNX Runtime frees them."""
        tokens, template = num_rows * length, plain(kernel.template)
        sizes: Sizes = kernel.attributes
        if template in BLOCKS:
            return self._block_elements(kernel, tokens, length)
        integers = 0 if template == kernel.template else tokens * (sizes["hidden_size"] // 4 + 4)  # a byte each; scales
        if template == "embedding":  # rows of three tables, their sum, its normalisation
            return 5 * tokens * sizes["embedding_size"]
        if template == "attention":  # scores and their softmax, or the output and its normalisation
            hidden, scores = tokens * sizes["hidden_size"], sizes["num_heads"] * tokens * length
            return integers + 5 * hidden + max(2 * scores, 2 * hidden)
        if template == "up":  # before and after the activation
            return integers + tokens * (sizes["hidden_size"] + 2 * sizes["intermediate_size"])
        if template == "down":  # output, residual, sum, normalisation
            return integers + tokens * (4 * sizes["hidden_size"] + sizes["intermediate_size"])
        return 0  # heads and masks take less than any of these

    def _block_elements(self, kernel: Kernel, tokens: int, length: int) -> int:
        """Return the elements as `num_elements` does, of a template of blocks."""
        sizes: Sizes = kernel.attributes
        template, most = plain(kernel.template), sizes.get("most_outputs", 0)
        inputs = sizes.get("num_inputs", sizes.get("hidden_size", 0))
        integers = 0 if template == kernel.template else tokens * (inputs // 4 + 4)  # a byte each; scales
        if template == "heads":  # as `attention`, for the heads of a block
            block, scores = tokens * most, most // sizes["head_size"] * tokens * length
            return integers + tokens * inputs + 4 * block + max(2 * scores, 2 * block)
        if template == "product":  # before and after the activation
            return integers + tokens * (inputs + 2 * most)
        if template == "join":  # blocks, and what they make
            return 2 * tokens * sizes["width"]
        return 5 * tokens * sizes["hidden_size"]  # `join-norm`: blocks, joined, residual, sum, normalisation

    @property
    def is_measured(self) -> bool:
        """Return whether the arena serves this backend alone."""
        return is_alone(self)

    def mask_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of two float masks: one for attention, one for the mean over tokens."""
        return 2 * num_rows * length * _MASKED.itemsize

    def trim(self) -> None:
        """Shrink the shared arena to the buffers in use."""
        shrink_arena()
        self._reserved_bytes = 0
        self._prepared.clear()

    def close(self) -> None:
        """Shrink the arena and end the sessions with their threads. They open again when they are used."""
        self._clock.close()
        self.trim()
        self.kernels.clear()
        self._sessions.clear()

    def renew(self) -> None:
        """Open the sessions again where they have threads. The old ones would wait for theirs, even to end."""
        if self.num_threads > 1:
            for session in self._sessions.values():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))
            self.kernels.clear()
            self._sessions.clear()


def _mask(state: State, inputs: Dict[str, Any]) -> Tuple[np.ndarray]:
    """Return the mask [B, 1, 1, S] that attention adds to its scores."""
    return (np.where(inputs["mask"][:, None, None, :] > 0, np.float32(0), _MASKED),)


def _pooled_linear(state: State, inputs: Dict[str, Any]) -> Tuple[np.ndarray]:
    """Return logits [B, C]: the mean over tokens [B, S, H] or places [B, H, ...], then a linear layer."""
    hidden = inputs["hidden"]
    if state.mask_BS is not None:
        keep_BS1 = state.keep_BS1()
        hidden = (hidden * keep_BS1).sum(axis=1) / keep_BS1.sum(axis=1)
    elif hidden.ndim == 3:
        hidden = hidden.mean(axis=1)
    elif hidden.ndim > 3:
        hidden = hidden.reshape(*hidden.shape[:2], -1).mean(axis=2)
    return (hidden @ inputs["exit.weight"].T + inputs["exit.bias"],)


_IN_NUMPY: Dict[str, LoadedKernel] = {"mask": _mask, "pooled-linear": _pooled_linear, "join": join, "first": first}


def _attention_shape(sizes: Sizes, state: State, inputs: Dict[str, Any]) -> np.ndarray:
    return np.array([state.num_rows, state.length, sizes["num_heads"], sizes["hidden_size"] // sizes["num_heads"]])


def _hidden_BSH(sizes: Sizes, state: State, inputs: Dict[str, Any]) -> np.ndarray:
    return inputs["hidden"].reshape(state.num_rows, state.length, -1)


def _first_BH(sizes: Sizes, state: State, inputs: Dict[str, Any]) -> np.ndarray:
    return np.ascontiguousarray(_hidden_BSH(sizes, state, inputs)[:, 0])


def _heads_shape(sizes: Sizes, state: State, inputs: Dict[str, Any]) -> np.ndarray:
    head_size = sizes["head_size"]
    return np.array([state.num_rows, state.length, len(inputs["q.bias"]) // head_size, head_size])


def _flat_shape(sizes: Sizes, state: State, inputs: Dict[str, Any]) -> np.ndarray:
    return np.array([state.num_rows * state.length, len(inputs["q.bias"])])


def _joined_TH(sizes: Sizes, state: State, inputs: Dict[str, Any]) -> np.ndarray:
    return join(state, inputs)[0]


_DERIVED: Dict[str, Dict[str, Callable[[Sizes, State, Dict[str, Any]], np.ndarray]]] = {
    "attention": {"shape": _attention_shape},
    "heads": {"shape": _heads_shape, "flat": _flat_shape},
    "join-norm": {"joined": _joined_TH},
    "head": {"first": _first_BH},
    "exit": {"hidden": _hidden_BSH, "first": _first_BH, "keep": lambda sizes, state, inputs: state.keep_BS1()},
}
"""Template -> input of its graph -> function that derives it."""
