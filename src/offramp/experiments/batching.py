"""Cost of batches whose rows leave at different exits, in addition to what a device profile measures.

A profile times passes whose rows all leave at one exit, and gives each row its share. Three costs come in addition:

- The latency of a pass depends slightly on the latencies of the passes before it, through CPU caches.
- Where rows leave one by one, a layer takes longer than the shares of the rows that reach it: one row takes more than
  an eighth of what eight take, and the layer is read whole. Latency is interpolated linearly in the number of rows.
- Removing rows from the arrays takes time. Where the engine carries finished rows instead, because that is faster, this
  is an overestimate.

Shapes: N samples in the order in which they run, G batches of them, K exits.
"""

import numpy as np

from offramp.runtime.profile import DeviceProfile

_REPEATS = 4
"""Iterations of the fixed point between the latency of passes and that of the passes before them."""


def padded(lengths_N: np.ndarray, batch: int) -> np.ndarray:
    """Return the padded length of each sample [N]: that of the longest in its batch."""
    longest_G = np.maximum.reduceat(lengths_N, np.arange(0, len(lengths_N), batch))
    return np.repeat(longest_G, batch)[: len(lengths_N)]


def additional_costs(
    profile: DeviceProfile, first_head: int, padded_N: np.ndarray, exit_N: np.ndarray
) -> tuple[float, float]:
    """Return the mean seconds and bytes per text that the shares do not include."""
    batch, costs_NK = profile.batch, profile.costs(first_head).at(padded_N)
    shares_N = costs_NK[np.arange(len(exit_N)), exit_N - 1]
    if batch == 1:
        return _carry_over(profile, shares_N), 0.0
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
    after = _carry_over(profile, seconds_G) * len(starts) / len(exit_N)
    return after + seconds, float(unpaid_GK[reached_GK].sum() / len(exit_N))


def _carry_over(profile: DeviceProfile, seconds_G: np.ndarray) -> float:
    """Return the mean additional seconds of a pass among passes with these latencies; may be negative."""
    after = 0.0
    for _ in range(_REPEATS):
        logarithms_G = np.log(np.maximum(seconds_G + after, seconds_G / 2) / profile.among_seconds)
        after = max(profile.after_seconds * float(logarithms_G.mean()), -float(seconds_G.mean()) / 2)
    return after
