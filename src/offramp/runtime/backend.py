"""The protocol between the engine and what computes.

A backend is given a store and runs the steps of its program; `offramp.backends` has one file for each implementation.
Weights arrive as arrays that lie in slots: they are valid during the call and not longer.

Shapes: B rows, S tokens of the longest row (1 where inputs have no tokens), C labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Dict, Mapping, Optional, Tuple

import numpy as np

from offramp.program.program import Program, Step
from offramp.store.reader import aligned_bytes

Weights = Mapping[str, np.ndarray]
"""Input of a kernel -> array of the tensor's dtype and shape."""


class StoppedError(Exception):
    """A kernel was stopped at the deadline of its request. Its results are lost."""


@dataclass
class State:
    """The values of a batch between two steps."""

    num_rows: int
    length: int
    values: Dict[str, Any]
    """Live values by name; their type is the backend's own."""
    mask_BS: Optional[np.ndarray] = None
    """int64 [B, S] of texts: 1 for a token, 0 for padding. None for inputs without tokens."""
    allowance: Any = None
    """The rest of the limits of the pass, for backends that run captured kernels."""
    latest: Optional[float] = None
    """Time of `time.perf_counter` at which captured kernels stop, by StoppedError; None: there is no other answer."""
    free_work: int = 0
    """Multiply-adds of captured kernels so far for which their inputs do not account."""
    made_bytes: int = 0
    """Bytes of all results of captured kernels so far."""

    def keep_BS1(self) -> np.ndarray:
        """Return the mask of texts as float32 [B, S, 1]."""
        assert self.mask_BS is not None, "state of texts"
        return self.mask_BS[:, :, None].astype(np.float32)


class Backend(ABC):
    """Runs the kernels of one program. Not thread-safe: the engine is its only caller."""

    name: str
    num_threads: int
    program: Program
    keeps_buffers = False
    """True if the library keeps the memory of activations when a pass ends, and takes no more in the next one."""
    keeps_rows = False
    """True if `allocate` takes the memory of activations, which the library keeps."""
    is_measured = False
    """True if the growth of the process in a trial is all that the library keeps of a pass. Otherwise it may take more
    later, or reuse what it keeps of another backend."""

    @abstractmethod
    def warm_up(self, num_rows: int, length: int) -> None:
        """Run every kernel once on [B, S] tokens with zeros for weights, so that code, threads and heap are in memory
        before the plan is made."""

    @abstractmethod
    def activation_bytes(self, num_rows: int, length: int) -> int:
        """Return the most bytes that one pass takes besides weights, for [B, S] tokens."""

    def value_bytes(self, num_rows: int, length: int) -> int:
        """Return the part of `activation_bytes` that values take, without buffers that a trial shows."""
        return self.activation_bytes(num_rows, length)

    def returned_bytes(self, num_rows: int, length: int) -> int:
        """Return the part of `activation_bytes` that is returned to the system while a pass runs."""
        return 0

    def trial_bytes(self, num_rows: int, length: int) -> Optional[int]:
        """Return the most bytes that a trial of [B, S] tokens has taken, or None where that is not known."""
        return None

    @abstractmethod
    def state_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes that the values of [B, S] tokens take between two steps, except after kernels that keep
        intermediates."""

    def prepare(self, num_rows: int, length: int) -> None:  # noqa: B027
        """Provide memory for a batch of [B, S] tokens, before its rows are gathered."""

    def allocate(self, num_bytes: int) -> np.ndarray:
        """Return memory for gathered rows, uint8 [num_bytes], aligned as tensors are."""
        return aligned_bytes(num_bytes)

    @abstractmethod
    def begin(self, arrays: Mapping[str, np.ndarray], mask_BS: Optional[np.ndarray], shape: Tuple[int, int]) -> State:
        """Return the state of a batch of `shape` (B, S) from its inputs and looked-up rows, by value name."""

    @abstractmethod
    def run(self, state: State, step: Step, weights: Weights) -> None:
        """Run one step: read its values from `state`, add what it writes, drop what no later step or exit reads.

        Raises StoppedError at `state.latest`.
        """

    def set_aside(self, state: State) -> None:  # noqa: B027
        """Move the values of a batch, which waits for others of its sweep, out of memory that kernels use.

        A library that cuts its values from one region would find it divided by those that wait.
        """

    @abstractmethod
    def exit_logits(self, state: State, value: str, weights: Weights) -> np.ndarray:
        """Return the logits [B, C] of an exit head that reads `value`."""

    @abstractmethod
    def logits(self, state: State) -> np.ndarray:
        """Return the output value of the program: logits [B, C]."""

    @abstractmethod
    def keep(self, state: State, rows_B: np.ndarray) -> None:
        """Drop all rows but these places, in ascending order, from every value."""

    def trim(self) -> None:  # noqa: B027
        """Return memory that only larger inputs than the coming ones needed."""

    def renew(self) -> None:  # noqa: B027
        """Resume in the child of a fork, where the threads of the library are gone."""

    @abstractmethod
    def close(self) -> None:
        """Free what the backend holds, and end its threads. It may be used again."""
