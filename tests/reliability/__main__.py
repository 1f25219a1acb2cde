"""Command line of the reliability run; see `tests/reliability/__init__.py`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import folders, narrow, onnx_graphs, results, side_files, stores, torch_graphs
from .changing import many_processes, tampering
from .disks import full_disks
from .fuzz import TARGETS
from .hostile import Hostile
from .run import Run
from .trial import ROOT, SOURCE

MOST_GROWTH_BYTES = 4 << 20
"""Memory that a process may gain between its first thousand requests and its last."""


def manifests(run: Run) -> None:
    """Edited manifests, sealed again."""
    found = [*stores.attacks(), *stores.drawn_attacks(run.honest, run.drawn(60, 2000))]
    Hostile(run, "manifests").try_all(run.limited(iter(found)))


def narrow_stores(run: Run) -> None:
    """Stores of integers, half floats and blocks."""
    Hostile(run, "narrow stores").try_all(run.limited(narrow.attacks()))


def torch(run: Run) -> None:
    """Captured graphs for PyTorch, and a call of each operation of its namespace."""
    Hostile(run, "torch graphs").try_all(run.limited(torch_graphs.attacks(run.honest, run.drawn(400, 20000))))


def onnx(run: Run) -> None:
    """Graphs for ONNX Runtime, and a call of each operator."""
    Hostile(run, "onnx graphs").try_all(run.limited(onnx_graphs.attacks(run.drawn(200, 2000))))


def sides(run: Run) -> None:
    """Exits, tokenizers, configurations, policies, profiles, transcripts."""
    Hostile(run, "side files").try_all(run.limited(side_files.attacks(run.honest, run.drawn(12, 400))))


def result_folders(run: Run) -> None:
    """Results folders of sweeps."""
    Hostile(run, "results").try_all(run.limited(results.attacks(run.honest, run.drawn(12, 4000))))


def models(run: Run) -> None:
    """Model folders."""
    Hostile(run, "model folders").try_all(run.limited(folders.attacks(run.honest, run.drawn(6, 400))))


def _lines(
    run: Run, part: str, words: list[str], name: Callable[[dict], str], fault: Callable[[dict], str | None]
) -> None:
    """Run a module of this folder and add a record for each JSON line that it prints."""
    python = os.environ.get("FUZZ_PYTHON", sys.executable) if part == "fuzz" else sys.executable  # one with atheris
    command = [python, "-m", f"{__package__}.{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=_environment())
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for each in found:
        run.add(part, name(each), **{**each, "fault": fault(each)})
    if done.returncode or not found:
        what = f"ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['nothing'])[-1][:300]}"
        run.add(part, " ".join(words[:2]), fault=what)


def flips(run: Run) -> None:
    """Flipped bits."""
    if not run.has("flips", "manifest"):
        number = str(run.limit or 2000)
        _lines(run, "flips", ["flips", str(run.honest), number], lambda each: each["kind"], _flip_fault)


def _flip_fault(each: dict) -> str | None:
    wrong = each.get("missed", 0) + each.get("wrong", 0)
    return f"{each['missed']} flips missed, {each['wrong']} answers wrong" if wrong else None


def fuzzing(run: Run) -> None:
    """Mutated inputs of each parser."""
    waiting = [target for target in TARGETS if not run.has("fuzz", target) and run.match in target]

    def work(target: str) -> None:
        runs, corpus = str(run.limit or 200_000), str(run.out / "corpus" / target.replace(" ", "-"))
        if not run.is_over:
            words = ["fuzz", target, str(run.honest), runs, corpus]
            _lines(run, "fuzz", words, lambda each: each["target"], lambda each: "; ".join(each["faults"]) or None)

    with ThreadPoolExecutor(run.workers) as pool:
        list(pool.map(work, waiting))


def soaking(run: Run) -> None:
    """Many requests in one process."""
    if not run.has("soak", "requests"):
        words = ["soak", str(run.honest / "names/store"), str(run.limit or 20_000)]
        _lines(run, "soak", words, lambda each: "requests", _growth_fault)


def _growth_fault(each: dict) -> str | None:
    same = all(each["first"][key] == each["last"][key] for key in ("threads", "descriptors"))
    grown = each["growth_bytes"] > MOST_GROWTH_BYTES
    return None if same and not grown else f"grows: {each['first']} to {each['last']}"


def kills(run: Run) -> None:
    """Kills at each call that writes: `tests/checks/kills.py`."""
    file, every = run.out / "kills.jsonl", str(run.drawn(12, 1))
    _command(run, "kills", ["-m", "tests.checks.kills", "--records", str(file), "--every", every])


def faults(run: Run) -> None:
    """Injected errors of the system."""
    _command(run, "faults", ["-m", "pytest", "-q", "-m", "slow or not slow", "tests/cli/test_system_faults.py"])


def schedules(run: Run) -> None:
    """Random schedules of reads, exits, failures, forks and closing."""
    number = str(run.drawn(10_000, 100_000))
    words = ["-m", "pytest", "-q", "-s", "-m", "slow or not slow", "tests/runtime/test_schedules.py"]
    _command(run, "schedules", words, OFFRAMP_SCHEDULES=number)


def _command(run: Run, part: str, words: list[str], **variables: str) -> None:
    """Run a script or tests of the repository, and add one record."""
    script = words[0] if words[0] != "-m" else words[-1]
    if run.has(part, script):
        return
    if not (ROOT / script).exists():
        run.add(part, script, outcome="skipped", error="not there")
        return
    command = [sys.executable, *words]
    environment = {**_environment(), **variables}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    said = done.stdout.strip().splitlines()[-12:] or [done.stderr.strip()[-300:]]
    fault = None if done.returncode == 0 else f"ended with {done.returncode}: {said[-1][:300]}"
    run.add(part, script, outcome="well", said=said, fault=fault, words=words, variables=variables)


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(SOURCE), str(ROOT)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


PARTS: dict[str, tuple[Callable[[Run], None], str]] = {
    "manifests": (manifests, "edited manifests, with digests and seal fixed up"),
    "narrow stores": (narrow_stores, "stores of integers, half floats and blocks: attributes of kernels, and numbers"),
    "torch graphs": (torch, "captured graphs for PyTorch, and operations of its namespace"),
    "onnx graphs": (onnx, "graphs for ONNX Runtime, and its operators"),
    "side files": (sides, "exits, tokenizers, configurations, policies, profiles, transcripts"),
    "results": (result_folders, "records of sweeps: bytes, values, and texts that are code elsewhere"),
    "model folders": (models, "model folders: configurations, weights, pickles, links, pipes"),
    "flips": (flips, "2,000 flipped bits of each kind of file"),
    "fuzz": (fuzzing, "200,000 executions of each parser"),
    "disks": (full_disks, "full disks"),
    "tampering": (tampering, "files that change while they are read"),
    "processes": (many_processes, "8 processes on one store"),
    "soak": (soaking, "20,000 requests in one process"),
    "kills": (kills, "kills at each call that writes"),
    "faults": (faults, "injected errors of the system"),
    "schedules": (schedules, "random schedules of reads, exits, failures, forks and closing"),
}
"""Part -> its function, and what it tries."""


def main() -> int:
    """Try what is not in the records yet. Returns 1 if a fault is in the records."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("reliability-out"), help="folder of records and of honest models")
    add(
        "--only",
        action="append",
        choices=tuple(PARTS),
        metavar="PART",
        help="try this part; may be given several times",
    )
    add("--whole", action="store_true", help="try everything instead of the kept sample: hours")
    add("--limit", type=int, metavar="N", help="most inputs, flips, executions or requests of a part")
    add("--match", default="", metavar="TEXT", help="only inputs whose names contain this")
    add("--minutes", type=float, metavar="N", help="stop after N minutes; the same command goes on")
    add("--workers", type=int, default=2, metavar="N", help="processes that try inputs (default: 2)")
    add("--list", action="store_true", help="list the parts, and the time that each took so far")
    add("--page", type=Path, metavar="FILE", help="write the page of results from the records, and try nothing")
    args = parser.parse_args()
    run = Run(args.out.resolve(), not args.whole, args.workers, args.minutes, args.limit, args.match)
    if args.list or args.page:
        from . import page

        (page.write if args.page else page.print_parts)(run.records(), args.page or PARTS)
        return 0
    _honest(run)
    for part in args.only or PARTS:
        if run.is_over:
            break
        _try(run, part)
    shutil.rmtree(run.scratch, ignore_errors=True)
    faults = [each for each in run.records() if each.get("fault")]
    print(f"{run.num_added} records added; {len(faults)} faults in {run.out / 'records.jsonl'}")
    return int(bool(faults))


def _honest(run: Run) -> None:
    command = [sys.executable, "-m", f"{__package__}.honest", str(run.honest)]
    subprocess.run(command, cwd=ROOT, check=True, env=_environment(), stdout=subprocess.DEVNULL)


def _try(run: Run, part: str) -> None:
    began, before = time.monotonic(), run.num_added
    PARTS[part][0](run)
    if run.num_added > before:
        facts: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "records": run.num_added - before}
        run.add(part, "time", **facts, is_sample=run.is_sample)
        print(f"{part}: {facts['records']} records in {facts['seconds']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
