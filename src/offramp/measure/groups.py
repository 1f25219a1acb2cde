"""Control groups (cgroups) of Linux, versions 1 and 2, that contain this process: memory limits and CPU quotas.

A limit of a group counts everything that its processes cause: also page tables, other kernel memory, and page cache.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Optional, Tuple, Union

Root = Union[str, os.PathLike]
"""Folder that contains `proc` and `sys`."""


class _Hierarchy(NamedTuple):
    """File names of one version of Linux memory cgroups."""

    limits: Tuple[str, ...]
    usage: str
    peak: str
    cache: Tuple[str, ...]
    mapped: str


_V1 = _Hierarchy(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", "memory.max_usage_in_bytes",
    ("total_active_file", "total_inactive_file"), "total_mapped_file",
)  # fmt: skip
_V2 = _Hierarchy(
    ("memory.max", "memory.high"), "memory.current", "memory.peak", ("active_file", "inactive_file"), "file_mapped"
)


class MemoryGroup(NamedTuple):
    """A memory cgroup that has a limit."""

    limit_bytes: int
    usage_bytes: int
    folder: Path
    names: _Hierarchy

    @property
    def free_bytes(self) -> int:
        """Memory that the group can still allocate: its limit minus its usage, plus its unmapped file cache.

        The kernel reclaims that cache before it refuses an allocation.
        """
        stat = table_of(self.folder / "memory.stat")
        cache = sum(stat.get(name, 0) for name in self.names.cache)
        return self.limit_bytes - self.usage_bytes + max(0, cache - stat.get(self.names.mapped, 0))

    @property
    def peak_bytes(self) -> Optional[int]:
        """Most memory that was charged so far, reclaimable page cache included; None before Linux 5.19 (version 2)."""
        return number_of(self.folder / self.names.peak)


def memory_groups(root: Root = "/") -> Iterator[MemoryGroup]:
    """Yield each memory cgroup that has a limit and contains this process, from the outermost."""
    for folder, is_v1 in _folders(Path(root), "memory"):
        names = _V1 if is_v1 else _V2
        limits = [limit for limit in (number_of(folder / name) for name in names.limits) if limit is not None]
        usage = number_of(folder / names.usage)
        if limits and usage is not None:
            yield MemoryGroup(min(limits), usage, folder, names)


def tightest_group(root: Root = "/") -> Optional[MemoryGroup]:
    """Return the group with the least limit of those that contain this process; None: less than the machine has."""
    least = min(memory_groups(root), key=lambda group: group.limit_bytes, default=None)
    return None if least is None or least.limit_bytes >= machine_bytes() else least


def machine_bytes() -> int:
    """Return the memory of the machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cpu_quotas(root: Root = "/") -> Iterator[int]:
    """Yield the CPU quota of each cgroup that has one, rounded up to whole cores."""
    for folder, is_v1 in _folders(Path(root), "cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_v1 else ("cpu.max",)
        words = " ".join(text_of(folder / name) for name in names).split()  # "max", or -1 in v1: no quota
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            yield -(-int(words[0]) // int(words[1]))


def _folders(root: Path, controller: str) -> Iterator[Tuple[Path, bool]]:
    """Yield the folder of each cgroup that contains this process, from the outermost, and whether it is of v1."""
    for line in text_of(root / "proc/self/cgroup").splitlines():
        controllers, _, group = line.partition(":")[2].partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mount = root.joinpath("sys/fs/cgroup", controller if controllers else "")
        # In a container the path may be the one on the host, while the mount point is the container's own group.
        names = [name for name in group.split("/") if name not in ("", "..")]
        for depth in range(len(names) + 1):
            yield mount.joinpath(*names[:depth]), bool(controllers)


def text_of(path: Root) -> str:
    """Return a file without surrounding whitespace; "" if it is absent (another operating system) or hidden."""
    try:
        return Path(path).read_text(errors="surrogateescape").strip()
    except OSError:
        return ""


def table_of(path: Path) -> Dict[str, int]:
    """Return the rows of a file that are a name and a whole number."""
    rows = (line.split() for line in text_of(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def number_of(path: Path) -> Optional[int]:
    """Return the number in a file; None if it is absent or holds something else."""
    text = text_of(path)
    return int(text) if text.isdigit() else None  # "max": no limit
