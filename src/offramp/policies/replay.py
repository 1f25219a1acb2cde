"""Evaluation of policies on recorded logits. No model runs, so one forward pass serves any number of policies.

Shapes: K exits, N samples, C outputs of the head.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

from offramp.policies.evidence import Evidence
from offramp.policies.policy import Policy


def replay(policy: Policy, logits_KNC: np.ndarray, problem: str, lengths_N: Optional[np.ndarray] = None) -> np.ndarray:
    """Return the exit, from 1, at which each sample leaves: int64 [N]. Remaining samples leave at the last exit.

    The engine chooses the same exits if it computes the same logits.

    Args:
        policy: the policy.
        logits_KNC: logits of each exit; the last exit is the model's own head.
        problem: one of `PROBLEMS`.
        lengths_N: number of tokens of each sample, for policies that use costs.
    """
    num_exits, num_samples = logits_KNC.shape[:2]
    decider = policy.start(num_samples, num_exits)
    remaining_N, exit_N = np.arange(num_samples), np.full(num_samples, num_exits)
    for exit_index in range(policy.first_evidence(num_exits), num_exits):
        lengths_B = None if lengths_N is None else lengths_N[remaining_N]
        evidence = Evidence.from_logits(logits_KNC[exit_index - 1, remaining_N], problem, lengths_B)
        leaves_B = decider.update(exit_index, evidence)
        exit_N[remaining_N[leaves_B]] = exit_index
        decider.keep(~leaves_B)
        remaining_N = remaining_N[~leaves_B]
    return exit_N
