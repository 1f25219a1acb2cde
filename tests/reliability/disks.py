"""Full disks: each verb that writes, with its outputs on a file system that is full after so many bytes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from .hostile import fill
from .run import Run
from .trial import Bench, Ended, fault_of
from .verbs import TUNING

SIZES = (2, 8, 32, 128, 512)
"""KiB that fit."""
LIMIT = 60
"""Seconds of a command; `profile` and `train` take some without a full disk."""
DATA = "rows.tsv|--text-column|sentence|--label-column|label|--offline"
TRAINING = "--loss|heads-only|--heads-epochs|1|--max-length|16"
WRITERS = {
    "divide": ("torch", "divide|model|made/store|--offline", "made/store"),
    "divide --force": ("torch", "divide|model|made/store|--offline|--force", "made/store"),
    "run --out": ("light", "run|store|--input|texts.txt|--threads|1|--out|made/a.jsonl", "made/a.jsonl"),
    "run --trace": ("light", "run|store|--input|texts.txt|--threads|1|--trace|made/t.jsonl", ""),
    "ls --graph": ("light", "ls|store|--graph|made/s.svg", ""),
    "memory": ("light", "memory|store|--text|red|--threads|1|--out|made/m.svg", ""),
    "profile": ("light", "profile|store|--threads|1|--max-length|16|--out|made/p.json", "made/p.json"),
    "eval --transcript": (
        "torch", f"eval|model|--dev|{DATA}|--include-training-rows|--transcript|made/t", "made/t/dev.json",
    ),
    "tune": ("torch", "TUNE|--out|made/policy.json", "made/policy.json"),
    "train": ("torch", f"train|model|--train|{DATA}|--out|made/run|{TRAINING}", "made/run"),
}  # fmt: skip
"""Name -> zygote, command line, and the output that is whole or absent; "" where a part of it may stay."""


def full_disks(run: Run) -> None:
    """Try each writer on each size: on a small file system, if this user may mount one, and under RLIMIT_FSIZE."""
    bench = Bench(run.scratch / "disks")
    can_mount = os.geteuid() == 0 and _can_mount(run.scratch)
    if not can_mount:
        run.add("disks", "tmpfs", outcome="skipped", error="this user may not mount a file system")
    ways: dict[str, Callable[[Bench, Path, str, list[str], int], Ended]] = {"limit": _limited}
    if can_mount:
        ways["tmpfs"] = _mounted
    for way, start in ways.items():
        for name, (kind, line, output) in WRITERS.items():
            for size in SIZES:
                if run.is_over or run.has("disks", f"{way}/{size} KiB", name):
                    continue
                with bench.place() as place:
                    fill(place, run.honest / "names")
                    (place / "made").mkdir()
                    ended = start(bench, place, kind, words_of(line), size)
                    fault = fault_of(ended, ended.peak_bytes, LIMIT - 1) or _half_made(
                        place / output if output else None, ended
                    )
                    if way == "tmpfs":
                        subprocess.run(["umount", place / "made"], check=True)
                outcome = "fault" if fault else "fits" if ended.code == 0 else f"exit {ended.code}"
                run.add("disks", f"{way}/{size} KiB", name, outcome=outcome, fault=fault, error=ended.error[:200])
    bench.close()


def words_of(line: str) -> list[str]:
    """Return the words of a command line. TUNE stands for a tuning on the honest transcripts."""
    return line.replace("TUNE", f"tune|store|{TUNING}").split("|")


def _limited(bench: Bench, place: Path, kind: str, words: list[str], size: int) -> Ended:
    return bench.run(kind, place, words, seconds=LIMIT, limits={"RLIMIT_FSIZE": size << 10})


def _mounted(bench: Bench, place: Path, kind: str, words: list[str], size: int) -> Ended:
    _mount(place / "made", size)
    return bench.run(kind, place, words, seconds=LIMIT)


def _mount(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True, capture_output=True)


def _can_mount(scratch: Path) -> bool:
    folder = scratch / "mounted"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _mount(folder, 64)
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", folder], check=True)
    return True


def _half_made(output: Path | None, ended: Ended) -> str | None:
    """Return what is wrong with the output of a command: it must be whole, or absent after a failure."""
    if ended.code not in (0, 5):
        return f"exit {ended.code} on a full disk: {ended.error[:200]}"
    if output is None or not (output.exists() or ended.code == 0):
        return None
    if ended.code != 0:
        return f"a failed command left {output.name}"
    if output.name == "store":
        from offramp.store import verify

        return "a damaged store" if any(check.problem for check in verify(output)) else None
    if output.suffix == ".json":
        json.loads(output.read_bytes())
    return None
