"""Statistics of measurements that are repeated in rounds: paired bootstrap, correction of tables, verdicts.

All comparisons of the house use these functions. They resample from a fixed seed, so that equal records give equal
figures. A few rounds give percentile intervals that are too narrow; intervals and p-values are corrected for it with
Student's distribution (Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69(4),
2015, section "expanded percentile interval").

Shapes: R rounds, U timed units of a round (texts, or one total), D draws.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

CONFIDENCE = 0.95
"""Level of all intervals."""
NUM_DRAWS = 2000
MOST_UNITS = 8192
"""Most units of a round that are resampled one by one; neighbours of more are resampled together."""
_MOST_INDICES = 10_000_000
"""Most indices of resamples that are in memory at once: 80 MB."""
FEWEST_SAMPLES = 5
"""Fewest rounds with an interval. The interval of a median of fewer is at most their range, which covers less: 75 % for
three rounds, 94 % for five."""
POWER = 0.8
"""Probability with which an effect of the detectable size is found."""
SIGNIFICANT = 0.05
"""Largest p-value, corrected for the rows of a table, with which a row is decided."""
MEDIAN_FREEDOM = 12
"""Most degrees of freedom of the p-value of a median. The bootstrap error of a median stays uncertain, however many
rounds there are: with those of Student's distribution for a mean, 0.40, 0.54 and 0.65 % of equal pairs of 20, 30 and 50
rounds had p <= 0.25 %, which is the level of the first of 20 rows."""
MET, MISSED, INCONCLUSIVE = "met", "missed", "inconclusive"


class Estimate(NamedTuple):
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Comparison(NamedTuple):
    """A paired ratio or difference. Without an interval (few rounds) `low`, `high`, `p` and `detectable` are None."""

    value: float
    low: Optional[float]
    high: Optional[float]
    p: Optional[float]
    """Two-sided p-value of the hypothesis that both sides are equal."""
    detectable: Optional[float]
    """Minimum detectable effect: a deviation from equality of this size is found with the probability POWER."""
    error: Optional[float] = None
    """Standard error, corrected for few samples."""
    freedom: int = 0
    """Degrees of freedom of the p-value."""

    def p_of(self, truth: float) -> float:
        """Return the two-sided p-value of the hypothesis that the true value is this one; 1 without an interval."""
        if self.error is None:
            return 1.0
        # Counting draws beyond the truth could not give less than one of them, whatever the effect.
        effect = abs(self.value - truth)
        return 2 * _student(-effect / self.error, self.freedom) if self.error > 0 else float(effect == 0)


def bootstrap(statistic: Callable[..., float], sizes: Sequence[int], num_rounds: int) -> Tuple[float, List[float]]:
    """Return a statistic of paired samples, and that of each resample.

    Args:
        statistic: called with one array of indices for each axis of the samples, which it must apply to both sides.
        sizes: the length of each axis. Each axis is resampled with replacement, from a fixed seed.
        num_rounds: number of resamples.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    generator = np.random.default_rng(0)
    value = statistic(*map(np.arange, sizes))
    return value, [statistic(*(generator.integers(0, size, size) for size in sizes)) for _ in range(num_rounds)]


def paired_ratio(base_RU: np.ndarray, other_RU: np.ndarray) -> Comparison:
    """Return the median over rounds of the ratio of `other` to `base`, both summed over the units of a round.

    The sides were measured alternately: round r of both under similar conditions. Rounds and units are resampled alike
    for both. Raises ValueError for arrays of different shapes, and for values that are not positive and finite.
    """
    base_RU, other_RU = np.asarray(base_RU, np.float64), np.asarray(other_RU, np.float64)
    if base_RU.shape != other_RU.shape or base_RU.ndim != 2 or not base_RU.size:
        raise ValueError(f"expected two arrays of one shape [R, U], got {base_RU.shape} and {other_RU.shape}")
    both = np.stack([base_RU, other_RU])
    if not (np.isfinite(both).all() and (both > 0).all()):
        raise ValueError("expected positive finite values")

    value = float(np.median(other_RU.sum(axis=1) / base_RU.sum(axis=1)))
    if base_RU.shape[1] > MOST_UNITS:
        starts = np.arange(MOST_UNITS) * base_RU.shape[1] // MOST_UNITS
        base_RU, other_RU = (np.add.reduceat(side_RU, starts, axis=1) for side_RU in (base_RU, other_RU))
    num_rounds, num_units = base_RU.shape
    rounds_DR, counts_DU = _paired_draws(num_rounds, num_units)
    ratios_DR = (counts_DU @ other_RU.T) / (counts_DU @ base_RU.T)
    draws_D = np.median(np.take_along_axis(ratios_DR, rounds_DR, axis=1), axis=1)
    return judged(value, draws_D, num_rounds, equal=1.0, freedom=MEDIAN_FREEDOM)


def median_interval(values_R: Sequence[float]) -> Comparison:
    """Return the median of the figures of rounds with its corrected interval, as a comparison with 0."""
    array_R = np.asarray(values_R, np.float64)
    draws_DR = array_R[resamples(len(array_R))]
    medians_D = np.median(draws_DR, axis=1)
    return judged(float(np.median(array_R)), medians_D, len(array_R), equal=0.0, freedom=MEDIAN_FREEDOM)


