"""Overhead of `offramp sweep` on a job, and the memory of its process: `python bench/sweep_cost.py STORE`.

Each round runs the same jobs twice: by a sweep, and by starting their processes one after another. A sweep of two jobs
tells what the start of a sweep takes, which is reported by itself.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from processes import failure, run

from offramp.experiments import Grid
from offramp.experiments.children import run_worker
from offramp.experiments.prerequisites import Source, measuring_job, needs_of
from offramp.measure import median
from offramp.units import format_duration, format_size

RECIPE = """
from offramp.experiments import Grid
def recipe():
    return Grid(**{})
"""


SWEEP = """import sys
from offramp.cli import main
from offramp.measure import read_memory
code = main(sys.argv[1:])
print(read_memory().peak_bytes)
sys.exit(code)"""
"""Sweep, and print the peak of this process alone: what wait4 tells includes its worker processes."""


def swept_seconds(recipe: Path, folder: Path, num_jobs: int) -> tuple[float, int]:
    """Run a sweep; return its seconds and its peak memory in bytes."""
    words = ["sweep", str(recipe), "--out", str(folder), "--limit", str(num_jobs)]
    done = run([sys.executable, "-c", SWEEP, *words], {})
    if failure(done):
        sys.exit(f"{failure(done)}\n{done.errors}")
    return done.seconds, int(done.lines[-1][1])


def direct_seconds(options: dict) -> float:
    """Run the same jobs without a sweep."""
    began = time.perf_counter()
    for each in Grid(**options):
        needs = needs_of(each, Source(each.model, "", True), None, Path())
        for number in range(1, each.rounds + 1):
            run_worker(measuring_job(each, number, needs))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--passes", type=int, default=20)
    args = parser.parse_args()
    options = {"model": args.store, "rounds": args.jobs, "passes": args.passes, "threads": 2}
    swept, direct, starts, peaks = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.py")
        recipe.write_text(RECIPE.format(options))
        for number in range(args.rounds):
            few, _ = swept_seconds(recipe, Path(folder, f"few-{number}"), 2)
            seconds, peak_bytes = swept_seconds(recipe, Path(folder, f"out-{number}"), args.jobs)
            peaks.append(peak_bytes)
            swept.append((seconds - few) / (args.jobs - 2))
            starts.append(few - 2 * swept[-1])
            direct.append(direct_seconds(options) / args.jobs)
            print(f"round {number + 1}: {swept[-1]:.3f} s a job swept, {direct[-1]:.3f} s direct", file=sys.stderr)
    ratio = median([one / other for one, other in zip(swept, direct, strict=True)])
    facts = {"overhead": ratio - 1, "job_seconds": median(direct), "peak_bytes": max(peaks)}
    facts |= {"start_seconds": median(starts)}
    print(f"overhead {100 * facts['overhead']:.1f} % of jobs of {format_duration(facts['job_seconds'])}")
    print(f"start of a sweep {format_duration(facts['start_seconds'])}")
    print(f"memory of the sweep {format_size(facts['peak_bytes'])}")
    print(json.dumps({**facts, "swept_seconds": swept, "direct_seconds": direct, "options": options}))


if __name__ == "__main__":
    main()
