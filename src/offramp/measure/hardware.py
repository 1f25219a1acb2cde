"""Facts about the machine: its description for records, and the memory that this process can still allocate.

No library is imported to query it. The description contains no names of users, hosts or folders, so records can be
published. Available memory is the minimum over the machine and every memory cgroup that contains the process: an
estimate for choosing how to read, not a guarantee, because other processes share the same memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple, Union

_INSTRUCTIONS = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm", "bf16",
    "sve",
)  # fmt: skip
"""Flags of processors that decide how fast matrix products are, on x86 and on ARM."""
_LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "torch", "transformers", "onnx")


def environment(path: Optional[Union[str, os.PathLike]] = None) -> Dict[str, Any]:
    """Return facts for a record as a JSON object. Control characters are escaped; unknown facts are None.

    Args:
        path: also describe the file system and the device that hold this path, under `"storage"`.

    Raises:
        OSError: the path does not exist.
    """
    import platform  # imported late: as large as this package

    facts: Dict[str, Any] = {
        "offramp_version": _version("offramp"),
        "python_version": platform.python_version(),
        "kernel": os.uname().release,
        **machine(),
        "total_memory_bytes": _memory_bytes(),
        "library_versions": {library: found for library in _LIBRARIES if (found := _version(library)) is not None},
    }
    if path is not None:
        facts["storage"] = _storage(path)
    return _printable(facts)


def machine() -> Dict[str, Any]:
    """Return the facts that identify a machine and survive a kernel update.

    Omits versions, whose lookup would add to the memory of a run.
    """
    system = os.uname()
    facts = {"platform": f"{system.sysname} {system.machine}", "cpu_model": _cpu_model(), "num_cores": num_cores()}
    return _printable({**facts, "memory_gib": round(_memory_bytes() / 2**30, 1)})


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu_model() -> Optional[str]:
    lines = [line.split(":", 1) for line in _text("/proc/cpuinfo").splitlines() if ":" in line]
    names = {key.strip(): value.strip() for key, value in reversed(lines)}
    keys = ("model name", "Model", "Hardware")  # x86, then two spellings on ARM
    return next((names[key] for key in keys if key in names), None)


def instructions() -> Tuple[str, ...]:
    """Return the flags of the processor that decide how fast matrix products are."""
    lines = (line.partition(":") for line in _text("/proc/cpuinfo").splitlines())
    known = {flag for key, _, flags in lines if key.strip() in ("flags", "Features") for flag in flags.split()}
    return tuple(flag for flag in _INSTRUCTIONS if flag in known)


def num_cores(root: Union[str, os.PathLike] = "/") -> int:
    """Return the number of cores that this process may use, at least 1.

    This is the minimum of its affinity and of the CPU quotas of its cgroups, which are rounded up. `root` is the folder
    that contains `proc` and `sys`.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # another operating system, or a sandbox without the call
        cores = os.cpu_count() or 1
    return max(1, min([cores, *_cpu_quotas(Path(root))]))


