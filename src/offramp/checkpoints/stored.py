"""A captured program with its exits as a model whose exits are scored, with all weights in memory.

Shapes: B rows, H width, C labels; K exits.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from offramp.backends.torch import TorchBackend
from offramp.backends.torch_modules import pool
from offramp.checkpoints.points import MASK, widened
from offramp.measure import num_cores
from offramp.policies import parse
from offramp.program.inputs import Batch
from offramp.program.program import Step
from offramp.runtime.exits import exit_widths, load_exits
from offramp.runtime.inputs import InputReader
from offramp.store import Store
from offramp.store.reader import tensor_view


class StoredWithExits(nn.Module):
    """The answers of a store at each exit. Raises StoreError where its stages are not graphs."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._backend, self._inputs, self._program = TorchBackend(store, num_cores()), InputReader(store), store.program
        has_exits = store.manifest.exits is not None
        self._exits = load_exits(store, parse("none"), needs_all=has_exits) if has_exits else {}
        self.heads = range(len(self._exits))
        self._width = max(exit_widths(store.program), default=1)
        self._weights = {name: _read(store, name) for step in self._program.steps() for name in step.weights.values()}

    def with_hidden(self, **inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits [B, C] of each exit, and what each exit reads as one token [B, 1, H].

        The last exit reads no hidden state of its own; the entry before it is repeated.
        """
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        arrays = {name: array for name, array in arrays.items() if name in self._program.inputs or name == MASK}
        first = next(iter(arrays.values()))
        num_rows, length = len(first), first.shape[1] if self._program.texts is not None else 1
        batch = Batch(arrays, num_rows, length, np.full(num_rows, length))
        mask_BS = self._inputs.mask(batch)
        state = self._backend.begin(self._inputs.read(batch)[0], mask_BS, (num_rows, length))
        keep = None if mask_BS is None else torch.from_numpy(mask_BS[:, :, None].astype(np.float32))
        logits, pooled = [], []
        for stage in self._program.stages:
            for step in stage.steps:
                self._backend.run(state, step, self._of(step))
            if stage.exit is not None and self._exits:
                number = len(logits) + 1
                logits.append(torch.from_numpy(self._backend.exit_logits(state, stage.exit, self._exits[number])))
                pooled.append(widened(pool(state.values[stage.exit], keep), self._width)[:, None])
        last = torch.from_numpy(self._backend.logits(state))
        return [*logits, last], [*pooled, pooled[-1]] if pooled else []

    def _of(self, step: Step) -> dict[str, np.ndarray]:
        return {role: self._weights[name] for role, name in step.weights.items()}


def _read(store: Store, name: str) -> np.ndarray:
    shard, tensor = store.manifest.tensors()[name]
    data = np.frombuffer(store.read_tensor(shard.name, tensor), np.uint8)
    return tensor_view(replace(tensor, offset=0), data)
