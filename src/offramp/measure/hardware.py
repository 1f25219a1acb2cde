"""Facts about the machine: its description for records, and the memory that this process can still allocate.

No library is imported to query it. The description contains no names of users, hosts or folders, so records can be
published. Available memory is the minimum over the machine and every memory cgroup that contains the process: an
estimate for choosing how to read, not a guarantee, because other processes share the same memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

from offramp.measure.groups import cpu_quotas, machine_bytes, memory_groups, table_of, text_of, tightest_group

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
        "total_memory_bytes": machine_bytes(),
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
    return _printable({**facts, "memory_gib": round(machine_bytes() / 2**30, 1)})


def _cpu_model() -> Optional[str]:
    lines = [line.split(":", 1) for line in text_of("/proc/cpuinfo").splitlines() if ":" in line]
    names = {key.strip(): value.strip() for key, value in reversed(lines)}
    keys = ("model name", "Model", "Hardware")  # x86, then two spellings on ARM
    return next((names[key] for key in keys if key in names), None)


class Threads(NamedTuple):
    """A number of threads, and what sets it: `affinity`, `cpu quota`, `OMP_NUM_THREADS`, or `option`."""

    number: int
    source: str


def instructions() -> Tuple[str, ...]:
    """Return the flags of the processor that decide how fast matrix products are."""
    lines = (line.partition(":") for line in text_of("/proc/cpuinfo").splitlines())
    known = {flag for key, _, flags in lines if key.strip() in ("flags", "Features") for flag in flags.split()}
    return tuple(flag for flag in _INSTRUCTIONS if flag in known)


def num_cores(root: Union[str, os.PathLike] = "/") -> int:
    """Return the number of cores that this process may use, at least 1.

    This is the minimum of its affinity and of the CPU quotas of its cgroups, which are rounded up. `root` is the folder
    that contains `proc` and `sys`.
    """
    return min(_core_limits(root)).number


def default_threads(root: Union[str, os.PathLike] = "/") -> Threads:
    """Return the threads of a backend where none are asked for: `num_cores`, or `OMP_NUM_THREADS` if that is fewer.

    Of a list, as OpenMP takes it for nested regions, the first number counts. Anything else is ignored, as by OpenMP.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    asked = [Threads(int(first), "OMP_NUM_THREADS")] if first.isdecimal() and int(first) else []
    return min([*_core_limits(root), *asked], key=lambda limit: limit.number)


def _core_limits(root: Union[str, os.PathLike]) -> List[Threads]:
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # another operating system, or a sandbox without the call
        cores = os.cpu_count() or 1
    quotas = [Threads(max(quota, 1), "cpu quota") for quota in cpu_quotas(root)]
    return [Threads(cores, "affinity"), *quotas]


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
        "file_system": _file_system(Path(path).resolve(), text_of("/proc/self/mountinfo")),
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
    return next((text for text in map(text_of, paths) if text), None)


def _printable(fact: Any) -> Any:
    if isinstance(fact, dict):
        return {key: _printable(value) for key, value in fact.items()}
    if isinstance(fact, str):
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in fact)
    return fact


def available_bytes(root: Union[str, os.PathLike] = "/") -> int:
    """Return the memory in bytes that this process can still allocate.

    This is the minimum of MemAvailable and the free memory of all memory cgroups (v1, v2) that contain the process.
    Missing sources are skipped; without any source, the total memory of the machine is returned.

    Args:
        root: folder that contains `proc` and `sys`.
    """
    free = (group.free_bytes for group in memory_groups(root))
    known = [available for available in (_machine_bytes(Path(root)), *free) if available is not None]
    return max(0, min(known)) if known else machine_bytes()


def container_bytes(root: Union[str, os.PathLike] = "/") -> Optional[int]:
    """Return the least limit in bytes of the memory cgroups that contain the process; None: less than the machine has.

    `root` is the folder that contains `proc` and `sys`.
    """
    group = tightest_group(root)
    return None if group is None else group.limit_bytes


def address_space_bytes() -> Optional[int]:
    """Return the bytes that this process can still map under its limit (`ulimit -v`), or None without a limit."""
    import resource  # not available on every system

    limit, pages = resource.getrlimit(resource.RLIMIT_AS)[0], text_of("/proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return max(0, limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE"))


def _machine_bytes(root: Path) -> Optional[int]:
    kib = table_of(root / "proc/meminfo").get("MemAvailable:")
    return None if kib is None else kib << 10
