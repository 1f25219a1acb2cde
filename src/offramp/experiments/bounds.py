"""Bounds of exit policies: exits that are known beforehand, from a transcript.

The oracle leaves at the first exit that gives the answer of the last one, which no policy can know. Random exits have
the depths of a policy in random order: what a policy gains over them is not due to depth alone.

Shapes: N rows, K exits, C outputs of a head, B rows that remain in a batch.
"""

from collections.abc import Sequence

import numpy as np

from offramp.errors import UsageError
from offramp.experiments.evaluation import answer_at
from offramp.experiments.jobs import ORACLE, RANDOM
from offramp.policies import Decider, Evidence, Policy, parse, replay


def exits_of(
    rule: str, logits_KNC: np.ndarray, problem: str, seed: int, lengths_N: np.ndarray | None = None
) -> np.ndarray:
    """Return the exit, from 1, of each row [N] for `oracle`, or for `random:POLICY`, whose permutation has a seed."""
    num_exits, num_rows = logits_KNC.shape[:2]
    if rule == ORACLE:
        answer_KN = np.stack([answer_at(logits_KNC, np.full(num_rows, number + 1)) for number in range(num_exits)])
        return (answer_KN == answer_KN[-1]).argmax(axis=0) + 1
    policy = parse(rule[len(RANDOM) :], code=True)
    policy.check(num_exits, problem)
    return np.random.default_rng(seed).permutation(replay(policy, logits_KNC, problem, lengths_N))


class PlannedExits(Policy):
    """Policy whose rows leave at exits that are known beforehand, in the order in which the rows run.

    Heads are evaluated as for a policy that decides at each exit.
    """

    def __init__(self, name: str, exits: Sequence[int]) -> None:
        self.name, self.exits_N, self._position = name, np.array(exits), 0

    def __str__(self) -> str:
        return self.name

    def check(self, num_exits: int, problem: str | None) -> None:
        """Raise UsageError for exits that the model does not have."""
        if int(self.exits_N.max()) > num_exits:
            raise UsageError(f"exits up to {self.exits_N.max()} are planned, the model has {num_exits}")

    def restart(self) -> None:
        """Begin again with the first row."""
        self._position = 0

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return the state for the next rows."""
        places = (self._position + np.arange(num_rows)) % len(self.exits_N)
        self._position += num_rows
        return _Planned(self.exits_N[places])


class _Planned(Decider):
    def __init__(self, exits_B: np.ndarray) -> None:
        self.exits_B = exits_B

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        """Return the rows whose exit this is."""
        return self.exits_B <= exit_index

    def keep(self, mask_B: np.ndarray) -> None:
        """Drop the rows that have left."""
        self.exits_B = self.exits_B[mask_B]
