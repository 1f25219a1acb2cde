"""Durations as people write them: `40ms`, `0.04s`, `500us`, or a number of seconds."""

from __future__ import annotations

import math
import re
from typing import Union

_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_duration(duration: Union[int, float, str]) -> float:
    """Seconds. Raises ValueError for anything that is not a positive duration."""
    if isinstance(duration, (int, float)) and not isinstance(duration, bool) and 0 < duration < math.inf:
        return float(duration)
    match = None if isinstance(duration, bool) else _DURATION.fullmatch(str(duration))
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None or float(match.group(1)) <= 0:
        raise ValueError(f"a duration is a number above 0 and one of s ms us, like '40ms', not {duration!r}")
    return float(match.group(1)) * unit


def format_duration(seconds: float) -> str:
    """As `12.3 ms`."""
    return f"{seconds * 1e3:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"
