"""Latency, peak memory and bytes read of a store for several budgets: each in processes of its own, interleaved;
medians over all rounds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from offramp.experiments.children import Log, ignore, run_worker
from offramp.experiments.jobs import WorkerJob
from offramp.measure import median, percentile
from offramp.session.records import SUMS


def run_rounds(jobs: Mapping[str, WorkerJob], rounds: int, log: Log) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run each job once a round, starting each round with another one; yield (name, result). An error ends it."""
    names = list(jobs)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            result = run_worker(jobs[name], log if number == 0 else ignore)
            log(f"round {number + 1}/{rounds}: {name}")
            yield name, result


def bench(job: WorkerJob, budgets: Sequence[int | str], rounds: int, log: Log) -> list[dict[str, Any]]:
    """Return one record per budget (in bytes, or a word), in order. `job` is measured under each of them.

    The smallest budget runs first: if any is impossible, it is that one, and the error is raised immediately.
    """
    ordered = sorted(budgets, key=lambda budget: (isinstance(budget, str), budget))
    jobs = {str(budget): replace(job, config=replace(job.config, budget=budget)) for budget in ordered}
    found: dict[str, list[dict[str, Any]]] = {str(budget): [] for budget in budgets}
    for budget, record in run_rounds(jobs, rounds, log):
        found[budget].append(record)
    return [summary(records) for records in found.values()]


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the records of one job as one: latency quantiles over all batches of all rounds, the largest peak, and
    medians of the rest.
    """
    latencies = [seconds for record in records for seconds in record["latencies_seconds"]]
    kept = {key: value for key, value in records[0].items() if key not in ("latencies_seconds", "texts")}
    for key in ("bound_seconds", "bytes_read_per_input", *SUMS):
        values = [record[key] for record in records]
        kept[key] = values[0] if len(set(values)) == 1 else median(values)
    kept["peak_rss_bytes"] = max(record["peak_rss_bytes"] for record in records)
    kept["latency_seconds_median"] = median(latencies)
    for percent in (95, 99):
        kept[f"latency_seconds_p{percent}"] = percentile(latencies, percent)
    kept["rounds"] = len(records)
    return kept
