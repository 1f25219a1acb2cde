"""Policies tried on what the exits said before: no model runs, so a hundred policies cost what one does.

Shapes: K exits, N samples, C outputs of the head.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

from offramp.policies.evidence import Evidence
from offramp.policies.policy import Policy


def replay(policy: Policy, logits_KNC: np.ndarray, problem: str, lengths_N: Optional[np.ndarray] = None) -> np.ndarray:
    """The exit, from 1, at which each sample leaves: int64 [N]. Who is left leaves at the last exit.

    `logits_KNC` is what each exit says of each sample, the last exit being the model's own head; `lengths_N` its
    tokens, for policies that weigh costs. The engine leaves at the same exits, as far as its logits are the same.
    """
    num_exits, num_samples = logits_KNC.shape[:2]
    decider = policy.start(num_samples, num_exits)
    left_N, exit_N = np.arange(num_samples), np.full(num_samples, num_exits)
    for exit_index in range(policy.first_evidence(num_exits), num_exits):
        lengths_B = None if lengths_N is None else lengths_N[left_N]
        evidence = Evidence.from_logits(logits_KNC[exit_index - 1, left_N], problem, lengths_B)
        leaves_B = decider.update(exit_index, evidence)
        exit_N[left_N[leaves_B]] = exit_index
        decider.keep(~leaves_B)
        left_N = left_N[~leaves_B]
    return exit_N
