"""Statistical guarantees for a policy: with probability 1 - delta, its risk is at most epsilon.

The loss of a sample is 1 where the early answer is wrong and the answer of the full model is right, -1 in the opposite
case, and 0 otherwise. The risk is the mean loss: the accuracy that exiting early costs. Candidates are tested in an
order that does not depend on the certify split, from careful to fast, until the first that fails (fixed-sequence
testing), so the number of candidates does not weaken the guarantee. A certificate holds only for samples drawn from the
distribution of the certify split.

Shapes: N samples of the certify split, M candidates in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Dict, Optional, Sequence

import numpy as np

METHODS = ("ucb", "ltt", "crc")
"""Names of the supported tests.

- `ucb`: an upper confidence bound of the risk by betting (Waudby-Smith and Ramdas, "Estimating means of bounded random
  variables by betting", JRSS B 86, 2024).
- `ltt`: learn then test (Angelopoulos et al., AoAS 19, 2025), with the exact binomial tail of the losses; gains count
  as 0.
- `crc`: conformal risk control (Angelopoulos et al., ICLR 2024), which bounds the expectation of the risk and has no
  delta."""

_LEVEL_BITS = 24
"""Number of bisections after which a level is known."""


@dataclass(frozen=True)
class Certificate:
    """Guarantee for a policy: risk <= epsilon with probability 1 - delta, or in expectation where delta is None."""

    method: str
    epsilon: float
    delta: Optional[float]
    num_samples: int
    risk: float
    """Mean loss on the certify split."""


def losses(truth_N: np.ndarray, early_N: np.ndarray, full_N: np.ndarray) -> np.ndarray:
    """Return the loss of each sample, -1, 0 or 1 (int64 [N]), from label ids."""
    return (early_N != truth_N).astype(np.int64) - (full_N != truth_N)


def samples_needed(epsilon: float, delta: float, method: str = "ltt") -> int:
    """Return the smallest number of samples that can certify epsilon when no sample has a loss.

    `ltt` needs log delta / log(1 - epsilon), the minimum for any method with a delta.
    """
    _require_levels(epsilon, delta)
    if method == "crc":
        return max(math.ceil(1 / epsilon - 1 - 1e-9), 1)
    least = math.ceil(math.log(delta) / math.log1p(-epsilon) - 1e-12)
    if method == "ltt":
        return least
    failing, enough = least - 1, least
    while not is_certifiable(enough, epsilon, delta, method):
        failing, enough = enough, 2 * enough
    while enough - failing > 1:
        middle = (failing + enough) // 2
        is_enough = is_certifiable(middle, epsilon, delta, method)
        failing, enough = (failing, middle) if is_enough else (middle, enough)
    return enough


def is_certifiable(num_samples: int, epsilon: float, delta: float, method: str = "ltt") -> bool:
    """Return whether `num_samples` can certify epsilon when no sample has a loss."""
    return certify([np.zeros(num_samples)], epsilon, delta, method) == 0


def least_epsilon(num_samples: int, delta: float, method: str = "ltt") -> float:
    """Return the smallest epsilon that `num_samples` can certify when no sample has a loss."""
    failing, enough = 0.0, 1.0
    for _ in range(_LEVEL_BITS):
        middle = (failing + enough) / 2
        is_enough = is_certifiable(num_samples, middle, delta, method)
        failing, enough = (failing, middle) if is_enough else (middle, enough)
    return enough


def certify(loss_MN: Sequence[np.ndarray], epsilon: float, delta: float, method: str) -> int:
    """Return the index of the last candidate that is certified, or -1 if none is.

    Args:
        loss_MN: losses of each candidate on each sample, from careful to fast. May be a lazy sequence: losses after the
            first failure are not requested.
        epsilon: largest acceptable risk, 0 < epsilon < 1.
        delta: probability that the certificate is wrong, 0 < delta < 1; ignored by `crc`.
        method: one of METHODS.
    """
    _require_levels(epsilon, delta)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    worst_N = np.zeros(1)
    for index, loss_N in enumerate(loss_MN):
        loss_N = _checked(loss_N)
        worst_N = np.maximum(worst_N, loss_N)  # `crc` needs monotone losses; gains count as 0
        if not _TESTS[method](worst_N if method == "crc" else loss_N, epsilon, delta):
            return index - 1
    return len(loss_MN) - 1


def upper_bound(loss_N: np.ndarray, delta: float) -> float:
    """Return the betting upper bound on the mean loss, valid with probability 1 - delta. At most 1."""
    loss_N = _checked(loss_N)
    low, high = -1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _betting(loss_N, middle, delta) else (middle, high)
    return high


def binomial_tail(num_losses: int, num_samples: int, probability: float) -> float:
    """Return P(X <= num_losses) for a binomial X: the exact p-value of "the loss rate is at least `probability`"."""
    if num_losses >= num_samples:
        return 1.0
    counts = np.arange(num_losses + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_samples + 1)))])
    log_choose = log_factorial[num_samples] - log_factorial[counts] - log_factorial[num_samples - counts]
    log_terms = log_choose + counts * math.log(probability) + (num_samples - counts) * math.log1p(-probability)
    return float(min(np.exp(log_terms).sum(), 1.0))


def _betting(loss_N: np.ndarray, epsilon: float, delta: float) -> bool:
    """Return whether betting against a mean above epsilon multiplies the initial wealth by 1 / delta.

    If the mean is at least epsilon, the probability of this is at most delta (Ville's inequality), for samples in an
    order that is independent of their losses: they are shuffled, since a table may be sorted by its labels. Stakes
    follow the running variance and never exceed the wealth. A sample mean above epsilon certifies nothing, whatever the
    wealth was on the way.
    """
    gain_N, mean = (_shuffled(loss_N) + 1) / 2, (epsilon + 1) / 2
    if mean >= 1:
        return True
    place_N = np.arange(1, len(gain_N) + 1)
    middle_N = (0.5 + np.cumsum(gain_N)) / (1 + place_N)
    variance_N = (0.25 + np.cumsum((gain_N - middle_N) ** 2)) / (1 + place_N)
    before_N = np.concatenate([[0.25], variance_N[:-1]])
    stake_N = np.minimum(np.sqrt(2 * math.log(1 / delta) / (len(gain_N) * before_N)), 0.999 / (1 - mean))
    wealth_N = np.cumsum(np.log1p(-stake_N * (gain_N - mean)))
    return bool(wealth_N.max() >= math.log(1 / delta) and loss_N.mean() <= epsilon)


def _shuffled(loss_N: np.ndarray) -> np.ndarray:
    return loss_N[np.random.default_rng(0).permutation(len(loss_N))]


def _binomial(loss_N: np.ndarray, epsilon: float, delta: float) -> bool:
    return epsilon >= 1 or binomial_tail(int((loss_N > 0).sum()), len(loss_N), epsilon) <= delta


def _conformal(worst_N: np.ndarray, epsilon: float, delta: float) -> bool:
    """Return whether the mean of the largest losses of each sample so far, with one more loss of 1, is small enough."""
    return (worst_N.sum() + 1) / (len(worst_N) + 1) <= epsilon


_TESTS: Dict[str, Callable[[np.ndarray, float, float], bool]] = {
    "ucb": _betting, "ltt": _binomial, "crc": _conformal,
}  # fmt: skip


def _checked(loss_N: np.ndarray) -> np.ndarray:
    loss_N = np.asarray(loss_N, dtype=np.float64)
    if loss_N.ndim != 1 or not len(loss_N) or not (np.abs(loss_N) <= 1).all():
        raise ValueError("losses must have shape [N], N >= 1, and values from -1 to 1")
    return loss_N


def _require_levels(epsilon: float, delta: float) -> None:
    if not (0 < epsilon < 1 and 0 < delta < 1):
        raise ValueError(f"epsilon and delta must lie between 0 and 1, got {epsilon} and {delta}")
