"""The thing that multiplies, as the loop sees it.

`edge` (ONNX Runtime) and `models` (PyTorch) implement it; tests have one in NumPy.

Weights arrive as arrays that lie in slots: they are valid during the call and not a moment longer.

Shapes: B rows, S tokens of the longest row, T = B S, E embedding width, H hidden, C labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Dict, FrozenSet, Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]
"""role -> float32 array."""


@dataclass
class State:
    """The hidden states of a batch between two steps; `arrays` is the backend's own."""

    num_rows: int
    length: int
    arrays: Dict[str, Any]


class Backend(ABC):
    """One computation a kind. Not thread-safe: the loop is its only caller."""

    name: str
    num_threads: int
    unsettled: FrozenSet[str] = frozenset()
    """Kinds of steps that leave more behind than hidden states; the next step takes it."""

    @abstractmethod
    def rehearse(self, num_rows: int, length: int) -> None:
        """Run every kind once on [B, S] tokens without weights: code, threads and heap are there before the plan."""

    @abstractmethod
    def activation_bytes(self, num_rows: int, length: int) -> int:
        """The most that a pass over [B, S] tokens takes besides weights."""

    @abstractmethod
    def state_bytes(self, num_rows: int, length: int) -> int:
        """What [B, S] tokens take between two steps, but after those that are `unsettled`."""

    @abstractmethod
    def begin(self, rows: Mapping[str, np.ndarray], mask_BS: np.ndarray, weights: Weights) -> State:
        """Gathered embedding rows (role -> [T, E]) to hidden states. `mask_BS` is 1 for a token, 0 for padding."""

    @abstractmethod
    def step(self, state: State, kind: str, weights: Weights) -> None:
        """Run one step of a layer."""

    @abstractmethod
    def exit_logits(self, state: State, weights: Weights) -> np.ndarray:
        """What an exit says: logits [B, C]."""

    @abstractmethod
    def head_logits(self, state: State, weights: Weights) -> np.ndarray:
        """What the model's own head says: logits [B, C]."""

    @abstractmethod
    def keep(self, state: State, mask_B: np.ndarray) -> None:
        """Drop the rows where the mask is false."""

    @abstractmethod
    def close(self) -> None:
        """Free what the backend holds. It may be used again."""
