"""One trial: a command on an input in a scratch folder, in a child process under limits; and how its end is judged."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import offramp

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(offramp.__file__).resolve().parents[1]
"""Folder of the code that is tried: PYTHONPATH may name another checkout."""
MOST_SECONDS = 10
MOST_MORE_BYTES = 64 << 20
"""Memory that a command on a hostile input may take beyond what it takes on the honest one."""
REFUSALS = (2, 3, 4, 5)
"""Documented exit codes of refusals. 1 is an internal error."""
MOST_LINES = 30
"""Lines of stderr: the error, warnings, and the progress of the honest command."""
SECRET = b"\x10the secret of the canary\x10"
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_FOREIGN = re.compile(
    r"Traceback|internal error|:onnxruntime|panicked|terminate called|Aborted|backtrace", re.IGNORECASE
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | str
    """Exit code, minus the signal that ended it, or "hangs"."""
    seconds: float
    peak_bytes: int
    touched: tuple[str, ...]
    """Files outside its inputs and outputs that the command opened or made."""
    out: str
    err: str

    @property
    def error(self) -> str:
        """Last line of stderr."""
        return (self.err.rstrip("\n").splitlines() or [""])[-1]


class Zygote:
    """The parent's side of `zygote.py`; started at the first use, and again where it ended."""

    def __init__(self, kind: str, environment: dict[str, str]) -> None:
        self._kind, self._environment = kind, environment
        self._process: subprocess.Popen | None = None

    def _started(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.zygote", self._kind]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._process = subprocess.Popen(command, cwd=ROOT, env=self._environment, **pipes)
            assert self._process.stdout is not None
            if self._process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the zygote {self._kind!r} did not start")
        return self._process

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run one job."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            with self._process:  # closes both pipes, which ends it
                pass
            self._process = None


class Bench:
    """Zygotes of all kinds, and scratch folders in which commands run."""

    def __init__(self, scratch: Path, threads: int = 1) -> None:
        self.scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join([str(SOURCE), str(ROOT)])
        self.environment = {
            **os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "svg",
        }  # fmt: skip
        self._zygotes = {kind: Zygote(kind, self.environment) for kind in ("light", "torch")}

    def close(self) -> None:
        """End the zygotes."""
        for zygote in self._zygotes.values():
            zygote.close()

    @contextlib.contextmanager
    def place(self) -> Iterator[Path]:
        """Context manager of a scratch folder with a canary, a home and a folder for temporary files."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as name:
            place = Path(name) / "place"
            for folder in ("canary", "home", "tmp"):
                (place / folder).mkdir(parents=True)
            for file in ("secret.bin", "secret.json", "secret.txt", "secret.onnx", "secret.safetensors"):
                (place / "canary" / file).write_bytes(SECRET * 200)
            yield place

    def run(self, kind: str, place: Path, words: Sequence[str], **more: Any) -> Ended:
        """Run a command in a scratch folder; again where it took too long, since another process may have been busy."""
        found = self._run(kind, place, words, more)
        if "seconds" not in more and (found.code == "hangs" or found.seconds > MOST_SECONDS):
            found = self._run(kind, place, words, more)
        return found

    def _run(self, kind: str, place: Path, words: Sequence[str], more: dict[str, Any]) -> Ended:
        said = place.parent
        home = str(place / "home")
        environment = {
            "HOME": home, "TMPDIR": str(place / "tmp"), "OFFRAMP_CACHE": str(place / "home" / "cache"),
            "XDG_CACHE_HOME": home, "MPLCONFIGDIR": home, "HF_HOME": home, "TORCHINDUCTOR_CACHE_DIR": home,
        }  # fmt: skip
        job = {"place": str(place), "canary": str(place / "canary"), "words": list(words), "seconds": 2 * MOST_SECONDS}
        job |= {name: str(said / name) for name in ("out", "err", "calls")}
        ended = self._zygotes[kind].run({**job, "environment": environment, **more})
        out, err = ((said / name).read_bytes() for name in ("out", "err"))
        touched = [*ended.pop("touched"), *(["secret printed"] if SECRET in out + err else [])]
        texts = (data.decode(errors="backslashreplace") for data in (out, err))
        return Ended(ended["code"], ended["seconds"], ended["peak_bytes"], tuple(touched), *texts)


def fault_of(ended: Ended, honest_bytes: int, most_seconds: float = MOST_SECONDS) -> str | None:
    """Return what a command must not do, whatever its input, or None."""
    if isinstance(ended.code, str) or ended.seconds > most_seconds:
        return f"hangs: {ended.seconds:.1f} s"
    if ended.code < 0:
        return f"signal {-ended.code}"
    more_bytes = ended.peak_bytes - honest_bytes
    if more_bytes > MOST_MORE_BYTES:
        return f"memory: {more_bytes >> 20} MiB more than the honest input, exit {ended.code}"
    if ended.code not in (0, *REFUSALS):
        return f"exit {ended.code}: {ended.error[:300]}"
    if ended.touched:
        return f"touched {list(ended.touched)[:3]}"
    lines = ended.err.splitlines()
    foreign = [line for line in lines if _FOREIGN.search(line)]
    if foreign:
        return f"a line that is not ours: {foreign[0][:200]!r}"
    if _UNPRINTABLE.search(ended.err + ended.out):
        return "control characters on the terminal"
    num_errors = sum(line.startswith("offramp: error: ") for line in lines)
    if len(lines) > MOST_LINES or num_errors != bool(ended.code) or (num_errors and not _is_error(ended.error)):
        return f"not one line of error: {num_errors} of {len(lines)} lines; {ended.error[:200]}"
    return None


def _is_error(line: str) -> bool:
    return line.startswith("offramp: error: ")


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a small folder as it is, links included."""
    return Path(shutil.copytree(source, target, symlinks=True))
