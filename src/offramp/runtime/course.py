"""What a pass over a store consists of: how a batch begins, which layers follow, and what the answer means.

An encoder of texts begins with rows of its embedding tables, gathered for the tokens that come; a divided module begins
with its inputs as they are.

Shapes: B rows, S tokens, T = B S, E embedding width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Mapping, Optional, Tuple, Union

import numpy as np

from offramp.errors import StoreError
from offramp.program.program import TEXT_INPUTS, LookUp, Texts, Value
from offramp.runtime.segments import layers_of, segments_of
from offramp.store import Encoder, Stage, Store
from offramp.store.manifest import Manifest

TOKEN_BYTES = 4 * 8
"""Of the inputs of a batch: id, mask and type of each token, and as much again as one of them for what is around."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Texts: int64 [B, S], padded on the right; the mask is 1 where there is a token."""

    ids_BS: np.ndarray
    mask_BS: np.ndarray
    types_BS: np.ndarray

    @property
    def lengths_B(self) -> np.ndarray:
        """Tokens of each text."""
        return np.asarray(self.mask_BS).sum(axis=1)

    @property
    def shape(self) -> Tuple[int, int]:
        """Rows, and tokens of the longest."""
        return self.ids_BS.shape[0], self.ids_BS.shape[1]


@dataclass(frozen=True, eq=False)
class Arrays:
    """What a module is called with, by argument; the first extent of each counts rows."""

    arrays: Mapping[str, np.ndarray]

    @property
    def lengths_B(self) -> np.ndarray:
        """All alike."""
        return np.ones(self.shape[0], np.int64)

    @property
    def mask_BS(self) -> np.ndarray:
        """One place a row."""
        return np.ones(self.shape, np.int64)

    @property
    def shape(self) -> Tuple[int, int]:
        """Rows, and 1."""
        return len(next(iter(self.arrays.values()))), 1


Batch = Union[Tokens, Arrays]


class Course(ABC):
    """The stages of a pass, in order: `first`, the `layers` that an exit may follow, and perhaps a `head`."""

    first: Stage
    layers: Tuple[Stage, ...]
    head: Optional[Stage]
    problem: Optional[str]
    labels: Tuple[str, ...]
    texts: Union[Encoder, Texts, None]
    """What is asked of texts; None: the batches are `Arrays`."""

    @abstractmethod
    def is_gathered(self, shard: str) -> bool:
        """Whether rows of a shard are read, and never the whole."""

    @abstractmethod
    def read(self, batch: Batch) -> Tuple[Mapping[str, np.ndarray], int]:
        """What a backend begins a batch with, and the bytes that were read for it."""

    @abstractmethod
    def blank(self, num_rows: int, length: int) -> Optional[Batch]:
        """A batch to rehearse reading with, if there is anything to read."""

    @abstractmethod
    def input_bytes(self, num_rows: int, length: int) -> int:
        """What a batch is kept as until its sweep is through, beside the backend's states."""

    @abstractmethod
    def gathered_bytes(self, num_rows: int, length: int) -> int:
        """What a batch takes before it is in the backend's hands, beside what one row took in rehearsal."""


