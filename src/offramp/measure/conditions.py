"""Conditions of a measurement that change with time: load, free memory, frequency, throttling; and caches and limits.

They are read from files of Linux; what a system does not tell is None. No library is imported.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Dict, Optional, Union

from offramp.measure.groups import number_of, text_of
from offramp.measure.hardware import available_bytes, container_bytes, environment

PathLike = Union[str, "os.PathLike[str]"]


def surroundings(path: PathLike = "") -> Dict[str, Any]:
    """Return what a record says of the machine and its conditions: `environment` and `conditions` as one object.

    Args:
        path: a folder on the disk that is read; of one that is not there, nothing is said of a disk.
    """
    place = path if os.path.exists(path) else None  # noqa: PTH110  # Path may raise
    return {**environment(place), **conditions(place)}


def conditions(path: Optional[PathLike], root: PathLike = "/") -> Dict[str, Any]:
    """Return what surrounds a measurement as a JSON object.

    Args:
        path: a folder on the disk that is read; None: unknown.
        root: folder that contains `proc` and `sys`.
    """
    cpu = Path(root, "sys/devices/system/cpu/cpu0")
    load = text_of(Path(root, "proc/loadavg")).split()
    return {
        "caches": _caches(cpu / "cache"),
        "memory_limit_bytes": container_bytes(root),
        "available_memory_bytes": available_bytes(root),
        "free_disk_bytes": None if path is None else shutil.disk_usage(path).free,
        "load_1min": float(load[0]) if load else None,
        "frequency_khz": number_of(cpu / "cpufreq/scaling_cur_freq"),
        "governor": text_of(cpu / "cpufreq/scaling_governor") or None,
        "throttle_count": number_of(cpu / "thermal_throttle/core_throttle_count"),
    }


def _caches(folder: Path) -> Dict[str, str]:
    """Return the size of each cache of the first core, such as {"L1 Data": "32K"}."""
    found = {}
    for cache in sorted(folder.glob("index*")):
        level, kind, size = (text_of(cache / name) for name in ("level", "type", "size"))
        if level and size:
            found[f"L{level} {kind}"] = size
    return found
