"""Which weights of a divided module share a shard, and the shards as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace

from offramp.program.program import Part
from offramp.store import Shard, StoreWriter
from offramp.streaming.placeholders import Weight
from offramp.streaming.placement import NAMES
from offramp.streaming.stages import StagePlan

MIN_SLICED_ROWS = 4
"""Fewest rows of a weight that is read some rows at a time."""
KEPT = "kept"
"""Name of the shard of weights that stay in memory."""
Chunks = Callable[[str], Iterator[bytes | memoryview]]
"""Function from a weight to its data in pieces."""


class Layout:
    """Assignment of weights to shards.

    One shard holds the weights that the same stages need. Each table and each weight that is larger than a stage has a
    shard of its own; so have the weights that are kept, the buffers, and the weights that no stage needs.
    """

    def __init__(self, weights: Mapping[str, Weight], plan: StagePlan, kept: Set[str]) -> None:
        self._weights, self._plan = weights, plan
        self.shards: dict[str, list[str]] = {}
        self._needs: list[list[str]] = [[] for _ in plan.stages]
        homes: dict[str, list[int]] = {}
        for index, stage in enumerate(plan.stages):
            for name in (*stage.uses, *stage.tables):
                homes.setdefault(name, []).append(index)
        self._by_rows = {name for stage in plan.stages for name in stage.tables}.union(sliced_weights(weights, plan))
        groups: dict[tuple, list[str]] = {}
        for name, indices in homes.items():
            if name not in kept:
                groups.setdefault((tuple(indices), name if name in self._by_rows else ""), []).append(name)
        for (indices, _), names in groups.items():
            self._add(f"weights-{len(self.shards):03d}", names, indices)
        self._add(KEPT, [name for name in weights if name in kept], [0])
        self._add("buffers", [name for name, weight in weights.items() if weight.is_buffer], [])
        self._add("unused", [name for name in plan.unused if name not in kept], [])

    def _add(self, shard: str, names: list[str], stages: Sequence[int]) -> None:
        if names:
            self.shards[shard] = names
            for index in stages:
                self._needs[index].append(shard)

    def write(self, writer: StoreWriter, chunks: Chunks) -> dict[str, Shard]:
        """Write all shards."""
        return {name: self._write(name, names, writer, chunks) for name, names in self.shards.items()}

    def parts(self) -> tuple[Part, ...]:
        """Return the parts of the module with the shards that each needs."""
        stages = zip(self._plan.stages, self._needs, strict=True)
        return tuple(replace(stage.part, shards=tuple(shards)) for stage, shards in stages)

    def _write(self, shard: str, names: Sequence[str], writer: StoreWriter, chunks: Chunks) -> Shard:
        tensors = [(name, self._weights[name].tensor) for name in names]
        tensors.sort(key=lambda pair: self._weights[pair[0]].num_bytes % 64 != 0)  # stable: else in order of use
        rows = shard != KEPT and names[0] in self._by_rows
        entries = [(n, "rows" if rows else n, NAMES[t.dtype], tuple(t.shape)) for n, t in tensors]
        return writer.add_shard(shard, entries, chunks, gathered=rows)


def sliced_weights(weights: Mapping[str, Weight], plan: StagePlan) -> tuple[str, ...]:
    """Return the weights that are larger than a stage should be, and that can be read some rows at a time."""
    tables = {name for stage in plan.stages for name in stage.tables}
    large = [name for name in plan.sliced if name not in tables and weights[name].num_bytes > plan.stage_bytes]
    shapes = {name: weights[name].tensor.shape for name in large}
    return tuple(name for name in large if len(shapes[name]) == 2 and shapes[name][0] >= MIN_SLICED_ROWS)