@lru_cache(maxsize=2)
def resamples(size: int, num_draws: int = NUM_DRAWS) -> np.ndarray:
    """Return the indices [D, size] of the samples of each draw: those that `bootstrap` takes for one axis."""
    return np.random.default_rng(0).integers(0, size, (num_draws, size))


def resampled(size: int, num_draws: int) -> Iterator[np.ndarray]:
    """Yield `resamples` in parts [D, size] that take little memory: all at once, but for many samples."""
    if size * num_draws <= _MOST_INDICES:
        yield resamples(size, num_draws)
        return
    generator, at_once = np.random.default_rng(0), max(1, _MOST_INDICES // size)
    for first in range(0, num_draws, at_once):
        yield generator.integers(0, size, (min(at_once, num_draws - first), size))


@lru_cache(maxsize=2)
def _paired_draws(num_rounds: int, num_units: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return the rounds of each draw, and how often it has each unit: all at once, for the many rows of a table."""
    generator = np.random.default_rng(0)
    rounds_DR = generator.integers(0, num_rounds, (NUM_DRAWS, num_rounds))
    return rounds_DR, generator.multinomial(num_units, np.full(num_units, 1 / num_units), NUM_DRAWS).astype(np.float64)


def judged(
    value: float, draws_D: np.ndarray, num_samples: int, equal: float, freedom: Optional[int] = None
) -> Comparison:
    """Return a statistic with its corrected interval, p-value and detectable effect, from its bootstrap draws.

    Args:
        value: the statistic of the samples.
        draws_D: that of each resample.
        num_samples: number of independent samples, which the correction is for: usually that of rounds.
        equal: the value of the statistic where both sides are equal.
        freedom: most degrees of freedom of the p-value, of a statistic that has fewer than a mean: MEDIAN_FREEDOM.
    """
    if num_samples < FEWEST_SAMPLES:
        return Comparison(value, None, None, None, None)
    level = _expanded((1 - CONFIDENCE) / 2, num_samples)
    low, high = np.percentile(draws_D, [100 * level, 100 * (1 - level)])
    spread, most = float(draws_D.std()), num_samples - 1
    error = spread * math.sqrt(num_samples / most)
    detectable = (_normal_quantile(1 - level) + _normal_quantile(POWER)) * spread
    found = Comparison(value, float(low), float(high), None, detectable, error, min(most, freedom or most))
    return found._replace(p=found.p_of(equal))


def holm(p_values: Sequence[float]) -> List[float]:
    """Return the p-values of a table, corrected for the number of its rows.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6(2), 1979.
    """
    corrected, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def verdict(low: Optional[float], high: Optional[float], at_most: float) -> str:
    """Return whether a value with this interval keeps a target: MET, MISSED, or INCONCLUSIVE.

    INCONCLUSIVE: the interval contains the target, or there is none. For a lower limit, negate all three.
    """
    if low is None or high is None or math.isnan(low) or math.isnan(high) or low <= at_most < high:
        return INCONCLUSIVE
    return MET if high <= at_most else MISSED


def table_verdicts(rows: Sequence[Comparison], at_most: float) -> List[Tuple[str, float]]:
    """Return the verdict of each row of a table on one target, and its p-value, corrected for the number of rows.

    As between two sides, a verdict needs both: the interval lies on one side of the target, and the corrected p-value
    of the target being the truth is at most SIGNIFICANT. A row that does not vary is decided by its value.
    """
    corrected = holm([0.0 if row.error == 0 else row.p_of(at_most) for row in rows])
    found = [verdict(row.low, row.high, at_most) for row in rows]
    return [(each if p <= SIGNIFICANT else INCONCLUSIVE, p) for each, p in zip(found, corrected)]


@lru_cache(maxsize=64)
def _expanded(level: float, num_samples: int) -> float:
    """Return the percentile level of a bootstrap that stands for `level`, which is below 0.5."""
    student = _student_quantile(level, num_samples - 1)
    return _normal(student * math.sqrt(num_samples / (num_samples - 1)))


def _normal(value: float) -> float:
    """Return the cumulative probability of the normal distribution."""
    return math.erfc(-value / math.sqrt(2)) / 2


@lru_cache(maxsize=64)
def _normal_quantile(level: float) -> float:
    return _inverse(_normal, level)


def _student(value: float, freedom: int) -> float:
    """Return the cumulative probability of Student's distribution with a whole number of degrees of freedom.

    Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.7.3 and 26.7.4.
    """
    if freedom > 300:  # the distributions differ by less than 1e-3
        return _normal(value)
    angle = math.atan2(value, math.sqrt(freedom))
    cosine, is_odd = math.cos(angle), freedom % 2
    term = cosine if is_odd else 1.0
    total = 0.0 if freedom == 1 else term
    for index in range(2 + is_odd, freedom - 1, 2):
        term *= cosine**2 * (index - 1) / index
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if is_odd else math.sin(angle) * total
    return (1 + inside) / 2


def _student_quantile(level: float, freedom: int) -> float:
    return _inverse(lambda value: _student(value, freedom), level)


def _inverse(function: Callable[[float], float], level: float) -> float:
    """Return where an increasing function of the real line reaches `level`, by bisection."""
    low, high = -1e4, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < level else (low, middle)
    return (low + high) / 2
