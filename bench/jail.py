"""A stand-in for a small board: memory and disk-read limits by cgroups (version 1), for the processes that are put in.

The memory limit counts the page cache that the processes cause, too. Needs root. The groups vanish with the `with`
block, and what still runs in them then is killed.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.experiments.groups import DROP_CACHES, MemoryGroup, group

MEMORY = Path("/sys/fs/cgroup/memory")
DISK = Path("/sys/fs/cgroup/blkio")


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


@dataclass(frozen=True)
class Jail:
    """Groups that a command can be started in."""

    groups: tuple[Path, ...]

    def around(self, command: Sequence[str]) -> list[str]:
        """The command that enters the groups and then becomes `command`."""
        script = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo $$ > "$1"; shift; n=$((n - 1)); done; exec "$@"'
        doors = [str(each / "cgroup.procs") for each in self.groups]
        return ["/bin/sh", "-c", script, "jail", str(len(doors)), *doors, *command]

    def usage(self) -> dict[str, int | None]:
        """The most memory that was charged so far, page cache included, and how often the limit was hit."""
        found = MemoryGroup(next(each for each in self.groups if MEMORY in each.parents), True).usage()
        return {"charged_peak_bytes": found["charged_peak_bytes"], "failcnt": found["hits"]}


@contextlib.contextmanager
def jail(
    *, memory_bytes: int | None = None, read_bytes_per_second: int | None = None, folder: Path | None = None
) -> Iterator[Jail]:
    """A jail with one or both limits; `folder` lies on the disk whose reads are limited."""
    with contextlib.ExitStack() as stack:
        groups = []
        if memory_bytes is not None:
            groups.append(stack.enter_context(group(MEMORY)))
            MemoryGroup(groups[-1], True).limit(memory_bytes)
        if read_bytes_per_second is not None:
            if folder is None:
                raise ValueError("a limit of reads needs a folder that tells the disk")
            groups.append(stack.enter_context(group(DISK)))
            limit = f"{disk_of(folder)} {read_bytes_per_second}"
            (groups[-1] / "blkio.throttle.read_bps_device").write_text(limit)
        yield Jail(tuple(groups))
