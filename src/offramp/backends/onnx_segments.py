"""Segments on ONNX Runtime: a session a kind, weights as inputs. No torch.

Shapes: B rows.
"""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from offramp.backends.onnx import open_session
from offramp.errors import StoreError
from offramp.program.program import Segment
from offramp.runtime.segments import SegmentBackend
from offramp.store import Store


class OrtSegments(SegmentBackend):
    """Runs the graphs of a store that was divided with `--method export`. Raises StoreError where it has none."""

    name = "ort"

    def __init__(self, store: Store, num_threads: int) -> None:
        super().__init__(store, num_threads)
        self._where = store.path
        missing = {segment.kind for segment in self._segments.stages} - set(store.module.graphs)
        if missing:
            raise StoreError(
                "the store has no graphs", store.path, "divide it with onnxscript installed, or --backend torch"
            )
        self._sessions = {
            kind: open_session(store.read_file(graph), num_threads, store, kind)
            for kind, graph in store.module.graphs.items()
        }
        self._taken = {kind: {each.name for each in session.get_inputs()} for kind, session in self._sessions.items()}

    def compute(self, segment: Segment, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run one session. Inputs are called r0, r1, ..., w0, ..., c0, ...; a graph may use fewer."""
        groups = (("r", segment.reads), ("w", segment.weights), ("c", segment.constants))
        names = [f"{letter}{index}" for letter, group in groups for index in range(len(group))]
        taken = self._taken[segment.kind]
        feeds = {name: array for name, array in zip(names, inputs) if name in taken}
        try:
            return self._sessions[segment.kind].run(None, feeds)
        except MemoryError:
            raise
        except Exception as error:  # a graph that was checked fails only for inputs of another kind than divided with
            what = f"graph {segment.kind} does not take these inputs: {str(error).splitlines()[0][-200:]}"
            raise StoreError(what, self._where, "divide the model with such an input as its example") from error

    def wrap(self, array: np.ndarray) -> np.ndarray:
        """Arrays are what it takes."""
        return array

    def unwrap(self, value: np.ndarray) -> np.ndarray:
        """Arrays are what it gives."""
        return value

    def take(self, value: np.ndarray, rows_B: np.ndarray, extent: int) -> np.ndarray:
        """A copy of these rows."""
        return np.take(value, rows_B, axis=extent)
