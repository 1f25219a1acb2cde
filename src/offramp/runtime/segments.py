"""A divided module as the loop sees it: which stages make a layer, and a backend that runs them one after the other.

Layers are what lies between exits; the first begins with the inputs, and the last ends in the answer. Who multiplies is
a subclass's matter.

Shapes: B rows, H width of a hidden state, C labels.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from offramp.errors import StoreError
from offramp.program.program import TEXT_INPUTS, Program, Segment, Segments, Value
from offramp.runtime.backend import Backend, State, Weights
from offramp.store import Stage, Step, Store

SLACK = 1.5
"""What activations may take, of the values that lived at once when the module was divided."""
SCRATCH_BYTES = 8 << 20
"""What libraries add to them, for each thread."""


@dataclass
class SegmentState(State):
    """`stage`: the one that comes next. `mask_BS`: of texts, 1 for a token; else one place a row."""

    stage: int = 0
    mask_BS: Optional[np.ndarray] = None


def segments_of(store: Store) -> Segments:
    """The graphs of a store's stages. Raises StoreError where it has none."""
    segments = store.module.program.segments
    if segments is None:
        remedy = "divide with --method export, or run it with offramp.stream"
        raise StoreError("the stages of this store are no graphs of their own", store.path, remedy)
    return segments


def layers_of(store: Store) -> Tuple[Stage, ...]:
    """The stages between two exits as one layer each; steps are named by their graphs, and load what these take."""
    stages, segments, shards = store.module.stages, segments_of(store), store.module.shards
    bounds = [0, *segments.exits, len(stages)]
    made = []
    for number, start in enumerate(bounds[:-1]):
        end = bounds[number + 1]
        steps = []
        for index in range(start, end):
            taken = set(segments.stages[index].weights)
            names = stages[index].steps[0].shards
            needed = tuple(name for name in names if any(tensor.name in taken for tensor in shards[name].tensors))
            steps.append(Step(segments.stages[index].kind, needed))
        made.append(Stage(f"layer.{number}", "layer", tuple(steps)))
    return tuple(made)


def exit_widths(program: Program) -> List[int]:
    """H of the hidden state that each exit stands on."""
    assert program.segments is not None
    hidden = [program.segments.values[program.segments.stages[index].reads[0]] for index in program.segments.exits]
    return [width_of(value) for value in hidden]


def width_of(value: Value) -> int:
    """Of tokens [B, S, H], a feature map [B, H, ., .], or a vector [B, H]."""
    return value.shape[2] if len(value.shape) == 3 else value.shape[1]


