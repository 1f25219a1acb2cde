"""Measure stores with blocks: `python bench/blocks.py WHOLE BLOCKED... [--backends ort,numpy] [--rounds 3]`.

For each backend and store: the least budget that runs, and the latency of a pass of 128 tokens under it and with all
weights in memory, in processes that take turns. Ratios are to the first store with all weights in memory on the same
backend. Prints a table; stores are `offramp divide MODEL STORE [--block 2MiB]`.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from offramp.cli.options import log, table
from offramp.errors import BudgetError
from offramp.experiments.bench import run_rounds, summary
from offramp.experiments.children import run_worker
from offramp.experiments.jobs import WorkerJob
from offramp.runtime.config import RESIDENT, EngineConfig
from offramp.units import format_duration, format_size

MIB = 1 << 20
MOST_NAMED = 3
"""Most budgets that a refusal names before one is accepted."""
_NAMED = re.compile(r"--budget (\d+)MiB")


def least_budget(job: WorkerJob) -> int:
    """Return the least budget in bytes that the process of a job accepts, as refusals name it."""
    budget = MIB
    for _ in range(MOST_NAMED):
        try:
            run_worker(replace(job, job="plan", config=replace(job.config, budget=budget)))
        except BudgetError as error:
            budget = int(_NAMED.findall(error.remedy or "")[0]) * MIB
        else:
            return budget
    raise SystemExit(f"{job.store}: no budget that a refusal named was accepted")


def measure(stores: Sequence[Path], backend: str, args: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return a row for each store on one backend."""
    jobs: dict[str, WorkerJob] = {}
    for store in stores:
        config = EngineConfig(backend=backend, threads=args.threads, max_length=args.tokens)
        job = WorkerJob("passes", str(store), config, passes=args.passes)
        for name, budget in (("least", least_budget(job)), (RESIDENT, RESIDENT)):
            jobs[f"{store} {name}"] = replace(job, config=replace(config, budget=budget))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for name, record in run_rounds(jobs, args.rounds, log):
        found[name].append(record)
    records = {name: summary(each) for name, each in found.items()}
    unit = records[f"{stores[0]} {RESIDENT}"]["latency_seconds_median"]
    rows = []
    for store in stores:
        whole, least = (records[f"{store} {name}"] for name in (RESIDENT, "least"))
        seconds = [record["latency_seconds_median"] for record in (whole, least)]
        budget, peak = jobs[f"{store} least"].config.budget_bytes or 0, least["peak_rss_bytes"]
        sizes = (format_size(budget), format_size(least["predicted_peak_bytes"]), format_size(peak))
        latencies = (f"{format_duration(each)} {each / unit:.2f}x" for each in seconds)
        rows.append((backend, store.name, *latencies, *sizes))
    return rows


def main() -> None:
    """Read the arguments, measure, and print the table."""
    parser = argparse.ArgumentParser(description="Measure stores with blocks.")
    parser.add_argument(
        "stores", nargs="+", type=Path, help="folders; the first is the one that others are compared with"
    )
    parser.add_argument("--backends", default="ort,numpy", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of the backend (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=8, help="timed passes of a process (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each setting (default: %(default)s)")
    args = parser.parse_args()
    rows = [row for backend in args.backends.split(",") for row in measure(args.stores, backend, args)]
    print(table(("backend", "store", "resident", "least budget", "budget", "predicted", "peak"), rows))


if __name__ == "__main__":
    main()