def _cpu_quotas(root: Path) -> Iterator[int]:
    """Yield the CPU quota of each cgroup that has one, in whole cores."""
    for folder, is_v1 in _cgroups(root, "cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_v1 else ("cpu.max",)
        words = " ".join(_text(folder / name) for name in names).split()  # "max", or -1 in v1: no quota
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            yield -(-int(words[0]) // int(words[1]))


def _version(library: str) -> Optional[str]:
    """Return the installed version of a library, or None if it is not installed."""
    from importlib import metadata  # imported late: costs megabytes of memory

    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _storage(path: Union[str, os.PathLike]) -> Dict[str, Any]:
    device = Path(path).stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    # A partition has no queue folder; the queue is that of its disk, one folder up.
    queues = (f"/sys/dev/block/{name}/queue", f"/sys/dev/block/{name}/../queue")
    read_ahead = _first_text(f"/sys/class/bdi/{name}/read_ahead_kb", *(f"{queue}/read_ahead_kb" for queue in queues))
    return {
        "file_system": _file_system(Path(path).resolve(), _text("/proc/self/mountinfo")),
        "read_ahead_kb": int(read_ahead) if read_ahead else None,
        "io_scheduler": _first_text(*(f"{queue}/scheduler" for queue in queues)),
    }


def _file_system(path: Path, mounts: str) -> Optional[str]:
    """Return the file system type of the innermost mount that contains `path`.

    If several mounts share this mount point, the last one counts.
    """
    kinds: Dict[Path, str] = {}
    for line in mounts.splitlines():  # proc(5): id parent device root point options [fields ...] - type source options
        fields = line.split()
        point = os.fsencode(fields[4]).decode("unicode_escape").encode("latin-1")  # a space is written \040
        kinds[Path(os.fsdecode(point))] = fields[fields.index("-", 6) + 1]
    return next((kinds[point] for point in (path, *path.parents) if point in kinds), None)


def _first_text(*paths: str) -> Optional[str]:
    return next((text for text in map(_text, paths) if text), None)


def _text(path: Union[str, os.PathLike]) -> str:
    """Return a file without surrounding whitespace; "" if it is absent (another operating system) or hidden."""
    try:
        return Path(path).read_text(errors="surrogateescape").strip()
    except OSError:
        return ""


def _printable(fact: Any) -> Any:
    if isinstance(fact, dict):
        return {key: _printable(value) for key, value in fact.items()}
    if isinstance(fact, str):
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in fact)
    return fact


class _Hierarchy(NamedTuple):
    """File names of one version of Linux memory cgroups."""

    limits: Tuple[str, ...]
    usage: str
    cache: Tuple[str, ...]
    mapped: str


_V1 = _Hierarchy(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"), "total_mapped_file",
)  # fmt: skip
_V2 = _Hierarchy(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"), "file_mapped")


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
    free = (limit - usage + cache for limit, usage, cache in _groups(root))
    known = [available for available in (_machine_bytes(root), *free) if available is not None]
    return max(0, min(known)) if known else _memory_bytes()


def container_bytes(root: Union[str, os.PathLike] = "/") -> Optional[int]:
    """Return the least limit in bytes of the memory cgroups that contain the process; None: less than the machine has.

    `root` is the folder that contains `proc` and `sys`.
    """
    least = min((limit for limit, *_ in _groups(Path(root))), default=None)
    return None if least is None or least >= _memory_bytes() else least


def address_space_bytes() -> Optional[int]:
    """Return the bytes that this process can still map under its limit (`ulimit -v`), or None without a limit."""
    import resource  # not available on every system

    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _text("/proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return max(0, limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE"))


def _machine_bytes(root: Path) -> Optional[int]:
    kib = _table(root / "proc/meminfo").get("MemAvailable:")
    return None if kib is None else kib << 10


def _groups(root: Path) -> Iterator[Tuple[int, int, int]]:
    """Yield (limit, usage, unmapped file cache) in bytes of each memory cgroup that has a limit."""
    for folder, is_v1 in _cgroups(root, "memory"):
        hierarchy = _V1 if is_v1 else _V2
        limits = [limit for limit in (_number(folder / name) for name in hierarchy.limits) if limit is not None]
        usage = _number(folder / hierarchy.usage)
        if limits and usage is not None:
            stat = _table(folder / "memory.stat")
            cache = sum(stat.get(name, 0) for name in hierarchy.cache)
            yield min(limits), usage, max(0, cache - stat.get(hierarchy.mapped, 0))


def _cgroups(root: Path, controller: str) -> Iterator[Tuple[Path, bool]]:
    """Yield the folder of each cgroup that contains this process, from the outermost, and whether it is of v1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        controllers, _, group = line.partition(":")[2].partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mount = root.joinpath("sys/fs/cgroup", controller if controllers else "")
        # In a container the path may be the one on the host, while the mount point is the container's own group.
        names = [name for name in group.split("/") if name not in ("", "..")]
        for depth in range(len(names) + 1):
            yield mount.joinpath(*names[:depth]), bool(controllers)


def _number(path: Path) -> Optional[int]:
    text = _text(path)
    return int(text) if text.isdigit() else None  # "max": no limit


def _table(path: Path) -> Dict[str, int]:
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}
