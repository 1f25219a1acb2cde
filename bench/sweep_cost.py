"""Overhead of `offramp sweep` on a job, and the memory of its process: `python bench/sweep_cost.py STORE`.

The records of a sweep hold the seconds that each job took, from the start of its process to its end. What the sweep
takes besides is its overhead: between jobs, and once at its start, which a sweep of two jobs tells. Noise of the jobs
themselves is in both sides of the ratio.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from processes import failure, run

from offramp.experiments.results import read_results
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


class Swept(NamedTuple):
    """One sweep."""

    seconds: float
    """From the start of its process to the end."""
    job_seconds: float
    """Together, of its jobs."""
    peak_bytes: int

    @property
    def idle_seconds(self) -> float:
        """Seconds in which no job ran."""
        return self.seconds - self.job_seconds


def sweep(recipe: Path, folder: Path, num_jobs: int) -> Swept:
    """Run a sweep."""
    words = ["sweep", str(recipe), "--out", str(folder), "--limit", str(num_jobs)]
    done = run([sys.executable, "-c", SWEEP, *words], {})
    if failure(done):
        sys.exit(f"{failure(done)}\n{done.errors}")
    jobs = sum(record["seconds"] for record in read_results(folder, lambda line: None))
    return Swept(done.seconds, jobs, int(done.lines[-1][1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--passes", type=int, default=20)
    args = parser.parse_args()
    options = {"model": args.store, "rounds": args.jobs, "passes": args.passes, "threads": 2}
    overheads, starts, peaks, lengths = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder, "recipe.py")
        recipe.write_text(RECIPE.format(options))
        for number in range(args.rounds):
            few, many = (sweep(recipe, Path(folder, f"{number}-{jobs}"), jobs) for jobs in (2, args.jobs))
            idle = (many.idle_seconds - few.idle_seconds) / (args.jobs - 2)
            lengths.append(many.job_seconds / args.jobs)
            overheads.append(idle / lengths[-1])
            starts.append(few.idle_seconds - 2 * idle)
            peaks.append(many.peak_bytes)
            print(f"round {number + 1}: {1000 * idle:.1f} ms between jobs of {lengths[-1]:.3f} s", file=sys.stderr)
    facts = {"overhead": median(overheads), "job_seconds": median(lengths), "start_seconds": median(starts)}
    print(f"overhead {100 * facts['overhead']:.2f} % of jobs of {format_duration(facts['job_seconds'])}")
    print(f"start and end of a sweep {format_duration(facts['start_seconds'])}")
    print(f"memory of the sweep {format_size(max(peaks))}")
    print(json.dumps({**facts, "peak_bytes": max(peaks), "overheads": overheads, "options": options}))


if __name__ == "__main__":
    main()
