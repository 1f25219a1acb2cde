"""What texts cost beyond their shares of passes whose rows all leave at the same exit, which is what a profile times.

What a pass takes depends a little on how long the ones before it took. Of passes of several rows each pays its share.
Where rows leave one by one, a layer takes longer than the share of the few that come to it: one row alone does not take
an eighth of what eight take, and a layer is read whole for it. Between one row and all of them a line is drawn. To take
the rows that are left out of the arrays costs something as well; where the loop finds that it does not pay, and carries
rows that have left, it takes less than is said here.

Shapes: N samples in the order in which they run, G batches of them, K exits.
"""

from __future__ import annotations

import numpy as np

from offramp.runtime.profile import DeviceProfile

_REPEATS = 4
"""Until what passes take fits what they take among each other."""


def padded(lengths_N: np.ndarray, batch: int) -> np.ndarray:
    """Tokens that each sample is computed with: those of the longest of its batch."""
    longest_G = np.maximum.reduceat(lengths_N, np.arange(0, len(lengths_N), batch))
    return np.repeat(longest_G, batch)[: len(lengths_N)]


def beyond_shares(
    profile: DeviceProfile, first_head: int, padded_N: np.ndarray, exit_N: np.ndarray
) -> tuple[float, float]:
    """Seconds and bytes a text that the shares leave out, in the mean."""
    batch, costs_NK = profile.batch, profile.costs(first_head).at(padded_N)
    shares_N = costs_NK[np.arange(len(exit_N)), exit_N - 1]
    if batch == 1:
        return _after(profile, shares_N), 0.0
    starts = np.arange(0, len(exit_N), batch)
    here_GK = np.add.reduceat(exit_N[:, np.newaxis] >= np.arange(1, profile.num_exits + 1), starts, dtype=np.int64)
    reached_GK, longest_G = here_GK > 0, padded_N[starts]
    whole_GK = batch * np.diff(costs_NK[starts], prepend=0.0)
    single_GK = np.diff(profile.single_costs(first_head).at(longest_G), prepend=0.0)
    seconds_GK = single_GK + (whole_GK - single_GK) * (here_GK - 1) / (batch - 1)
    num_gathered_G = (reached_GK[:, 1:] & (here_GK[:, 1:] < here_GK[:, :-1])).sum(axis=1)
    seconds_G = np.where(reached_GK, seconds_GK, 0.0).sum(axis=1)
    seconds_G += num_gathered_G * np.interp(longest_G, profile.lengths, profile.gather_seconds)
    seconds = float(seconds_G.sum() - shares_N.sum()) / len(exit_N)
    bytes_K = np.diff(profile.bytes_read, prepend=0.0)
    unpaid_GK = np.maximum(bytes_K, 0.0) * (batch - here_GK)
    after = _after(profile, seconds_G) * len(starts) / len(exit_N)
    return after + seconds, float(unpaid_GK[reached_GK].sum() / len(exit_N))


def _after(profile: DeviceProfile, seconds_G: np.ndarray) -> float:
    """Seconds a pass that it takes more, or less, among passes that take so long, and so much more or less."""
    after = 0.0
    for _ in range(_REPEATS):
        logarithms_G = np.log(np.maximum(seconds_G + after, seconds_G / 2) / profile.among_seconds)
        after = max(profile.after_seconds * float(logarithms_G.mean()), -float(seconds_G.mean()) / 2)
    return after
