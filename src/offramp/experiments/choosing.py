"""Choice of an exit policy by its score and mean exit on the tune split; no latency is measured.

Shapes: K exits, N samples, C outputs of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp.experiments.evaluation import answer_at
from offramp.policies import parse, replay
from offramp.policies.evidence import REGRESSION
from offramp.tasks.metrics import score

ALLOWED_LOSS = 0.5
"""Points of the score that a policy may lose relative to the last exit."""
_CONFIDENCES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)
_ENTROPIES = (0.69, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01)
_DISTANCES = (0.05, 0.1, 0.2, 0.3, 0.5)


@dataclass(frozen=True)
class Candidate:
    """A policy evaluated on samples. `loss` is in points of the score, relative to the last exit."""

    policy: str
    score: float
    loss: float
    mean_exit: float


def candidates(num_exits: int, problem: str) -> list[str]:
    """Return the policies to try: fixed exits, patience, votes, confidence, entropy; for a regression the first two."""
    fixed = [f"stage:{number}" for number in range(1, num_exits)]
    runs = range(1, num_exits - 1)  # patience P agrees at P + 1 exits, and must leave before the last
    if problem == REGRESSION:
        return fixed + [f"patience:{run}@{distance}" for run in runs for distance in _DISTANCES]
    counted = [f"patience:{run}" for run in runs] + [f"votes:{votes}" for votes in range(2, num_exits)]
    confident = [f"confidence:{level}" for level in _CONFIDENCES]
    late = [f"from:{number}>{rule}" for number in range(2, num_exits - 1) for rule in confident]
    return [*fixed, *counted, *confident, *late, *(f"entropy:{level}" for level in _ENTROPIES)]


def try_policies(
    policies: Sequence[str], logits_KNC: np.ndarray, truth_N: np.ndarray, metrics: Sequence[str], problem: str
) -> list[Candidate]:
    """Replay each policy on the samples."""
    num_exits, num_samples = logits_KNC.shape[:2]
    full = score(metrics, truth_N, answer_at(logits_KNC, np.full(num_samples, num_exits)))["score"]
    found = []
    for policy in policies:
        exit_N = replay(parse(policy), logits_KNC, problem)
        value = score(metrics, truth_N, answer_at(logits_KNC, exit_N))["score"]
        found.append(Candidate(policy, value, full - value, float(exit_N.mean())))
    return found


def choose(evaluated: Sequence[Candidate], allowed_loss: float = ALLOWED_LOSS) -> Candidate | None:
    """Return the policy with the smallest mean exit whose loss is at most `allowed_loss`, the better of equals; None if
    every policy loses more.
    """
    kept = [each for each in evaluated if each.loss <= allowed_loss + 1e-9]
    return min(kept, key=lambda each: (each.mean_exit, each.loss), default=None)
