"""Divides a model in children, one a fault, for a tracer that spoils the system call number `WHEN` of each process.

`python drive.py MODEL OUT WHEN WHEN_OPENAT FAULT...`, where a fault is `SYSCALL:N`: the child first makes so many calls
of that kind that the N-th one of its division is number WHEN. `plain:0` spoils nothing, `limit:N` limits the size of
files. A `force:` before it replaces an existing store.
Prints the fault, the child's process id and how it ended: an exit code (10 + that of an OfframpError) or -signal.
"""

import contextlib
import os
import resource
import sys
import traceback
from pathlib import Path

import onnx  # noqa: F401 - imported once, for all children

from offramp.division import divide
from offramp.errors import OfframpError
from offramp.store.folders import exchange

NULL = os.open(os.devnull, os.O_RDWR)
ROOT = os.open("/", os.O_RDONLY)
MISSING = Path("missing/x")
CALLS = {
    "write": lambda: os.write(NULL, b"x"),
    "fsync": lambda: os.fsync(NULL),
    "openat": lambda: os.close(os.open(os.devnull, os.O_RDONLY)),
    "mkdir": MISSING.mkdir,
    "rename": lambda: MISSING.rename("missing/y"),
    "unlink": MISSING.unlink,
    "unlinkat": lambda: os.unlink("missing/x", dir_fd=ROOT),
    "rmdir": MISSING.rmdir,
}
"""What makes one call of a kind, as the division does, and changes nothing. Some machines have the `at` forms alone."""
CALLS.update({"mkdirat": CALLS["mkdir"], "renameat": CALLS["rename"]})
CALLS["renameat2"] = lambda: exchange(MISSING, Path("missing/y"))


def spend(syscall: str, count: int) -> None:
    """Make calls that change nothing."""
    for _ in range(count):
        with contextlib.suppress(OSError):
            CALLS[syscall]()


def child(model: str, target: Path, when: int, kind: str, number: int, force: bool) -> int:
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
    elif kind != "plain":
        spend(kind, when - number)
    try:
        divide(model, target, force=force)
    except OfframpError as error:
        return 10 + error.exit_code
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


def main(model: str, out: str, when: str, when_openat: str, *faults: str) -> None:
    lines = []
    for fault in faults:
        *force, kind, number = fault.split(":")
        number_hit = int(when_openat if kind == "openat" else when)
        pid = os.fork()
        if pid == 0:
            os._exit(child(model, Path(out) / fault / "store", number_hit, kind, int(number), bool(force)))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        lines.append(f"{fault} {pid} {status}\n")
    os.write(1, "".join(lines).encode())  # in one call: those of this process are counted too


if __name__ == "__main__":
    main(*sys.argv[1:])