class SegmentBackend(Backend):
    """Runs the graphs of a store's stages in order, whatever the kind that a step names."""

    def __init__(self, store: Store, num_threads: int) -> None:
        self.num_threads, self._program, self._segments = num_threads, store.module.program, segments_of(store)
        self._shapes = {t.name: (t.dtype, t.shape) for shard in store.module.shards.values() for t in shard.tensors}
        wrong = sorted({dtype for dtype, _ in self._shapes.values()} - {"F32", "I64", "I32", "BOOL", "U8"})
        if wrong:
            raise StoreError(f"tensors of {wrong[0]} cannot be run as graphs", store.path, "run it with offramp.stream")
        self._constants, self._done = self._load_constants(store), _done(self._segments)

    @abstractmethod
    def compute(self, segment: Segment, inputs: Sequence[Any]) -> Sequence[Any]:
        """Run the graph of a segment on values, weights and constants, in its order."""

    @abstractmethod
    def wrap(self, array: np.ndarray) -> Any:
        """An array as the graphs take it, without a copy."""

    @abstractmethod
    def unwrap(self, value: Any) -> np.ndarray:
        """A value as an array, without a copy."""

    @abstractmethod
    def take(self, value: Any, rows_B: np.ndarray, extent: int) -> Any:
        """Some rows of a value."""

    def close(self) -> None:
        """Nothing is held between passes."""

    def rehearse(self, num_rows: int, length: int) -> None:
        """Run all stages on zeros, each with zeros for weights."""
        values = {**self._program.inputs, **{name: self._segments.values[name] for name in self._segments.look_ups}}
        place = (num_rows, length) if self._program.texts else (num_rows, 1)
        arrays = {name: self._blank(name, value, place) for name, value in values.items()}
        state = self.begin(arrays, np.ones(place, np.int64), {})
        for segment in self._segments.stages:
            self.step(state, segment.kind, {name: _empty(self._shapes[name]) for name in segment.weights})

    def activation_bytes(self, num_rows: int, length: int) -> int:
        """What lives at once, and what libraries take beside it."""
        return self.state_bytes(num_rows, length) + self.num_threads * SCRATCH_BYTES

    def state_bytes(self, num_rows: int, length: int) -> int:
        """The most that lives at once in any stage, in proportion to the rows, and of texts to the tokens, of the
        example that the module was divided with.
        """
        rows = max((value.shape[0] for value in self._program.inputs.values() if value.shape), default=1)
        lived = self._program.activation_bytes * num_rows / max(rows, 1)
        if self._program.texts:
            lived *= length / self._program.inputs[TEXT_INPUTS[0]].shape[1]
        return int(SLACK * lived)

    def begin(self, rows: Mapping[str, np.ndarray], mask_BS: np.ndarray, weights: Weights) -> State:
        """The inputs by name, as the first values."""
        values = {name: self.wrap(np.ascontiguousarray(array)) for name, array in rows.items()}
        return SegmentState(len(mask_BS), mask_BS.shape[1], values, mask_BS=mask_BS)

    def step(self, state: State, kind: str, weights: Weights) -> None:
        """The next stage."""
        assert isinstance(state, SegmentState)
        segment = self._segments.stages[state.stage]
        inputs = [state.arrays[name] for name in segment.reads]
        inputs += [self.wrap(weights[name]) for name in segment.weights]
        inputs += [self._constants[name] for name in segment.constants]
        made = self.compute(segment, inputs)
        state.arrays.update(zip(segment.writes, made))
        for name in self._done[state.stage]:
            state.arrays.pop(name, None)
        state.stage += 1

    def hidden(self, state: State) -> Any:
        """The value that an exit looks at: the first that the next stage reads."""
        assert isinstance(state, SegmentState)
        return state.arrays[self._segments.stages[state.stage].reads[0]]

    def exit_logits(self, state: State, weights: Weights) -> np.ndarray:
        """The mean over tokens or places, and a linear layer."""
        hidden, keep = self.unwrap(self.hidden(state)), self.keep_of(state)
        if keep is not None:
            hidden = (hidden * keep).sum(axis=1) / keep.sum(axis=1)
        elif hidden.ndim == 3:
            hidden = hidden.mean(axis=1)
        elif hidden.ndim > 3:
            hidden = hidden.reshape(*hidden.shape[:2], -1).mean(axis=2)
        return hidden @ weights["exit.weight"].T + weights["exit.bias"]

    def keep_of(self, state: State) -> Optional[np.ndarray]:
        """Of texts, float32 [B, S, 1]: 1 for a token, 0 for padding."""
        if self._program.texts is None:
            return None
        assert isinstance(state, SegmentState) and state.mask_BS is not None
        return state.mask_BS[:, :, None].astype(np.float32)

    def head_logits(self, state: State, weights: Weights) -> np.ndarray:
        """The first output of the module."""
        return np.array(self.unwrap(state.arrays[self._segments.outputs[0]]))

    def keep(self, state: State, mask_B: np.ndarray) -> None:
        """Of every value that counts rows."""
        rows_B, batch = np.flatnonzero(mask_B), self._segments.batch
        for name, value in state.arrays.items():
            if name in batch:
                state.arrays[name] = self.take(value, rows_B, batch[name])
        if isinstance(state, SegmentState) and state.mask_BS is not None:
            state.mask_BS = state.mask_BS[rows_B]
        state.num_rows = len(rows_B)

    def _blank(self, name: str, value: Value, place: Tuple[int, int]) -> np.ndarray:
        """Zeros of an input or of looked-up rows, for `place` rows and tokens; every token is one."""
        is_text = self._program.texts is not None
        shape = (*place, *value.shape[2:]) if is_text else (place[0], *value.shape[1:])
        return (np.ones if name == TEXT_INPUTS[1] else np.zeros)(shape, np.dtype(value.dtype))

    def _load_constants(self, store: Store) -> Dict[str, Any]:
        wanted = {name for segment in self._segments.stages for name in segment.constants}
        found = {}
        for shard in store.module.shards.values():
            for tensor in shard.tensors:
                if tensor.name in wanted:
                    dtype, shape = _DTYPES[tensor.dtype], tensor.shape
                    data = np.frombuffer(store.read_tensor(shard.name, tensor), dtype).reshape(shape)
                    found[tensor.name] = self.wrap(data)
        return found


_DTYPES = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "BOOL": np.bool_, "U8": np.uint8}


def _done(segments: Segments) -> List[Tuple[str, ...]]:
    """Of each stage, the values that nothing after it needs."""
    last = {name: index for index, stage in enumerate(segments.stages) for name in (*stage.writes, *stage.reads)}
    done: List[List[str]] = [[] for _ in segments.stages]
    for name in sorted(last.keys() - set(segments.outputs)):
        done[last[name]].append(name)
    return [tuple(names) for names in done]


def _empty(described: Tuple[str, Tuple[int, ...]]) -> np.ndarray:
    dtype, shape = described
    return np.zeros(shape, _DTYPES[dtype])
