"""Guarantees for a policy: with probability 1 - delta over the certify split, its risk is at most epsilon.

The loss of a sample is 1 where the early answer is wrong and the full model's is not, -1 the other way round, else 0;
the risk, its mean, is the accuracy that leaving early costs. Candidates come in an order that does not depend on the
certify split, from careful to fast; tests stop at the first that fails (fixed-sequence testing), so that many
candidates cost nothing. The split must hold samples like those to come: a certificate says nothing of others.

Shapes: N samples of the certify split, M candidates in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Dict, Optional, Sequence

import numpy as np

METHODS = ("ucb", "ltt", "crc")
"""`ucb`: betting (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86, 2024),
as upper bound of the risk. `ltt`: learn then test (Angelopoulos et al., AoAS 19, 2025), with the exact binomial tail of
the losses that are not gains. `crc`: conformal risk control (Angelopoulos et al., ICLR 2024), which bounds the risk's
expectation alone, without a delta."""


@dataclass(frozen=True)
class Certificate:
    """What holds of a policy: risk <= epsilon, with probability 1 - delta (None: in expectation)."""

    method: str
    epsilon: float
    delta: Optional[float]
    num_samples: int
    risk: float
    """Measured on the certify split."""


def losses(truth_N: np.ndarray, early_N: np.ndarray, full_N: np.ndarray) -> np.ndarray:
    """The loss of each sample, -1, 0 or 1, from label ids."""
    return (early_N != truth_N).astype(np.int64) - (full_N != truth_N)


def samples_needed(epsilon: float, delta: float, method: str = "ltt") -> int:
    """The least number of samples that can certify epsilon, if none is lost: log delta / log(1 - epsilon) is the least
    of any method that has a delta, and what `ltt` needs.
    """
    _require_levels(epsilon, delta)
    if method == "crc":
        return max(math.ceil(1 / epsilon - 1 - 1e-9), 1)
    least = math.ceil(math.log(delta) / math.log1p(-epsilon) - 1e-12)
    if method == "ltt":
        return least
    failing, enough = least - 1, least
    while certify([np.zeros(enough)], epsilon, delta, method) < 0:
        failing, enough = enough, 2 * enough
    while enough - failing > 1:
        middle = (failing + enough) // 2
        is_enough = certify([np.zeros(middle)], epsilon, delta, method) == 0
        failing, enough = (failing, middle) if is_enough else (middle, enough)
    return enough


def certify(loss_MN: Sequence[np.ndarray], epsilon: float, delta: float, method: str) -> int:
    """The index of the last candidate that is certified; -1 if none is.

    Args:
        loss_MN: what each candidate loses on each sample, from careful to fast; computed as they are asked for, if it
            is a lazy sequence.
        epsilon: the risk that is allowed, 0 < epsilon < 1.
        delta: the probability that the certificate may be wrong; `crc` has none.
        method: one of METHODS.
    """
    _require_levels(epsilon, delta)
    if method not in METHODS:
        raise ValueError(f"expected a method out of {', '.join(METHODS)}, got {method!r}")
    if method == "crc":
        return _conformal(loss_MN, epsilon)
    is_below: Callable[[np.ndarray, float, float], bool] = _TESTS[method]
    for index, loss_N in enumerate(loss_MN):
        if not is_below(_checked(loss_N), epsilon, delta):
            return index - 1
    return len(loss_MN) - 1


def upper_bound(loss_N: np.ndarray, delta: float) -> float:
    """The betting bound: the mean of the losses to come is at most this, with probability 1 - delta. At most 1."""
    loss_N = _checked(loss_N)
    low, high = -1.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _betting(loss_N, middle, delta) else (middle, high)
    return high


def binomial_tail(num_losses: int, num_samples: int, probability: float) -> float:
    """P(X <= num_losses) of a binomial X: the exact p-value of "losses come with at least this probability"."""
    if num_losses >= num_samples:
        return 1.0
    counts = np.arange(num_losses + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_samples + 1)))])
    log_choose = log_factorial[num_samples] - log_factorial[counts] - log_factorial[num_samples - counts]
    log_terms = log_choose + counts * math.log(probability) + (num_samples - counts) * math.log1p(-probability)
    return float(min(np.exp(log_terms).sum(), 1.0))


def _betting(loss_N: np.ndarray, epsilon: float, delta: float) -> bool:
    """Whether a gambler who bets that the mean is below epsilon makes 1 / delta of 1; if it is not below, he does so
    with probability at most delta (Ville). He bets by the variance so far, and never more than he has. A set whose own
    mean is above epsilon certifies nothing, whatever he won on the way.
    """
    gain_N, mean = (loss_N + 1) / 2, (epsilon + 1) / 2
    if mean >= 1:
        return True
    place_N = np.arange(1, len(gain_N) + 1)
    middle_N = (0.5 + np.cumsum(gain_N)) / (1 + place_N)
    variance_N = (0.25 + np.cumsum((gain_N - middle_N) ** 2)) / (1 + place_N)
    before_N = np.concatenate([[0.25], variance_N[:-1]])
    stake_N = np.minimum(np.sqrt(2 * math.log(1 / delta) / (len(gain_N) * before_N)), 0.999 / (1 - mean))
    wealth_N = np.cumsum(np.log1p(-stake_N * (gain_N - mean)))
    return bool(wealth_N.max() >= math.log(1 / delta) and loss_N.mean() <= epsilon)


def _binomial(loss_N: np.ndarray, epsilon: float, delta: float) -> bool:
    return epsilon >= 1 or binomial_tail(int((loss_N > 0).sum()), len(loss_N), epsilon) <= delta


def _conformal(loss_MN: Sequence[np.ndarray], epsilon: float) -> int:
    """Losses that are no gains, made to grow from careful to fast: each sample keeps the largest so far."""
    found, worst_N = -1, None
    for index, loss_N in enumerate(loss_MN):
        loss_N = np.maximum(_checked(loss_N), 0)
        worst_N = loss_N if worst_N is None else np.maximum(worst_N, loss_N)
        if (worst_N.sum() + 1) / (len(worst_N) + 1) > epsilon:
            break
        found = index
    return found


_TESTS: Dict[str, Callable[[np.ndarray, float, float], bool]] = {"ucb": _betting, "ltt": _binomial}


def _checked(loss_N: np.ndarray) -> np.ndarray:
    loss_N = np.asarray(loss_N, dtype=np.float64)
    if loss_N.ndim != 1 or not len(loss_N) or not (np.abs(loss_N) <= 1).all():
        raise ValueError("expected losses [N] from -1 to 1, N >= 1")
    return loss_N


def _require_levels(epsilon: float, delta: float) -> None:
    if not (0 < epsilon < 1 and 0 < delta < 1):
        raise ValueError(f"expected 0 < epsilon < 1 and 0 < delta < 1, got {epsilon} and {delta}")
