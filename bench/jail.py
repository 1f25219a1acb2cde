"""A stand-in for a small board: memory and disk-read limits by cgroups (version 1), for the processes that are put in.

The memory limit counts the page cache that the processes cause, too. Needs root. The groups vanish with the `with`
block, and what still runs in them then is killed.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MEMORY = Path("/sys/fs/cgroup/memory")
DISK = Path("/sys/fs/cgroup/blkio")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
REMOVAL_SECONDS = 10


def missing(folder: Path, *, disk: bool = False) -> str | None:
    """What keeps a jail from being built here, or None; `disk`: for one that limits reads of `folder`."""
    if os.geteuid() != 0:
        return "needs root"
    if not (MEMORY / "memory.limit_in_bytes").exists():
        return "needs cgroup v1 with the memory controller"
    if not os.access(DROP_CACHES, os.W_OK):
        return "may not drop the page cache"
    if disk and not (DISK / "blkio.throttle.read_bps_device").exists():
        return "needs cgroup v1 with the blkio controller"
    if disk and disk_of(folder) is None:
        return "the folder lies on no disk of its own"
    return None


def disk_of(path: Path) -> str | None:
    """MAJOR:MINOR of the whole disk below `path`, which alone can be throttled; None where there is none."""
    device = path.stat().st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not node.exists():
        return None
    node = node.resolve()
    return ((node.parent if (node / "partition").exists() else node) / "dev").read_text().strip()


def drop_caches() -> None:
    """Empty the page cache."""
    os.sync()
    DROP_CACHES.write_text("3")


@dataclass(frozen=True)
class Jail:
    """Groups that a command can be started in."""

    groups: tuple[Path, ...]

    def around(self, command: Sequence[str]) -> list[str]:
        """The command that enters the groups and then becomes `command`."""
        script = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo $$ > "$1"; shift; n=$((n - 1)); done; exec "$@"'
        doors = [str(group / "cgroup.procs") for group in self.groups]
        return ["/bin/sh", "-c", script, "jail", str(len(doors)), *doors, *command]

    def usage(self) -> dict[str, int]:
        """The most memory that was charged so far, page cache included, and how often the limit was hit."""
        memory = next(group for group in self.groups if MEMORY in group.parents)
        names = {"charged_peak_bytes": "memory.max_usage_in_bytes", "failcnt": "memory.failcnt"}
        return {key: int((memory / name).read_text()) for key, name in names.items()}


@contextlib.contextmanager
def jail(
    *, memory_bytes: int | None = None, read_bytes_per_second: int | None = None, folder: Path | None = None
) -> Iterator[Jail]:
    """A jail with one or both limits; `folder` lies on the disk whose reads are limited."""
    with contextlib.ExitStack() as stack:
        groups = []
        if memory_bytes is not None:
            groups.append(stack.enter_context(_group(MEMORY)))
            (groups[-1] / "memory.limit_in_bytes").write_text(str(memory_bytes))
            (groups[-1] / "memory.swappiness").write_text("0")  # a limit that swap gets around would be none
        if read_bytes_per_second is not None:
            if folder is None:
                raise ValueError("a limit of reads needs a folder that tells the disk")
            groups.append(stack.enter_context(_group(DISK)))
            limit = f"{disk_of(folder)} {read_bytes_per_second}"
            (groups[-1] / "blkio.throttle.read_bps_device").write_text(limit)
        yield Jail(tuple(groups))


@contextlib.contextmanager
def _group(controller: Path) -> Iterator[Path]:
    group = controller / f"offramp-bench-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """End what runs in the group and remove it; the kernel may need a moment for either."""
    deadline = time.monotonic() + REMOVAL_SECONDS
    while True:
        for process in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)
