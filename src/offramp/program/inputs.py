"""The protocol between whatever encodes inputs (texts, images, arrays) and the engine that runs a program on them.

The rooms below `tasks` know encoders only through this protocol.

Shapes: B rows of a batch, S tokens of its longest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Iterable, Iterator, Mapping, Protocol, Sequence

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Batch:
    """Encoded inputs: one array for each input of a program, with one row for each item that was encoded."""

    arrays: Mapping[str, np.ndarray]
    """Input name -> array whose first axis has `num_rows` entries. A program may read only some of the inputs."""
    num_rows: int
    length: int
    """Tokens of the longest row, padding included (S); 1 where inputs have no length, such as images."""
    lengths_B: np.ndarray
    """Tokens of each row, without padding; 1 where inputs have no length. int64."""


class InputEncoder(Protocol):
    """Encoder of the inputs of one model."""

    @property
    def max_length(self) -> int:
        """Largest `Batch.length` that `encode` returns, in tokens; 1 where inputs have no length."""
        ...

    @property
    def sample(self) -> Sequence[Any]:
        """Inputs that the engine encodes to warm up the process before it measures its memory."""
        ...

    def encode(self, inputs: Sequence[Any]) -> Batch:
        """Encode inputs, in order. Raises UsageError for an input of the wrong kind."""
        ...

    def lengths(self, inputs: Iterable[Any]) -> Iterator[int]:
        """Yield the length in tokens of each input as it would be encoded alone; 1 where inputs have no length."""
        ...

    def encoding_bytes(self, inputs: Iterable[Any]) -> int:
        """Return the most temporary memory in bytes that encoding any one of these inputs takes; 0 if negligible."""
        ...
