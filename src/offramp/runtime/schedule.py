"""The order of a pass: which stages it can reach, which steps run together, and which shards are read when."""

from __future__ import annotations

from typing import AbstractSet, Callable, Dict, List, Set, Tuple

from offramp.program.program import BEGIN, LAYER, Program, Stage, Step
from offramp.runtime.ring import Turn

Group = Tuple[Step, ...]
"""Steps of a stage whose weights are in memory together."""


class Schedule:
    """The stages of a program that a pass can reach under a policy, in order.

    Stage 0 comes before the layers, stage K is layer K, after which exit K stands. If a pass can run all layers, a last
    stage computes the program's own output.
    """

    def __init__(self, program: Program, last_exit: int) -> None:
        """Build the schedule of passes that run at most `last_exit` layers."""
        self.program, self.last_exit, self.num_exits = program, last_exit, len(program.layers)
        self.stages = program.stages[: last_exit + 1] if last_exit < self.num_exits else program.stages
        self.stage_of: Dict[str, int] = dict(self.uses())
        """Shard -> index of the last stage that uses it."""
        self._groups = [[self._grouped(stage, is_shared) for stage in self.stages] for is_shared in (False, True)]

    def groups(self, index: int, num_batches: int) -> List[Group]:
        """Return the steps of stage `index` in groups that hold their weights together.

        One batch runs step by step. If several batches share a sweep, a step whose kernel keeps intermediates is joined
        with the next step, so that only what flows between layers is kept for the batches that wait; and the first
        stage is one group, so that looked-up rows are in memory for one batch at a time.
        """
        return self._groups[num_batches > 1][index]

    def uses(self) -> List[Tuple[str, int]]:
        """Return (shard, stage index) of each use of a shard in a full pass, in order."""
        stages = enumerate(self.stages)
        return [(name, index) for index, stage in stages for step in stage.steps for name in shards_of(step)]

    @property
    def layer_of(self) -> Dict[str, int]:
        """Shard -> index of the layer that uses it, for those that one layer alone uses."""
        found: Dict[str, Set[int]] = {}
        for name, index in self.uses():
            found.setdefault(name, set()).add(index)
        return {name: min(used) for name, used in found.items() if len(used) == 1 and self._is_layer(min(used))}

    def turns(self, likely_ends_at: Callable[[int], bool]) -> List[Turn]:
        """Return the reads of a pass in order. Reads after an exit where the pass likely ends wait for its decision.

        `likely_ends_at(K)` tells whether all rows probably leave at exit K.
        """
        turns, after = [], 0
        for index, stage in enumerate(self.stages):
            if index > 1 and likely_ends_at(index - 1):
                after = index - 1
            turns += [Turn(shard, after) for step in stage.steps for shard in shards_of(step)]
        return turns

    def most_shards_together(self, num_batches: int, residents: AbstractSet[str]) -> int:
        """Return the most shards, residents excluded, that a group needs at once."""
        groups = (group for index in range(len(self.stages)) for group in self.groups(index, num_batches))
        return max(len({name for step in group for name in shards_of(step)} - residents) for group in groups)

    def _is_layer(self, index: int) -> bool:
        return self.stages[index].role == LAYER

    def _grouped(self, stage: Stage, is_shared: bool) -> List[Group]:
        if is_shared and stage.role == BEGIN:
            return [stage.steps] if stage.steps else []
        groups: List[Group] = []
        for step in stage.steps:
            joins = bool(groups) and is_shared and self.program.kernels[groups[-1][-1].kernel].keeps_intermediates
            groups[len(groups) - joins :] = [(*groups[-1], step) if joins else (step,)]
        return groups


def shards_of(step: Step) -> List[str]:
    """Return the shards that a step has in memory, each once, in the order in which they are read."""
    return list(dict.fromkeys(step.shards))
