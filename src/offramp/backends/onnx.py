"""The ONNX Runtime backend: the graphs of a store, fed with weights that lie in slots.

All sessions share one arena that grows by exactly what is asked: a pass then takes no page fault at all, where malloc
maps and returns each buffer (31,000 faults a pass of BERT-base, twice the latency), and six arenas that double would
take several times the memory. No memory pattern: it keeps a copy for each shape. No spinning: a pool that spins while
the reader copies takes the core that the reader needs.

Shapes: B rows, S tokens of the longest row, T = B S, H hidden, I intermediate, E embedding width, C labels.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, Dict, Mapping

import numpy as np

from offramp.errors import MissingExtraError, StoreError
from offramp.runtime.backend import Backend, State, Weights
from offramp.runtime.slots import Slot
from offramp.store import Store
from offramp.store.exits import exit_shapes, read_exits
from offramp.store.shapes import Shapes, require_fitting, shapes

ARENA_START_BYTES = 256 << 10
_MASKED = np.float32(np.finfo(np.float32).min)
_FLOAT_BYTES = 4
_REMEDY = "offramp divide the model again"


class OrtBackend(Backend):
    """Runs a store's graphs. Raises StoreError where the store has none or they are another model's, MissingExtraError
    without onnxruntime.
    """

    name = "ort"
    unsettled = frozenset({"up"})

    def __init__(self, store: Store, num_threads: int) -> None:
        self.encoder, self.num_threads = store.manifest.encoder, num_threads
        self._shards = store.manifest.shards
        graphs = store.manifest.graphs
        if not graphs:
            raise StoreError(
                "the store has no graphs", store.path, "offramp divide --graphs STORE adds them, or --backend torch"
            )
        require_fitting(store.manifest, store.path)
        self._store_path = store.path
        num_labels = len(self.encoder.labels)
        self._widths = {"up": self.encoder.intermediate_size, "head": num_labels, "exit": num_labels}
        exits = read_exits(store)
        promised = {**shapes(self.encoder), "exit": {} if exits is None else exit_shapes(self.encoder, exits.form)}
        unknown = sorted(set(graphs) - set(promised))
        if unknown:
            raise StoreError(f"graphs of unknown kinds {unknown}", store.path, _REMEDY)
        self._exit_means = exits is not None and exits.form.startswith("mean")
        self._sessions = {
            kind: open_session(store.read_file(graph), num_threads, store, kind) for kind, graph in graphs.items()
        }
        for kind, session in self._sessions.items():
            if _weights(session) != promised[kind]:
                raise StoreError(f"graph {kind!r} takes other weights than the encoder promises", store.path, _REMEDY)

    def rehearse(self, num_rows: int, length: int) -> None:
        """Run each kind on [B, S] tokens, with zeros for weights: read-only zero pages take no memory."""
        encoder, tokens = self.encoder, num_rows * length
        weights = {kind: _zeros(session) for kind, session in self._sessions.items()}
        # Ones, not zeros: what is gathered takes memory.
        rows = {name: np.ones((tokens, encoder.embedding_size), np.float32) for name in ("word", "position", "type")}
        state = self.begin(rows, np.ones((num_rows, length), np.int64), weights["embedding"])
        for kind in ("attention", "up", "down"):
            self.step(state, kind, weights[kind])
        if "exit" in self._sessions:
            self.exit_logits(state, weights["exit"])
        if "head" in self._sessions:
            self.head_logits(state, weights["head"])

    def activation_bytes(self, num_rows: int, length: int) -> int:
        """The largest set of buffers that live at once in any step."""
        encoder, tokens = self.encoder, num_rows * length
        hidden = tokens * encoder.hidden_size * _FLOAT_BYTES
        inner = tokens * encoder.intermediate_size * _FLOAT_BYTES
        scores = num_rows * encoder.num_heads * length * length * _FLOAT_BYTES
        embedding = 5 * tokens * encoder.embedding_size * _FLOAT_BYTES
        return max(embedding, 5 * hidden + max(2 * scores, 2 * hidden), hidden + 2 * inner, 4 * hidden + inner)

    def state_bytes(self, num_rows: int, length: int) -> int:
        """Hidden states, and two masks."""
        return num_rows * length * (self.encoder.hidden_size + 2) * _FLOAT_BYTES

    def begin(self, rows: Mapping[str, np.ndarray], mask_BS: np.ndarray, weights: Weights) -> State:
        """Sum, normalise and project the gathered rows."""
        num_rows, length = mask_BS.shape
        wanted = {node.name for node in self._sessions["embedding"].get_inputs()}
        feeds = {name: row_TE for name, row_TE in rows.items() if name in wanted}
        hidden_TH = self._run("embedding", feeds, weights)
        mask = np.where(mask_BS[:, None, None, :] > 0, np.float32(0), _MASKED)
        return State(
            num_rows, length, {"hidden": hidden_TH, "mask": mask, "keep": mask_BS[:, :, None].astype(np.float32)}
        )

    def step(self, state: State, kind: str, weights: Weights) -> None:
        """One third of a layer."""
        arrays, encoder = state.arrays, self.encoder
        if kind == "attention":
            shape = np.array(
                [state.num_rows, state.length, encoder.num_heads, encoder.hidden_size // encoder.num_heads]
            )
            arrays["hidden"] = self._run(
                kind, {"hidden": arrays["hidden"], "mask": arrays["mask"], "shape": shape}, weights
            )
        elif kind == "up":
            arrays["inner"] = self._run(kind, {"hidden": arrays["hidden"]}, weights)
        else:
            arrays["hidden"] = self._run(kind, {"hidden": arrays["hidden"], "inner": arrays.pop("inner")}, weights)

    def exit_logits(self, state: State, weights: Weights) -> np.ndarray:
        """Logits of an exit head."""
        hidden_BSH = self._hidden_BSH(state)
        if self._exit_means:
            return self._run("exit", {"hidden": hidden_BSH, "keep": state.arrays["keep"]}, weights)
        return self._run("exit", {"first": np.ascontiguousarray(hidden_BSH[:, 0])}, weights)

    def head_logits(self, state: State, weights: Weights) -> np.ndarray:
        """Logits of the model's head."""
        return self._run("head", {"first": np.ascontiguousarray(self._hidden_BSH(state)[:, 0])}, weights)

    def keep(self, state: State, mask_B: np.ndarray) -> None:
        """Gather the rows that stay."""
        arrays = state.arrays
        arrays["hidden"] = self._hidden_BSH(state)[mask_B].reshape(-1, self.encoder.hidden_size)
        arrays["mask"], arrays["keep"] = arrays["mask"][mask_B], arrays["keep"][mask_B]
        state.num_rows = int(mask_B.sum())

    def close(self) -> None:
        """Give back what the shared arena holds that nobody uses."""
        import onnxruntime as ort

        options = ort.RunOptions()
        if not hasattr(options, "add_run_config_entry"):  # before 1.11: the arena stays as it is
            return
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        session = self._sessions["up"]
        hidden_TH = np.zeros((1, self.encoder.hidden_size), np.float32)
        session.run(None, {"hidden": hidden_TH, **_zeros(session)}, options)

    def _hidden_BSH(self, state: State) -> np.ndarray:
        return state.arrays["hidden"].reshape(state.num_rows, state.length, -1)

    def _run(self, kind: str, feeds: Dict[str, np.ndarray], weights: Weights) -> np.ndarray:
        num_rows = len(next(iter(feeds.values()), ()))  # tokens or texts: no kind changes how many there are
        feeds.update(weights)
        try:
            output: Any = self._sessions[kind].run(None, feeds)[0]  # an array: our graphs give nothing else
        except MemoryError:
            raise
        except Exception as error:  # a graph that was checked fails only if it is none of ours
            what = f"graph {kind!r} fails: {_first_line(error)}"
            raise StoreError(what, self._store_path, _REMEDY) from error
        wanted = (num_rows, self._widths.get(kind, self.encoder.hidden_size))
        if np.shape(output) != wanted:
            raise StoreError(f"graph {kind!r} gives {np.shape(output)}, not {wanted}", self._store_path, _REMEDY)
        return output


