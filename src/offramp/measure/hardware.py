"""Description of the system of a measurement: versions, processor, memory, storage device.

Imports no library to query it.

Contains no names of users, hosts or folders, so records can be published.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple, Union

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
        "library_versions": dict(_library_versions()),
    }
    if path is not None:
        facts["storage"] = _storage(path)
    return _printable(facts)


def machine() -> Dict[str, Any]:
    """Return the facts that identify a machine and survive a kernel update.

    Omits versions, whose lookup would add to the memory of a run.
    """
    system = os.uname()
    facts = {
        "platform": f"{system.sysname} {system.machine}",
        "cpu_model": _cpu_model(),
        "num_cores": num_cores(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
    }
    return _printable(facts)


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu_model() -> Optional[str]:
    lines = [line.split(":", 1) for line in (_text("/proc/cpuinfo") or "").splitlines() if ":" in line]
    names = {key.strip(): value.strip() for key, value in reversed(lines)}
    for key in ("model name", "Model", "Hardware"):  # x86, then two spellings on ARM
        if key in names:
            return names[key]
    return None


def num_cores() -> int:
    """Return the number of cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _library_versions() -> Iterator[Tuple[str, str]]:
    for library in _LIBRARIES:
        version = _version(library)
        if version is not None:
            yield library, version


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
        "file_system": _file_system(Path(path).resolve(), _text("/proc/self/mountinfo") or ""),
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


def _text(path: str) -> Optional[str]:
    try:
        with open(path, errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:  # another operating system, or hidden: unknown
        return None


def _printable(fact: Any) -> Any:
    if isinstance(fact, dict):
        return {key: _printable(value) for key, value in fact.items()}
    if isinstance(fact, str):
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in fact)
    return fact
