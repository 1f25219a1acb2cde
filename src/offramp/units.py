"""Parsing and formatting of byte sizes (`300MB`, `0.3GB`, `300MiB`) and durations (`40ms`, `0.04s`, `500us`)."""

from __future__ import annotations

import math
import re
from numbers import Integral
from typing import Union

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
_TIME_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_size(size: Union[int, str]) -> int:
    """Return a size in bytes. Raises ValueError for anything that is not a positive size."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ValueError(f"a size must be an integer or a text like '128MiB', got {size!r}")
    match = _SIZE.fullmatch(str(size))
    unit = _SIZE_UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"a size must be a number and one of B KB MB GB KiB MiB GiB, like '128MiB', got {size!r}")
    num_bytes = int(float(match.group(1)) * unit) if "." in match.group(1) else int(match.group(1)) * unit
    if num_bytes <= 0:
        raise ValueError(f"a size must be positive, got {size!r}")
    return num_bytes


def parse_count(count: Union[int, str]) -> int:
    """Return a whole number of at least 1. Raises ValueError for anything else."""
    is_number = isinstance(count, Integral) and not isinstance(count, bool)  # NumPy integers as well
    is_text = isinstance(count, str) and count.isascii() and count.isdigit()
    if not (is_number or is_text) or int(count) < 1:
        raise ValueError(f"a whole number of at least 1, not {count!r}")
    return int(count)


def named_size(num_bytes: int) -> str:
    """Return the size as exact text that `--budget` accepts, such as `128MiB` or `1000B`."""
    return f"{num_bytes >> 20}MiB" if num_bytes % (1 << 20) == 0 else f"{num_bytes}B"


def format_size(num_bytes: float) -> str:
    """Return the size in MiB with one decimal, the format of all messages."""
    return f"{num_bytes / (1 << 20):.1f} MiB"


def parse_duration(duration: Union[int, float, str]) -> float:
    """Return a duration in seconds. Raises ValueError for anything that is not a positive duration."""
    if isinstance(duration, (int, float)) and not isinstance(duration, bool) and 0 < duration < math.inf:
        return float(duration)
    match = None if isinstance(duration, bool) else _DURATION.fullmatch(str(duration))
    unit = _TIME_UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None or float(match.group(1)) <= 0:
        raise ValueError(f"a duration must be a number above 0 and one of s ms us, like '40ms', got {duration!r}")
    return float(match.group(1)) * unit


def format_duration(seconds: float) -> str:
    """Return the duration as text with four significant digits, such as `12.3 ms` or `1.5 s`."""
    return f"{seconds * 1e3:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"