def open_session(graph: bytes, num_threads: int, store: Store, kind: str) -> Any:
    """A session of ONNX Runtime that shares the arena. Raises StoreError for what is no graph, MissingExtraError."""
    # From 1.29 on ONNX Runtime reports each session to its makers, by a thread, a database and TLS in our budget.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort
    except ImportError:
        raise MissingExtraError("onnxruntime", "edge") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    _share_arena()
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base across versions
        raise StoreError(f"graph {kind!r} does not load: {_first_line(error)}", store.path, _REMEDY) from error


@lru_cache(maxsize=1)
def _share_arena() -> None:
    """Register the arena of this process's sessions, once: it cannot be taken back, only emptied
    (`OrtBackend.close`).
    """
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    no_limit, as_requested, whole_chunks = 0, 1, -1
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(no_limit, as_requested, ARENA_START_BYTES, whole_chunks))


def _zeros(session) -> Dict[str, np.ndarray]:
    """A zero array for each weight. All of them are views of one mapping that is never written, so its pages are the
    kernel's zero page and take no memory.
    """
    weights = _weights(session)
    sizes = {name: int(np.prod(shape)) for name, shape in weights.items()}
    zeros = Slot(max(sizes.values()) * _FLOAT_BYTES).array.view(np.float32)
    return {name: zeros[: sizes[name]].reshape(shape) for name, shape in weights.items()}


def _weights(session) -> Shapes:
    """The inputs that have a fixed shape of floats."""
    return {
        node.name: tuple(node.shape)
        for node in session.get_inputs()
        if node.type == "tensor(float)" and all(isinstance(extent, int) for extent in node.shape)
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
