"""Parsing and formatting of byte sizes (`300MB`, `0.3GB`, `300MiB`) and durations (`40ms`, `0.04s`, `500us`).

A text needs a unit, because a number alone is taken for MiB or ms as often as for bytes or seconds. A number that is no
text is bytes or seconds.
"""

from __future__ import annotations

import math
import re
from numbers import Integral
from typing import Union

_DECIMAL = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {unit + end: 1 << bits for unit, bits in zip("kmgt", (10, 20, 30, 40)) for end in ("", "i", "ib")}
_SIZE_UNITS = {**_DECIMAL, **_BINARY}
"""Unit in lower case -> bytes. `128M` is 128 MiB, as in Docker, and so is `128Mi`, as in Kubernetes."""
_TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_NEARLY_ONE = 0.9995
"""Smallest number of units that is formatted in them: it is rounded to 1.00."""
_QUANTITY = re.compile(r"(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)
"""A number and its unit. Numbers of more digits would leave the range of floats, where they are compared and shown."""


def parse_size(size: Union[int, str]) -> int:
    """Return a size in bytes. Raises ValueError for anything that is not a positive size, and a text without a unit."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ValueError(f"a size must be an integer or a text like '128MiB', got {size!r}")
    match = _QUANTITY.fullmatch(f"{size}B" if isinstance(size, int) else size.strip())
    if match and not match.group(2) and float(match.group(1)) > 0:
        meant = "B" if float(match.group(1)) >= 1 << 20 else "MiB"
        raise ValueError(f"a size must have a unit, got {size!r}: {match.group(1)}{meant}?")
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
    """Return the size as exact text that `--budget` accepts, such as `128MiB`, `512KiB` or `1000B`."""
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if num_bytes % (1 << shift) == 0:
            return f"{num_bytes >> shift}{unit}"
    return f"{num_bytes}B"


def mib(num_bytes: float, digits: int = 1) -> str:
    """Return a size in MiB, whatever it is, as a column of a table has it."""
    return f"{num_bytes / 2**20:,.{digits}f} MiB"


def ms(seconds: float, digits: int = 1) -> str:
    """Return a duration in milliseconds, whatever it is, as a column of a table has it."""
    return f"{seconds * 1e3:,.{digits}f} ms"


def named_budget(num_bytes: int) -> str:
    """Return the size, rounded up to whole MiB, as text that `--budget` accepts."""
    return named_size(-(-num_bytes >> 20) << 20)


def named_duration(seconds: float) -> str:
    """Return a duration above 0, rounded up to three digits, as text that `--deadline` accepts, such as `12.3ms`."""
    decimals = 2 - math.floor(math.log10(seconds * 1e3))
    return f"{math.ceil(seconds * 1e3 * 10**decimals) / 10**decimals:.{max(decimals, 0)}f}ms"


def format_size(num_bytes: float) -> str:
    """Return the size with at least three digits: in MiB, or below it in KiB or bytes. The format of all messages."""
    for unit, unit_bytes in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(num_bytes) >= _NEARLY_ONE * unit_bytes:
            return f"{_three_digits(num_bytes / unit_bytes)} {unit}"
    return f"{num_bytes:.4g} B"


def _three_digits(number: float) -> str:
    return f"{number:.{2 if abs(number) < 9.995 else 1}f}"


def parse_duration(duration: Union[int, float, str]) -> float:
    """Return a duration in seconds. Raises ValueError for anything that is not a positive duration, and a text without
    a unit.
    """
    if isinstance(duration, (int, float)) and not isinstance(duration, bool) and 0 < duration < math.inf:
        return float(duration)
    match = None if isinstance(duration, bool) else _QUANTITY.fullmatch(str(duration).strip())
    if match and not match.group(2) and float(match.group(1)) > 0 and isinstance(duration, str):
        meant = "ms" if float(match.group(1)) >= 1 else "s"
        raise ValueError(f"a duration must have a unit, got {duration!r}: {match.group(1)}{meant}?")
    unit = _TIME_UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None or float(match.group(1)) <= 0:
        raise ValueError(f"a duration must be a number above 0 and one of s ms us, like '40ms', got {duration!r}")
    return float(match.group(1)) * unit


def format_duration(seconds: float) -> str:
    """Return the duration with at least three digits, such as `12.3 ms` or `1.50 s`. The format of all messages."""
    for unit, unit_seconds, least in (("min", 60, 2), ("s", 1, _NEARLY_ONE), ("ms", 1e-3, _NEARLY_ONE)):
        if abs(seconds) >= least * unit_seconds:
            return f"{_three_digits(seconds / unit_seconds)} {unit}"
    return f"{seconds * 1e6:.4g} us"
