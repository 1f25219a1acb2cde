"""A divided module with its exits, as a model whose exits are scored: its steps run with all weights in memory.

Shapes: B rows, S tokens, H width, C labels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from offramp.backends.torch import TorchBackend
from offramp.backends.torch_modules import pool
from offramp.checkpoints.points import widened
from offramp.measure import num_cores
from offramp.policies import parse
from offramp.program.inputs import Batch
from offramp.program.program import TEXT_INPUTS
from offramp.runtime.exits import exit_widths, load_exits
from offramp.runtime.inputs import InputReader
from offramp.store import Store
from offramp.store.reader import tensor_view


class StoredWithExits(nn.Module):
    """The exits of a store. Raises StoreError where its stages are no graphs."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._program, self._inputs = store.program, InputReader(store)
        self._backend = TorchBackend(store, num_cores())
        has_exits = store.manifest.exits is not None
        self._exits = load_exits(store, parse("none"), needs_all=has_exits) if has_exits else {}
        self.heads = range(len(self._exits))
        self._width = max(exit_widths(self._program), default=1)
        self._weights: dict[str, np.ndarray] = {}
        tensors = store.manifest.tensors()
        for name in {name for step in self._program.steps() for name in step.weights.values()}:
            shard, tensor = tensors[name]
            data = np.frombuffer(store.read_tensor(shard.name, tensor), np.uint8)
            self._weights[name] = tensor_view(replace(tensor, offset=0), data)

    def with_hidden(self, **inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits [B, C] of each exit, and the pooled value that it reads, as one token [B, 1, H].

        Narrower values are filled up with zeros. The last exit has no value of its own and repeats the one before.
        """
        batch = self._batch({name: tensor.numpy() for name, tensor in inputs.items()})
        shape, mask_BS = (batch.num_rows, batch.length), self._inputs.mask(batch)
        state = self._backend.begin(self._inputs.read(batch)[0], mask_BS, shape)
        logits, pooled = [], []
        for index, stage in enumerate(self._program.stages):
            for step in stage.steps:
                weights = {role: self._weights[name] for role, name in step.weights.items()}
                self._backend.run(state, step, weights)
            if stage.exit is not None and index in self._exits:
                head = self._exits[index]
                logits.append(torch.from_numpy(self._backend.exit_logits(state, stage.exit, head)))
                keep = None if mask_BS is None else torch.from_numpy(mask_BS[:, :, None].astype(np.float32))
                pooled.append(widened(pool(state.values[stage.exit], keep), self._width)[:, None])
        last = torch.from_numpy(self._backend.logits(state))
        return [*logits, last], [*pooled, pooled[-1]] if pooled else []

    def _batch(self, arrays: dict[str, np.ndarray]) -> Batch:
        """Return the batch of a model's inputs; texts without token types have zeros."""
        program = self._program
        num_rows, length = len(next(iter(arrays.values()))), 1
        if program.texts is not None:
            length = arrays[TEXT_INPUTS[0]].shape[1]
            arrays = {TEXT_INPUTS[2]: np.zeros((num_rows, length), np.int64), **arrays}
        taken = {name: array for name, array in arrays.items() if name in program.inputs or name in TEXT_INPUTS}
        return Batch(taken, num_rows, length, np.full(num_rows, length, np.int64))
