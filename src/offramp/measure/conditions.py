"""Conditions of a measurement that change with time: load, free memory, frequency, throttling; and caches and limits.

They are read from files of Linux; what a system does not tell is None. No library is imported.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Dict, Union

from offramp.measure.groups import number_of, text_of
from offramp.measure.hardware import available_bytes, container_bytes

PathLike = Union[str, "os.PathLike[str]"]


def conditions(path: PathLike, root: PathLike = "/") -> Dict[str, Any]:
    """Return what surrounds a measurement as a JSON object.

    Args:
        path: a folder on the disk that is read.
        root: folder that contains `proc` and `sys`.
    """
    cpu = Path(root, "sys/devices/system/cpu/cpu0")
    load = text_of(Path(root, "proc/loadavg")).split()
    return {
        "caches": _caches(cpu / "cache"),
        "memory_limit_bytes": container_bytes(root),
        "available_memory_bytes": available_bytes(root),
        "free_disk_bytes": shutil.disk_usage(path).free,
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
