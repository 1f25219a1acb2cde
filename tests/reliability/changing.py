"""Stores that change while they are read, and many processes on one store."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .hostile import fill
from .run import Run
from .trial import REFUSALS, Bench, fault_of

NUM_INPUTS = 500
LIMIT = 60
"""Seconds for all inputs; without a change they take some."""
DELAYS = (0.02, 0.1, 0.3, 0.6)
"""Seconds from the start of the command to the change."""
PROCESSES = 8


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Put something else in the place of a file, at once."""
    other = path.with_name("other")
    make(other)
    other.replace(path)


def _unlink_and_make(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _in_place(path: Path, change: Callable[[bytes], bytes]) -> None:
    data = change(path.read_bytes())
    with path.open("r+b") as file:
        file.write(data)
        file.truncate(len(data))


def _flipped(data: bytes) -> bytes:
    return bytes(byte ^ (index % 97 == 5) for index, byte in enumerate(data))


CHANGES: dict[str, Callable[[Path], None]] = {
    "unlinked": lambda path: path.unlink(),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "extended": lambda path: os.truncate(path, path.stat().st_size + (1 << 20)),
    "flipped in place": lambda path: _in_place(path, _flipped),
    "replaced by noise": lambda path: _replace(path, lambda other: other.write_bytes(os.urandom(path.stat().st_size))),
    "replaced by a copy": lambda path: _replace(path, lambda other: shutil.copy(path, other)),
    "replaced by a pipe": lambda path: _replace(path, os.mkfifo),
    "replaced by a link": lambda path: _replace(path, lambda other: other.symlink_to("/etc/passwd")),
    "replaced by a folder": lambda path: _unlink_and_make(path, lambda other: other.mkdir()),
    "unreadable": lambda path: path.chmod(0),
}
FILES = (
    "store/weights", "store/rows", "store/offramp.json", "store/exits.safetensors", "store/tokenizer.json",
    "store/labels.json", "store/graphs", "policy.json",
)  # fmt: skip
PATTERNS = {"weights": "layer-01-*.safetensors", "rows": "*rows.safetensors", "graphs": "graphs/attention.onnx"}
BUDGETS = {"all resident": (), "streamed": ("--budget", "smallest")}


def tampering(run: Run) -> None:
    """Change each file in each way at several times of a run, with all weights resident and with few."""
    bench = Bench(run.scratch / "tampering")
    honest = _honest(run, bench)
    cases = [(file, change, delay, way) for file in FILES for change in CHANGES for delay in DELAYS for way in honest]
    for file, change, delay, way in cases[:: run.drawn(5, 1)]:
        name = f"{file} {change} after {delay} s, {way}"
        if run.is_over or run.has("tampering", name):
            continue
        with bench.place() as place:
            _fill(place, run)
            timer = threading.Timer(delay, _tamper, (place, file, CHANGES[change]))
            timer.start()
            ended = bench.run("light", place, _words(honest[way][0]), seconds=LIMIT)
            timer.cancel()
            timer.join()
        fault = fault_of(ended, honest[way][2], LIMIT - 1)
        lines = _results(ended.out)
        if fault is None and lines != honest[way][1][: len(lines)]:
            fault = "another answer"
        if fault is None and ended.code == 0 and len(lines) != NUM_INPUTS:
            fault = f"{len(lines)} of {NUM_INPUTS} answers and exit 0"
        outcome = "fault" if fault else "honest answer" if ended.code == 0 else "refused"
        run.add("tampering", name, outcome=outcome, fault=fault, code=ended.code, error=ended.error[:160])
    bench.close()


def _fill(place: Path, run: Run) -> None:
    fill(place, run.honest / "large")
    (place / "many.txt").write_text("the red sky is a rose\nblue grass\n" * (NUM_INPUTS // 2))


def _words(budget: tuple[str, ...]) -> list[str]:
    return ["run", "store", "--input", "many.txt", "--json", "--threads", "1", *budget]


def _honest(run: Run, bench: Bench) -> dict[str, tuple[tuple[str, ...], list[str], int]]:
    """Return, for all weights resident and for few, the options, the answers and the peak."""
    found = {}
    for way, options in BUDGETS.items():
        with bench.place() as place:
            _fill(place, run)
            if options:
                refused = bench.run("light", place, [*_words(("--budget", "1MiB"))])
                smallest = refused.error.rpartition("--budget ")[2].split()[0].rstrip(".,")
                options = ("--budget", smallest)
            ended = bench.run("light", place, _words(options), seconds=LIMIT)
            if ended.code != 0:
                raise SystemExit(f"the honest run ends with {ended.code}: {ended.error}")
            found[way] = (options, _results(ended.out), ended.peak_bytes)
    return found


def _results(out: str) -> list[str]:
    whole = out[: out.rfind("\n") + 1].splitlines()
    return [line.partition(', "bytes_read"')[0].partition(', "seconds"')[0] for line in whole if '"record"' not in line]


def _tamper(place: Path, file: str, change: Callable[[Path], None]) -> None:
    folder, _, name = file.rpartition("/")
    pattern = PATTERNS.get(name, name)
    for path in sorted((place / folder).glob(pattern))[:1]:
        change(path)


def many_processes(run: Run) -> None:
    """Start processes that read one store together: undisturbed, and while it is replaced again and again."""
    bench = Bench(run.scratch / "processes")
    for way in ("undisturbed", "replaced", "divided at once"):
        for number in range(run.drawn(3, 12)):
            name = f"{way} {number}"
            if run.is_over or run.has("processes", name):
                continue
            with bench.place() as place:
                fill(place, run.honest / "names")
                (place / "texts.txt").write_text("the red sky is a rose\nblue grass\n" * 500)
                fault, codes = _together(bench, place, way)
            run.add("processes", name, outcome="fault" if fault else "well", fault=fault, codes=codes)
    bench.close()


def _together(bench: Bench, place: Path, way: str) -> tuple[str | None, list[int]]:
    """Run the processes. Returns what is wrong, or None, and their exit codes."""
    environment = {**bench.environment, "OFFRAMP_CACHE": str(place / "cache"), "HOME": str(place / "home")}
    python = [sys.executable, "-m", "offramp"]
    reading = [*python, "run", "store", "--input", "texts.txt", "--json", "--threads", "1"]
    dividing = [*python, "divide", "model", "store" if way == "replaced" else "made", "--offline", "--force"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    start = [dividing] * PROCESSES if way == "divided at once" else [reading] * PROCESSES
    children = [subprocess.Popen(words, cwd=place, env=environment, **pipes) for words in start]  # type: ignore[call-overload]
    until = time.monotonic() + 3
    while way == "replaced" and time.monotonic() < until:
        done = subprocess.run(dividing, cwd=place, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"divide ends with {done.returncode}: {done.stderr[-200:]}", []
    said = [child.communicate(timeout=120) for child in children]
    codes = [child.returncode for child in children]
    right = {tuple(_results(out)) for (out, _), code in zip(said, codes, strict=True) if code == 0}
    if len(right) > 1:
        return f"{len(right)} different answers", codes
    if way == "undisturbed" and any(codes):
        return f"exit codes {codes}: {[err[-200:] for _, err in said if err][:1]}", codes
    allowed = (0, *REFUSALS)
    wrong = [
        err[-300:] for (_, err), code in zip(said, codes, strict=True) if code not in allowed or "Traceback" in err
    ]
    return (wrong[0] if wrong else None), codes
