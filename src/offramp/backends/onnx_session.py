"""Sessions of ONNX Runtime: their options, the arena that they share, and runs that stop at a deadline.

All sessions share one arena that grows by exactly what is requested. A pass then takes no page fault: malloc would map
and return each buffer (31,000 faults a pass of BERT-base, twice the latency), and one doubling arena for each session
would take several times the memory. Memory patterns are off because each keeps a copy for each shape. Spinning is off
because a spinning pool takes the core that the reader needs. The log is off because it prints names from graphs as they
are, line breaks included.
"""

from __future__ import annotations

import os
import threading
import time
from functools import lru_cache
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from offramp.backends.base import REMEDY, lines_of
from offramp.backends.onnx_writer import Graph
from offramp.errors import BudgetError, StoreError, import_error, is_out_of_memory
from offramp.forks import Forked
from offramp.runtime.backend import StoppedError
from offramp.runtime.ledger import LEDGER, system_limit
from offramp.store import Store
from offramp.store.files import notice

ARENA_START_BYTES = 256 << 10
ARENA_ROOM_BYTES = 64 << 20
"""Room in the arena for free regions of sizes that no longer occur, over the budget of a process."""
LEAST_ARENA_BYTES = 256 << 20
"""Smallest limit of the arena: a plan for a budget that is too small is measured, to name one that works."""
_NO_LOG = 4
"""Severity from which ONNX Runtime logs: only what ends the process."""
_SHRINKING = ("memory.enable_memory_arena_shrinkage", "cpu:0")
_FULL = "Available memory of"
"""Part of the error of an arena that has reached its limit."""
_STOPPED = "terminate flag"


class KernelError(Exception):
    """ONNX Runtime does not run a kernel; the text is the last line of its message."""


def open_session(graph: bytes, num_threads: int, store: Store, name: str, disabled: Sequence[str] = ()) -> Any:
    """Return a session of ONNX Runtime that shares the arena.

    Args:
        disabled: optimisers of graphs that are not run.

    Raises StoreError for bytes that are not a graph, MissingExtraError without onnxruntime.
    """
    # From 1.29 on ONNX Runtime reports each session to its makers, by a thread, a database and TLS in our budget.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise import_error(error, "onnxruntime", "edge") from None
    _share_arena()
    try:
        return _session(graph, num_threads, disabled)
    except Exception as error:  # onnxruntime's exceptions have no common base across versions
        if is_out_of_memory(error):
            raise
        # Without the cause, which quotes names from the graph, and would be printed as it is.
        raise StoreError(f"graph {name!r} does not load: {lines_of(error)[0]}", store.path, REMEDY) from None


def _session(graph: bytes, num_threads: int, disabled: Sequence[str]) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.enable_mem_pattern = False
    options.log_severity_level = _NO_LOG
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.use_env_allocators", "1")
    more: Dict[str, Any] = {"disabled_optimizers": list(disabled)} if disabled else {}
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"], **more)


def run_session(session: Any, names: Any, feeds: Dict[str, np.ndarray], options: Optional[Any] = None) -> List[Any]:
    """Return the results of a session that have these names; None: all.

    Where the arena is full, the regions that no value uses are freed first.

    Raises StoppedError where `options` were told to stop, BudgetError where the arena is full of values, KernelError.
    """
    try:
        return session.run(names, feeds, options)
    except Exception as error:  # onnxruntime's exceptions have no common base across versions
        if _FULL not in str(error):
            raise _failure(error) from None
    shrink_arena()
    try:
        return session.run(names, feeds, options)
    except Exception as error:  # as above
        raise _failure(error) from None


def _failure(error: Exception) -> Exception:
    """Return the error of a run. Its cause is left out: it quotes names from the graph as they are."""
    if _STOPPED in str(error):
        return StoppedError()
    if _FULL in str(error):
        what = "the values of a kernel take more memory than this process may use for them"
        return BudgetError(what, None, "use smaller batches or shorter inputs, or a larger --budget")
    return error if is_out_of_memory(error) else KernelError(lines_of(error)[-1])


@lru_cache(maxsize=2)
def _arena_session(returns: bool = False) -> Any:
    """Return a session that fills an array of n numbers in the arena.

    `returns`: they are its result; otherwise that is empty, and takes nothing of the arena.
    """
    g = Graph("arena")
    numbers, none = g.op("ConstantOfShape", g.input("n", 1, dtype=np.int64)), g.constant([0], np.int64)
    model = g.finish(numbers, "n") if returns else g.finish(g.op("Slice", numbers, none, none), 0)
    return _session(model, 1, ())


