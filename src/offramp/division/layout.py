"""Which weights of a divided module share a shard, and the shards as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set

from offramp.store import Shard, Stage, Step, StoreWriter
from offramp.streaming.placeholders import Weight
from offramp.streaming.placement import NAMES
from offramp.streaming.stages import StagePlan

SLICES = 4
"""Rows that a weight must have to be read some at a time."""
KEPT = "kept"
"""The shard of weights that stay in memory."""
Chunks = Callable[[str], Iterator[bytes | memoryview]]
"""weight -> its data, some at a time."""


class Layout:
    """Which weights share a shard: those that one stage needs alone; those that the same stages need; each table and
    each weight that is larger than a stage by itself; those that are kept; the buffers; what no stage needs.
    """

    def __init__(self, weights: Mapping[str, Weight], plan: StagePlan, kept: Set[str]) -> None:
        self._weights, self._plan = weights, plan
        self.shards: dict[str, list[str]] = {}
        self._needs: list[list[str]] = [[] for _ in plan.stages]
        homes: dict[str, list[int]] = {}
        for index, stage in enumerate(plan.stages):
            for name in (*stage.uses, *stage.tables):
                homes.setdefault(name, []).append(index)
        self._tables = {name for stage in plan.stages for name in stage.tables}
        groups: dict[tuple, list[str]] = {}
        for name, indices in homes.items():
            alone = name in self._tables or name in sliced_weights(weights, plan)
            if name not in kept:
                groups.setdefault((tuple(indices), name if alone else ""), []).append(name)
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
        """All shards."""
        return {name: self._write(name, names, writer, chunks) for name, names in self.shards.items()}

    def stages(self) -> tuple[Stage, ...]:
        """As the manifest lists them."""
        return tuple(
            Stage(f"{index:03d}", "layer", (Step("module", tuple(shards)),)) for index, shards in enumerate(self._needs)
        )

    def _write(self, shard: str, names: Sequence[str], writer: StoreWriter, chunks: Chunks) -> Shard:
        tensors = [(name, self._weights[name].tensor) for name in names]
        tensors.sort(key=lambda pair: self._weights[pair[0]].num_bytes % 64 != 0)  # stable: else in order of use
        rows = shard != KEPT and (names[0] in self._tables or names[0] in sliced_weights(self._weights, self._plan))
        entries = [(n, "rows" if rows else n, NAMES[t.dtype], tuple(t.shape)) for n, t in tensors]
        return writer.add_shard(shard, entries, chunks, gathered=rows)


def sliced_weights(weights: Mapping[str, Weight], plan: StagePlan) -> tuple[str, ...]:
    """Weights that need more than a stage should, each alone, but not as a whole at once."""
    tables = {name for stage in plan.stages for name in stage.tables}
    large = [name for name in plan.sliced if name not in tables and weights[name].num_bytes > plan.stage_bytes]
    shapes = {name: weights[name].tensor.shape for name in large}
    return tuple(name for name in large if len(shapes[name]) == 2 and shapes[name][0] >= SLICES)
