"""A process that has imported what the commands need and runs each trial in a forked child.

`python -m tests.reliability.zygote KIND` reads one JSON job a line and prints one JSON result a line. A start of Python
with ONNX Runtime takes half a second and with PyTorch three, a fork some milliseconds. Nothing of offramp runs in the
process that is forked, so each trial starts as a new process does after its imports.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

IMPORTS = {
    "light": "numpy onnxruntime tokenizers matplotlib.figure matplotlib.backends.backend_svg PIL.Image offramp.session "
    "offramp.backends.onnx offramp.backends.numpy offramp.experiments.children offramp.profiling.random_inputs "
    "offramp.reporting.memory offramp.reporting.stages offramp.session.outputs offramp.tasks offramp.cli.run "
    "offramp.cli.plan offramp.cli.ls offramp.cli.verify offramp.cli.memory offramp.cli.profile",
    "torch": "numpy onnx onnxruntime tokenizers torch transformers offramp.session offramp.backends.torch "
    "offramp.backends.torch_graphs offramp.division.build offramp.division.export offramp.training "
    "offramp.experiments.evaluation offramp.experiments.tuning offramp.tasks offramp.cli.run offramp.cli.divide "
    "offramp.cli.train offramp.cli.eval offramp.cli.tune offramp.experiments.report "
    "offramp.reporting.html_page transformers.models.bert.modeling_bert",
}
"""Kind of zygote -> modules that it imports."""
ADDRESS_SPACE_BYTES = 12 << 30
"""Address space of a trial beyond that of its zygote: keeps a trial that takes all memory from ending the machine."""
OPENED = 0x2 | 0x20 | 0x100 | 0x200 | 0x40 | 0x80  # IN_MODIFY OPEN CREATE DELETE MOVED_FROM MOVED_TO
"""Events of inotify(7) that count as touching a file."""
PR_SET_PDEATHSIG = 1
WRITING = os.O_WRONLY | os.O_RDWR
HARMLESS_DEVICES = ("/dev/", "/proc/self/")


class Canary:
    """A folder that no command has reason to open; `touched` tells the names in it that were."""

    def __init__(self, folder: str) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0 or self._libc.inotify_add_watch(self._fd, folder.encode(), OPENED) < 0:
            raise OSError(ctypes.get_errno(), "inotify", folder)

    def touched(self) -> list[str]:
        """Return the names since the beginning, and stop watching."""
        names = set()
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            data = b""
        while data:
            _, _, _, length = struct.unpack_from("iIII", data)
            names.add(data[16 : 16 + length].rstrip(b"\0").decode() or ".")
            data = data[16 + length :]
        os.close(self._fd)
        return sorted(names)


def watch_calls(place: str, report: int) -> None:
    """Write a line to `report` for each call of Python that writes outside a folder, connects, or starts a program."""

    def outside(path: object) -> bool:
        if not isinstance(path, (str, bytes)):
            return False
        name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100  # of the name: a link is not followed
        return not name.startswith((place + os.sep, *HARMLESS_DEVICES)) and name != place

    def hook(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (WRITING | os.O_CREAT):
            wrong = outside(args[0])
        elif event in ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
            wrong = any(outside(path) for path in args[:2])
        elif event == "subprocess.Popen":
            wrong = args[0] != sys.executable
        else:
            wrong = event in ("socket.connect", "os.system", "os.exec", "os.posix_spawn")
        if wrong:
            os.write(report, f"{event} {args[:2]!r}\n".encode()[:500])

    sys.addaudithook(hook)


def run_child(job: dict) -> int:
    """Run the command of a job in this process, a forked child. Returns the exit code."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chdir(job["place"])
    for fd, path in ((0, os.devnull), (1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), fd)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ADDRESS_SPACE_BYTES,) * 2)
    for name, limit in job.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    os.environ.update(job["environment"])
    sys.dont_write_bytecode = True  # a module that is imported for the first time would count as a file that is touched
    tempfile.tempdir = None  # of the zygote
    watch_calls(job["place"], os.open(job["calls"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
    from offramp.cli import main

    sys.argv = ["offramp", *job["words"]]
    code = main(job["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run(job: dict) -> dict:
    """Fork, run the job under its time limit, and return how it ended."""
    canary, began = Canary(job["canary"]), time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = run_child(job)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 98
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code & 0xFF)
    waiting = os.pidfd_open(pid)
    in_time = bool(select.select([waiting], [], [], job["seconds"])[0])
    os.close(waiting)
    seconds = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # the child, and the processes that it started
    _, status, usage = os.wait4(pid, 0)
    return {
        "code": os.waitstatus_to_exitcode(status) if in_time else "hangs",
        "seconds": round(seconds, 3),
        "peak_bytes": usage.ru_maxrss << 10,
        "touched": canary.touched() + Path(job["calls"]).read_text(errors="replace").splitlines()[:5],
    }


def main() -> None:
    """Import, then serve jobs until the end of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in IMPORTS[sys.argv[1]].split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    answers.write("ready\n")
    answers.flush()
    with contextlib.suppress(BrokenPipeError):  # the parent was stopped
        for line in sys.stdin:
            answers.write(json.dumps(run(json.loads(line))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