def shrink_arena() -> None:
    """Return the free regions of the arena to the system, where ONNX Runtime can."""
    import onnxruntime as ort

    options = ort.RunOptions()
    if hasattr(options, "add_run_config_entry"):  # from 1.11 on
        options.add_run_config_entry(*_SHRINKING)
        _arena_session().run(None, {"n": np.zeros(1, np.int64)}, options)


def reserve_arena(num_bytes: int) -> None:
    """Replace the free regions of the arena by one from which values of `num_bytes` together are cut.

    An arena that grows by what is requested has a region for each buffer, and values that are larger than the free ones
    take more, whatever is free beside them.

    Raises BudgetError where the arena may not grow as far.
    """
    shrink_arena()
    run_session(_arena_session(), None, {"n": np.array([num_bytes // np.dtype(np.float32).itemsize], np.int64)})


def arena_array(num_bytes: int) -> np.ndarray:
    """Return memory of the arena, uint8 [num_bytes], which is free again when the last view of it is.

    Versions of ONNX Runtime that copy results return other memory; see `returns_arena`.
    """
    count = -(-num_bytes // np.dtype(np.float32).itemsize)
    (numbers,) = run_session(_arena_session(returns=True), None, {"n": np.array([count], np.int64)})
    return numbers.view(np.uint8)[:num_bytes]


@lru_cache(maxsize=1)
def returns_arena() -> bool:
    """Return whether results of sessions are views of the arena, not copies."""
    return not _arena_session(returns=True).run(None, {"n": np.array([1], np.int64)})[0].flags.owndata


def arena_bytes() -> int:
    """Return the limit of the arena: more than any plan of this process gives to the values of kernels.

    It is set once. A process that serves one budget has that budget, and room for regions of other sizes, which the
    arena keeps until it is shrunk.
    """
    budget = LEDGER.process_bytes
    return system_limit().num_bytes if budget is None else max(budget + ARENA_ROOM_BYTES, LEAST_ARENA_BYTES)


@lru_cache(maxsize=1)
def _share_arena() -> None:
    """Register the arena of this process's sessions, once: it can be shrunk, not removed."""
    import onnxruntime as ort

    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    can_shrink = hasattr(ort.RunOptions, "add_run_config_entry")  # from 1.11 on; else regions may not be limited
    limit, as_requested, whole_chunks = arena_bytes() if can_shrink else 0, 1, -1
    arena = ort.OrtArenaCfg(limit, as_requested, ARENA_START_BYTES, whole_chunks)
    try:
        ort.create_and_register_allocator(memory, arena)
    except Exception as error:  # onnxruntime's exceptions have no common base across versions
        if "already" not in str(error):
            raise
        notice("another library of this process has registered an arena of ONNX Runtime: its growth is not planned")


class StopClock(Forked):
    """Stops runs whose time is over, from a thread that sleeps until then and ends.

    A run stops between two operations, so that the work of each is limited too (`onnx_checks`).
    """

    def __init__(self) -> None:
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._latest = 0.0
        self._options: Any = None
        self._thread: Optional[threading.Thread] = None
        self.survive_forks()

    def after_fork(self) -> None:
        """Forget the thread, and replace its locks."""
        self._lock, self._closed, self._thread = threading.Lock(), threading.Event(), None

    def options(self, latest: float) -> Any:
        """Return options of runs that stop at `latest`, a time of `time.perf_counter`."""
        if latest != self._latest:
            import onnxruntime as ort

            options = ort.RunOptions()
            options.log_severity_level = _NO_LOG
            with self._lock:
                self._latest, self._options = latest, options
                if self._thread is None:
                    self._closed.clear()
                    self._thread = threading.Thread(target=self._watch, daemon=True, name="offramp-deadline")
                    self._thread.start()
        return self._options

    def close(self) -> None:
        """End the thread."""
        thread = self._thread
        self._closed.set()
        if thread is not None:
            thread.join()

    def _watch(self) -> None:
        while True:
            with self._lock:
                left = self._latest - time.perf_counter()
                if left <= 0 or self._closed.is_set():
                    self._options.terminate = True
                    self._thread = None
                    return
            self._closed.wait(left)
