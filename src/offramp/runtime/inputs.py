"""The first values of a pass: the inputs of a program, and the table rows that they look up.

Shapes: B rows, S tokens, T = B S, W width of a table.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterable, Mapping, Optional, Tuple

import numpy as np

from offramp.errors import StoreError
from offramp.program.dtypes import DTYPES, FLOAT, HALF
from offramp.program.inputs import Batch
from offramp.program.program import ATTENTION_MASK, BATCH_TOKENS, INPUT_IDS, POSITION_IDS, TEXT_INPUTS, TOKENS, Input
from offramp.store import Store
from offramp.store.reader import aligned_bytes


def not_finite(arrays: Mapping[str, np.ndarray], rows: Iterable[int]) -> Optional[str]:
    """Return the name and the row of the first input with NaN or infinite numbers in one of these rows, or None."""
    reals = {name: array for name, array in arrays.items() if np.issubdtype(array.dtype, np.floating)}
    bad = ((name, row) for row in rows for name, array in reals.items() if not np.isfinite(array[row]).all())
    name, row = next(bad, (None, 0))
    return None if name is None else f"input {name!r} of row {row + 1} has NaN or infinite numbers"


class InputReader:
    """Checks batches against the inputs of a store's program, and gathers the rows that they look up."""

    def __init__(self, store: Store) -> None:
        self.program, self._store = store.program, store
        tensors = store.manifest.tensors()
        self._tables = {name: tensors[lookup.table] for name, lookup in self.program.lookups.items()}
        items = {name: table.shape[1] for name, (_, table) in self._tables.items()}
        self.row_bytes = {name: DTYPES[FLOAT].item_bytes * width for name, width in items.items()}
        """Look-up -> bytes of one row in memory."""
        halves = (name for name, (_, table) in self._tables.items() if table.dtype == HALF)
        self.copied_bytes = {name: DTYPES[HALF].item_bytes * items[name] for name in halves}
        """Look-up -> bytes of one row in its file, if gathering copies it before it is upcast."""

    def read(
        self, batch: Batch, allocate: Callable[[int], np.ndarray] = aligned_bytes
    ) -> Tuple[Dict[str, np.ndarray], int]:
        """Return the inputs and looked-up rows of a batch by value name, and the bytes read from the store.

        `allocate` returns memory for rows, uint8 [num_bytes], by its size.

        Raises ValueError for inputs of other names, dtypes or ranks than the program takes; StoreError for a token id
        outside the vocabulary, and for a size that the division was not proven with.
        """
        values = self._checked(batch)
        num_bytes = 0
        for name, lookup in self.program.lookups.items():
            shard, table = self._tables[name]
            ids = values[lookup.input]
            how = {"upcasts": True, "allocate": allocate}
            rows_NW, bytes_read = self._store.gather(shard.name, table.role, ids.reshape(-1), **how)
            is_flat = lookup.value.axes[0] == BATCH_TOKENS
            values[name] = rows_NW if is_flat else rows_NW.reshape(*ids.shape, rows_NW.shape[1])
            num_bytes += bytes_read
        return values, num_bytes

    def mask(self, batch: Batch) -> Optional[np.ndarray]:
        """Return the attention mask int64 [B, S] of texts, all ones if the batch has none; None for other inputs."""
        if self.program.texts is None:
            return None
        given = batch.arrays.get(ATTENTION_MASK)
        return np.ones((batch.num_rows, batch.length), np.int64) if given is None else given

    def blank(self, num_rows: int, length: int) -> Optional[Batch]:
        """Return a batch of texts [B, S] whose tokens all have id 0; None if the program looks up nothing by tokens."""
        texts = self.program.texts
        if texts is None or not self.program.lookups:
            return None
        shape = (num_rows, length)
        arrays = {name: np.zeros(shape, np.int64) for name in (*TEXT_INPUTS, *self.program.inputs)}
        arrays[ATTENTION_MASK] = np.ones(shape, np.int64)
        arrays[POSITION_IDS] = np.broadcast_to(np.arange(length) + texts.position_offset, shape)
        return Batch(arrays, num_rows, length, np.full(num_rows, length, np.int64))

    def _checked(self, batch: Batch) -> Dict[str, np.ndarray]:
        program, ignored = self.program, () if self.program.texts is None else (*TEXT_INPUTS, POSITION_IDS)
        arrays = {name: a for name, a in batch.arrays.items() if name in program.inputs or name not in ignored}
        found = {name: (str(array.dtype), array.ndim) for name, array in arrays.items()}
        wanted = {name: (each.dtype, len(each.axes)) for name, each in program.inputs.items()}
        if found != wanted:
            raise ValueError(f"expected inputs {wanted} (dtype, number of axes), got {found}")
        if program.texts is not None:
            most, vocab_size = arrays[INPUT_IDS].max(), program.texts.vocab_size
            if most >= vocab_size:
                what = f"token id {most} in a vocabulary of {vocab_size}"
                raise StoreError(what, self._store.path, "the tokenizer belongs to another model")
        for name, each in program.inputs.items():
            self._require_proven(name, each, arrays[name].shape)
        return {name: arrays[name] for name in program.inputs}

    def _require_proven(self, name: str, each: Input, shape: Tuple[int, ...]) -> None:
        """Raise StoreError for a size that a graph may have been specialised against, or that no plan reckoned with."""
        divided = tuple(self.program.example[1] if axis == TOKENS else axis for axis in each.axes[1:])
        largest = each.largest[1:] or tuple(None if isinstance(axis, int) else axis for axis in each.axes[1:])
        for size, example, limit in zip(shape[1:], divided, largest):
            if limit is None and size != example:
                what = f"and the module was divided for {(self.program.example[0], *divided)}"
                remedy = "divide it with inputs of several such sizes as examples"
            elif self.program.texts is None and isinstance(limit, int) and size > limit:
                what = "which is larger than the examples that the module was divided with"
                remedy = "divide it with an example as large as the largest input"
            else:
                continue
            raise StoreError(f"{name} is {shape}, {what}", self._store.path, remedy)
