"""A memory limit for a process: a cgroup of its own, version 1 or 2. Needs root.

The limit counts the page cache that the process causes, too. The group vanishes with the `with` block, and what still
runs in it then is killed.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.measure.groups import number_of, table_of

ROOT = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
REMOVAL_SECONDS = 10


@dataclass(frozen=True)
class MemoryGroup:
    """A group that commands can be started in."""

    folder: Path
    is_v1: bool

    def around(self, command: Sequence[str]) -> list[str]:
        """Return the command that enters the group and then becomes `command`."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    def limit(self, num_bytes: int) -> None:
        """Set the limit; swap, which would get around it, is not used."""
        if self.is_v1:
            (self.folder / "memory.limit_in_bytes").write_text(str(num_bytes))
            (self.folder / "memory.swappiness").write_text("0")
            return
        (self.folder / "memory.max").write_text(str(num_bytes))
        if (self.folder / "memory.swap.max").exists():
            (self.folder / "memory.swap.max").write_text("0")

    def usage(self) -> dict[str, int | None]:
        """Return the most memory that was charged so far, page cache included, the number of times that the limit was
        hit, and the number of processes that the kernel killed for it. None: this kernel does not say.
        """
        if self.is_v1:
            killed = table_of(self.folder / "memory.oom_control").get("oom_kill")
            peak_bytes, hits = (number_of(self.folder / f"memory.{name}") for name in ("max_usage_in_bytes", "failcnt"))
            return {"charged_peak_bytes": peak_bytes, "hits": hits, "killed": killed}
        events = table_of(self.folder / "memory.events")
        peak_bytes = number_of(self.folder / "memory.peak")
        return {"charged_peak_bytes": peak_bytes, "hits": events.get("max"), "killed": events.get("oom_kill")}


def missing(root: Path = ROOT) -> str | None:
    """Return what keeps a group from being made here, or None."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.access(DROP_CACHES, os.W_OK):
        return "the page cache cannot be dropped here"
    try:
        with memory_group(1 << 30, root):
            return None
    except OSError as error:
        return f"no memory cgroup can be made here ({error.strerror})"


@contextlib.contextmanager
def memory_group(limit_bytes: int, root: Path = ROOT) -> Iterator[MemoryGroup]:
    """Context manager of a group with a limit. Raises OSError where the system does not let one be made."""
    is_v1 = (root / "memory" / "memory.limit_in_bytes").exists()
    if not is_v1:
        (root / "cgroup.subtree_control").write_text("+memory")
    with group(root / "memory" if is_v1 else root) as folder:
        made = MemoryGroup(folder, is_v1)
        made.limit(limit_bytes)
        yield made


@contextlib.contextmanager
def group(controller: Path) -> Iterator[Path]:
    """Context manager of a new group below a controller."""
    folder = controller / f"offramp-bench-{os.getpid()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """End what runs in the group and remove it; the kernel may need a moment for either."""
    deadline = time.monotonic() + REMOVAL_SECONDS
    while True:
        for process in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def drop_caches() -> None:
    """Empty the page cache."""
    os.sync()
    DROP_CACHES.write_text("3")
