"""What texts that run together cost, from a profile of passes whose rows all leave at the same exit.

There each row pays its share of the pass. Where rows leave one by one, a share is still right for what grows with the
rows. A layer is read whole, though, however few come to it, and nothing hides the read but what these few compute.

Shapes: N samples in the order in which they run, G batches of them, K exits.
"""

from __future__ import annotations

import numpy as np

from offramp.policies.costs import Costs
from offramp.runtime.profile import DeviceProfile


def padded(lengths_N: np.ndarray, batch: int) -> np.ndarray:
    """Tokens that each sample is computed with: those of the longest of its batch."""
    longest_G = np.maximum.reduceat(lengths_N, np.arange(0, len(lengths_N), batch))
    return np.repeat(longest_G, batch)[: len(lengths_N)]


def beyond_shares(
    profile: DeviceProfile, costs: Costs, padded_N: np.ndarray, exit_N: np.ndarray
) -> tuple[float, float]:
    """Seconds and bytes a text that the shares leave out, in the mean; both 0 where texts run alone."""
    batch = profile.batch
    starts = np.arange(0, len(exit_N), batch)
    here_GK = np.add.reduceat(exit_N[:, np.newaxis] >= np.arange(1, profile.num_exits + 1), starts, dtype=np.int64)
    seconds_GK = batch * np.diff(costs.at(padded_N[starts]), prepend=0.0)
    waited_GK = np.minimum(profile.read_seconds, seconds_GK) - seconds_GK * here_GK / batch
    bytes_K = np.diff(profile.bytes_read, prepend=0.0)
    unpaid_GK = np.maximum(bytes_K, 0.0) * (batch - here_GK)
    reached_GK = here_GK > 0
    seconds = np.maximum(waited_GK, 0.0)[reached_GK].sum() / len(exit_N)
    return float(seconds), float(unpaid_GK[reached_GK].sum() / len(exit_N))