class TextCourse(Course):
    """Of an encoder of texts."""

    def __init__(self, store: Store) -> None:
        manifest = store.manifest
        self._store, self._encoder = store, manifest.encoder
        self.first = next(stage for stage in manifest.stages if stage.role == "embedding")
        self.layers = manifest.layers
        self.head = next((stage for stage in manifest.stages if stage.role == "head"), None)
        self.problem, self.labels = manifest.encoder.problem, manifest.encoder.labels
        self.texts = self._encoder
        self._table = next(name for step in self.first.steps for name in step.shards if self.is_gathered(name))

    def is_gathered(self, shard: str) -> bool:
        """The tables of embeddings are."""
        return self._store.contents.shards[shard].blocks is not None

    def read(self, batch: Batch) -> Tuple[Mapping[str, np.ndarray], int]:
        """Embedding rows of each token, role -> [T, E]. Raises StoreError for a token that the model does not know."""
        assert isinstance(batch, Tokens)
        encoder, ids_BS = self._encoder, batch.ids_BS
        _require_known(ids_BS, encoder, self._store)
        wanted = {"word": ids_BS.reshape(-1), "position": _positions(ids_BS, encoder).reshape(-1)}
        if encoder.num_token_types:
            wanted["type"] = batch.types_BS.reshape(-1)
        rows: Dict[str, np.ndarray] = {}
        num_bytes = 0
        for role, indices in wanted.items():
            rows[role], read = self._store.gather(self._table, role, indices)
            num_bytes += read
        return rows, num_bytes

    def blank(self, num_rows: int, length: int) -> Batch:
        """The first token, everywhere."""
        ids_BS = np.zeros((num_rows, length), np.int64)
        return Tokens(ids_BS, np.ones_like(ids_BS), ids_BS)

    def input_bytes(self, num_rows: int, length: int) -> int:
        """Of each token."""
        return TOKEN_BYTES * num_rows * length

    def gathered_bytes(self, num_rows: int, length: int) -> int:
        """A table of the rows that differ, and three arrays; those of one row of tokens find room in the headroom."""
        return 4 * (num_rows - 1) * length * self._encoder.embedding_size * 4


class ModuleCourse(Course):
    """Of a divided module whose stages are graphs."""

    def __init__(self, store: Store) -> None:
        program = store.module.program
        self.first, self.layers, self.head = (
            Stage("inputs", "embedding", ()),
            layers_of(store),
            Stage("answer", "head", ()),
        )
        self.problem, self.labels, self.texts = program.problem, program.labels, program.texts
        self._inputs, self._store = program.inputs, store
        try:
            self._moving = _moving(program.inputs, (store.module.proof or {}).get("examples", ()))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            what = f"the proof of the division cannot be read ({type(error).__name__})"
            raise StoreError(what, store.path, "divide the model again") from None
        self._row_bytes = sum(_row_bytes(value) for value in program.inputs.values())
        self._look_ups = _homes_of_look_ups(store)
        needed = {name for layer in self.layers for step in layer.steps for name in step.shards}
        self._gathered = {shard for shard, _ in self._look_ups.values()} - needed

    def is_gathered(self, shard: str) -> bool:
        """Tables of which nothing but rows of the inputs' ids are looked up."""
        return shard in self._gathered

    def read(self, batch: Batch) -> Tuple[Mapping[str, np.ndarray], int]:
        """The inputs as they are, and the rows that are looked up by them.

        Raises ValueError for others than the module was divided with, StoreError for an extent in which the examples
        that the division was proven with do not differ: a graph may have been made for it.
        """
        arrays = self._by_name(batch)
        found = {name: (str(array.dtype), array.ndim) for name, array in arrays.items()}
        wanted = {name: (value.dtype, len(value.shape)) for name, value in self._inputs.items()}
        if found != wanted:
            raise ValueError(f"expected inputs {wanted} (dtype, extents), got {found}")
        for name, value in self._inputs.items():
            shape = arrays[name].shape
            moving = self._moving[name]
            fixed = [i for i in range(1, len(shape)) if i not in moving and shape[i] != value.shape[i]]
            if fixed:
                what = f"{name} is {shape}, and the module was divided for {value.shape}"
                raise StoreError(what, self._store.path, "divide it with inputs of several such sizes as examples")
            if self.texts is None and any(shape[i] > most for i, most in moving.items() if i):  # not planned for
                what = f"{name} is {shape}, which is larger than the examples that the module was divided with"
                raise StoreError(what, self._store.path, "divide it with an example as large as what will come")
        values, num_bytes = dict(arrays), 0
        for name, (shard, look_up) in self._look_ups.items():
            ids = arrays[look_up.input]
            rows_NE, read = self._store.gather(shard, "rows", ids.reshape(-1))
            values[name] = rows_NE.reshape(*ids.shape, rows_NE.shape[1])
            num_bytes += read
        return values, num_bytes

    def blank(self, num_rows: int, length: int) -> Optional[Batch]:
        """The first token everywhere, of texts; of others nothing is read."""
        if self.texts is None or not self._look_ups:
            return None
        ids_BS = np.zeros((num_rows, length), np.int64)
        return Tokens(ids_BS, np.ones_like(ids_BS), ids_BS)

    def input_bytes(self, num_rows: int, length: int) -> int:
        """The inputs, and the rows that are looked up by them, which the first stages read."""
        if self.texts is None:
            return self.gathered_bytes(num_rows, length)
        looked_up = sum(self._row_size(shard) for shard, _ in self._look_ups.values())
        return num_rows * length * (TOKEN_BYTES + looked_up)

    def gathered_bytes(self, num_rows: int, length: int) -> int:
        """The inputs themselves, which no rehearsal fills; of texts the rows that are looked up, as of an encoder."""
        if self.texts is None:
            each = (
                int(np.prod(self._inputs[found.input].shape[1:], dtype=np.int64)) * self._row_size(shard)
                for shard, found in self._look_ups.values()
            )
            return num_rows * (self._row_bytes + 4 * sum(each))
        return sum(4 * (num_rows - 1) * length * self._row_size(shard) for shard, _ in self._look_ups.values())

    def _row_size(self, shard: str) -> int:
        tensor = self._store.contents.shards[shard].tensors[0]
        return tensor.num_bytes // tensor.shape[0]

    def _by_name(self, batch: Batch) -> Mapping[str, np.ndarray]:
        if isinstance(batch, Arrays):
            return batch.arrays
        if self.texts is None:
            raise ValueError("the module takes no texts")
        _require_known(batch.ids_BS, self.texts, self._store)
        arrays: Dict[str, np.ndarray] = dict(zip(TEXT_INPUTS, (batch.ids_BS, batch.mask_BS, batch.types_BS)))
        return {name: arrays[name] for name in self._inputs}


