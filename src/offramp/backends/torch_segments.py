"""Segments on PyTorch: the graphs of a store's stages, run operation by operation. No transformers.

Shapes: B rows, S tokens, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from offramp.backends.torch_graphs import SegmentGraph
from offramp.errors import StoreError
from offramp.program.program import Segment, graph_file
from offramp.runtime.backend import State, Weights
from offramp.runtime.segments import SegmentBackend
from offramp.store import Store


class TorchSegments(SegmentBackend):
    """Runs a store that was divided with `--method export`. Same operations, threads and alignment as the module
    itself: same bits. Sets the number of threads of torch in the whole process, as a pass begins.
    """

    name = "torch"

    def __init__(self, store: Store, num_threads: int) -> None:
        super().__init__(store, num_threads)
        self._where = store.path
        files = {file.file: file for file in store.module.files}
        self._graphs: dict[str, SegmentGraph] = {}
        for kind in {segment.kind for segment in self._segments.stages}:
            name = graph_file(kind)
            if name not in files:
                raise StoreError(f"the store has no {name}", store.path, "divide the model again")
            self._graphs[kind] = SegmentGraph(store.read_file(files[name]), store.path / name)

    def begin(self, rows: Any, mask_BS: np.ndarray, weights: Weights) -> State:
        """The inputs by name."""
        torch.set_num_threads(self.num_threads)  # at every pass: others may have set it since
        return super().begin(rows, mask_BS, weights)

    @torch.inference_mode()
    def compute(self, segment: Segment, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """Run one graph."""
        try:
            return self._graphs[segment.kind](*inputs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if "allocate memory" in str(error):  # what PyTorch says where there is none
                raise MemoryError(str(error)) from error
            said = (str(error).splitlines() or [type(error).__name__])[0][-200:]
            what = f"graph {segment.kind} does not take these inputs: {said}"
            raise StoreError(what, self._where, "divide the model with such an input as its example") from error

    @torch.inference_mode()
    def exit_logits(self, state: State, weights: Weights) -> np.ndarray:
        """As in training, to the bit."""
        weight, bias = (torch.tensor(weights[role]) for role in ("exit.weight", "exit.bias"))
        keep = self.keep_of(state)
        pooled = pool(self.hidden(state), None if keep is None else torch.from_numpy(keep))
        return functional.linear(pooled, weight, bias).numpy()

    def wrap(self, array: np.ndarray) -> Tensor:
        """A view; a copy of what must not be written to, for torch has no read-only tensors."""
        return torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)

    def unwrap(self, value: Tensor) -> np.ndarray:
        """A view."""
        return value.numpy()

    @torch.inference_mode()
    def take(self, value: Tensor, rows_B: np.ndarray, extent: int) -> Tensor:
        """A copy of these rows."""
        return value.index_select(extent, torch.from_numpy(rows_B))


def pool(hidden: Tensor, keep: Tensor | None = None) -> Tensor:
    """[B, H]: the mean of tokens [B, S, H], of those alone where `keep` [B, S, 1] is 1 and not 0, or of the places of a
    feature map [B, H, ...].
    """
    if keep is not None:
        return (hidden * keep).sum(1) / keep.sum(1)
    if hidden.dim() == 3:
        return hidden.mean(1)
    return hidden.flatten(2).mean(2) if hidden.dim() > 3 else hidden
