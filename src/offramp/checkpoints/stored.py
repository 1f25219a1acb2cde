"""A divided module with its exits, as a model whose exits are scored: the graphs of its stages, with all their weights
in memory.

Shapes: B rows, H width, C labels; K exits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offramp.backends.torch_segments import TorchSegments, pool
from offramp.checkpoints.points import MASK, widened
from offramp.measure import num_cores
from offramp.policies import parse
from offramp.program.program import TEXT_INPUTS
from offramp.runtime.course import Arrays, Tokens, course_of
from offramp.runtime.exits import load_exits
from offramp.runtime.segments import exit_widths
from offramp.store import Store
from offramp.store.reader import tensor_view


class StoredWithExits(nn.Module):
    """What a store answers at each exit. Raises StoreError where its stages are no graphs."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._backend, self._course = TorchSegments(store, num_cores()), course_of(store)
        self._taken = list(store.module.program.inputs)
        has_exits = store.contents.exits is not None
        self._exits = load_exits(store, self._course, parse("none"), needs_all=has_exits) if has_exits else {}
        self.heads = range(len(self._exits))
        self._width = max(exit_widths(store.module.program), default=1)
        self._weights: dict[str, np.ndarray] = {}
        for name in {shard for layer in self._course.layers for step in layer.steps for shard in step.shards}:
            for tensor in store.contents.shards[name].tensors:
                data = np.frombuffer(store.read_tensor(name, tensor), np.uint8)
                self._weights[tensor.name] = tensor_view(replace(tensor, offset=0), data)

    def with_hidden(self, **inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits [B, C] of each exit, and what it stands on as one token [B, 1, H]; the last has nothing of its own."""
        arrays = {name: tensor.numpy() for name, tensor in inputs.items() if name in self._taken or name == MASK}
        of_texts = self._course.texts is not None
        batch = self._tokens(arrays) if of_texts else Arrays({name: arrays[name] for name in self._taken})
        rows, _ = self._course.read(batch)
        state = self._backend.begin(rows, batch.mask_BS, {})
        logits, pooled = [], []
        for number, layer in enumerate(self._course.layers, 1):
            for step in layer.steps:
                self._backend.step(state, step.kind, self._weights)
            if number in self._exits:
                logits.append(torch.from_numpy(self._backend.exit_logits(state, self._exits[number])))
                keep = self._backend.keep_of(state)
                found = pool(self._backend.hidden(state), None if keep is None else torch.from_numpy(keep))
                pooled.append(widened(found, self._width)[:, None])
        last = torch.from_numpy(self._backend.head_logits(state, {}))
        return [*logits, last], [*pooled, pooled[-1]] if pooled else []

    def _tokens(self, arrays: dict[str, Any]) -> Tokens:
        ids_BS = arrays[TEXT_INPUTS[0]]
        return Tokens(ids_BS, arrays[MASK], arrays.get(TEXT_INPUTS[2], np.zeros_like(ids_BS)))