def _require_known(ids_BS: np.ndarray, texts: Union[Encoder, Texts], store: Store) -> None:
    """Raise StoreError for a token that the model does not have."""
    if ids_BS.max() >= texts.vocab_size:
        raise StoreError(
            f"token id {ids_BS.max()} in a vocabulary of {texts.vocab_size}",
            store.path,
            "the tokenizer belongs to another model",
        )


def _homes_of_look_ups(store: Store) -> Dict[str, Tuple[str, LookUp]]:
    """Value -> the shard that its table is alone in, and how it is looked up."""
    homes = {tensor.name: shard.name for shard in store.module.shards.values() for tensor in shard.tensors}
    return {name: (homes[found.table], found) for name, found in segments_of(store).look_ups.items()}


def _moving(inputs: Mapping[str, Value], examples: Iterable[Any]) -> Dict[str, Dict[int, int]]:
    """Of each input, the extents in which the examples of a proof differ, and the most that each was."""
    found: Dict[str, Dict[int, int]] = {name: {} for name in inputs}
    for example in examples:
        for name, value in inputs.items():
            for i, (one, other) in enumerate(zip(value.shape, example["inputs"][name][1])):
                if one != other:
                    found[name][i] = max(one, int(other), found[name].get(i, 0))
    return found


def course_of(store: Store) -> Course:
    """The course of a store's passes. Raises StoreError for a module whose stages are no graphs."""
    return TextCourse(store) if isinstance(store.contents, Manifest) else ModuleCourse(store)


def _row_bytes(value: Value) -> int:
    """Of one row of an input."""
    return int(np.prod(value.shape[1:], dtype=np.int64)) * np.dtype(value.dtype).itemsize


def _positions(ids_BS: np.ndarray, encoder: Encoder) -> np.ndarray:
    """The row of the position table that each token takes, [B, S].

    Where positions begin behind that of padding (RoBERTa), a padding token inside a text takes none, as in fairseq.
    """
    if not encoder.position_offset:
        return np.broadcast_to(np.arange(ids_BS.shape[1]), ids_BS.shape)
    is_token_BS = ids_BS != encoder.pad_token
    return np.cumsum(is_token_BS, axis=1) * is_token_BS + encoder.position_offset - 1
