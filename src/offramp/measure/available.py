"""Memory that this process can still allocate: the minimum over the machine and every memory cgroup that contains it.

An estimate for choosing how to read, not a guarantee: other processes share the same memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Optional, Tuple, Union


class _Hierarchy(NamedTuple):
    """File names of one version of Linux memory cgroups."""

    mount: str
    limits: Tuple[str, ...]
    usage: str
    cache: Tuple[str, ...]
    mapped: str


_V1 = _Hierarchy(
    mount="sys/fs/cgroup/memory",
    limits=("memory.limit_in_bytes",),
    usage="memory.usage_in_bytes",
    cache=("total_active_file", "total_inactive_file"),
    mapped="total_mapped_file",
)
_V2 = _Hierarchy(
    mount="sys/fs/cgroup",
    limits=("memory.max", "memory.high"),
    usage="memory.current",
    cache=("active_file", "inactive_file"),
    mapped="file_mapped",
)


def available_bytes(root: Union[str, os.PathLike] = "/") -> int:
    """Return the memory in bytes that this process can still allocate.

    This is the minimum of MemAvailable and the free memory of all memory cgroups (v1, v2) that contain the process. The
    free memory of a cgroup is its limit minus its usage plus its unmapped file cache, which the kernel reclaims before
    it refuses an allocation. Missing sources are skipped; without any source, the total memory of the machine is
    returned.

    Args:
        root: folder that contains `proc` and `sys`.
    """
    root = Path(root)
    known = [available for available in (_machine_bytes(root), *_cgroup_bytes(root)) if available is not None]
    return max(0, min(known)) if known else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _machine_bytes(root: Path) -> Optional[int]:
    kib = _table(root / "proc/meminfo").get("MemAvailable:")
    return None if kib is None else kib << 10


def _cgroup_bytes(root: Path) -> Iterator[Optional[int]]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        hierarchy = _V1 if controllers else _V2
        # In a container the path may be the one on the host, while the mount point is the container's own group.
        names = [name for name in group.split("/") if name not in ("", "..")]
        for depth in range(len(names) + 1):
            yield _group_bytes(root.joinpath(hierarchy.mount, *names[:depth]), hierarchy)


def _group_bytes(folder: Path, hierarchy: _Hierarchy) -> Optional[int]:
    limits = [limit for limit in (_number(folder / name) for name in hierarchy.limits) if limit is not None]
    usage = _number(folder / hierarchy.usage)
    if not limits or usage is None:
        return None
    stat = _table(folder / "memory.stat")
    cache = sum(stat.get(name, 0) for name in hierarchy.cache)
    return min(limits) - usage + max(0, cache - stat.get(hierarchy.mapped, 0))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # absent or hidden: the source is skipped
        return ""


def _number(path: Path) -> Optional[int]:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None  # "max": no limit


def _table(path: Path) -> Dict[str, int]:
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2}
