"""Summary statistics of a few numbers, without the memory cost of importing `statistics` or NumPy."""

from __future__ import annotations

import math
from typing import Sequence, Tuple


def median(values: Sequence[float]) -> float:
    """Return the median; for an even number of values, the mean of the two in the middle."""
    return percentile(values, 50)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of `values` lie, with linear interpolation.

    Definition 7 of Hyndman and Fan, "Sample quantiles in statistical packages", The American Statistician 50(4), 1996;
    the default of NumPy.

    Raises:
        ValueError: no values, or `percent` outside 0..100.
    """
    if not values:
        raise ValueError("values must not be empty")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must lie in 0..100, got {percent}")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def wilson_interval(successes: int, n: int, z: float = 1.96) -> Tuple[float, float]:
    """Return the Wilson score interval of a proportion. The bounds lie in 0..1; `z=1.96` covers 95 %.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
    Statistical Association 22(158), 1927.

    Raises:
        ValueError: `n` below 1, or `successes` outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n with n >= 1, got successes={successes}, n={n}")
    proportion, ratio = successes / n, z * z / n
    centre = proportion + ratio / 2
    half = z * math.sqrt(proportion * (1 - proportion) / n + ratio / (4 * n))
    return max(0.0, (centre - half) / (1 + ratio)), min(1.0, (centre + half) / (1 + ratio))
