"""Rounds: each job once in each, starting with another one."""

import pytest

from offramp.experiments import bench
from offramp.experiments.bench import run_rounds
from offramp.experiments.jobs import WorkerJob
from offramp.session.records import SUMS


def test_every_rival_is_first_in_turn(monkeypatch):
    def run_worker(job, log):
        log(f"warning of {job.store}")
        return {"ran": job.store}

    monkeypatch.setattr(bench, "run_worker", run_worker)
    jobs, lines = {"a": WorkerJob("plan", "1"), "b": WorkerJob("plan", "2")}, []
    found = list(run_rounds(jobs, 3, lines.append))
    assert [name for name, _ in found] == ["a", "b", "b", "a", "a", "b"]
    assert all(record == {"ran": jobs[name].store} for name, record in found)
    assert lines[:4] == ["warning of 1", "round 1/3: a", "warning of 2", "round 1/3: b"]
    assert lines[4] == "round 2/3: b" and lines[-1] == "round 3/3: b", "once is enough"


def test_each_budget_is_measured_with_the_smallest_first(monkeypatch):
    ran = []

    def run_worker(job, log):
        ran.append(job.config.budget)
        record = {**dict.fromkeys(("bound_seconds", "bytes_read_per_input", *SUMS), 1.0), "late": len(ran)}
        return {**record, "latencies_seconds": [len(ran)], "peak_rss_bytes": len(ran), "budget": job.config.budget}

    monkeypatch.setattr(bench, "run_worker", run_worker)
    found = bench.bench(WorkerJob("passes", "store"), [7, 5], 2, lambda line: None)
    assert ran == [5, 7, 7, 5]
    assert [record["budget"] for record in found] == [7, 5], "in the order that was asked for"
    assert found[0]["latency_seconds_p95"] <= found[0]["latency_seconds_p99"] <= 3
    assert [record["peak_rss_bytes"] for record in found] == [3, 4], "the largest"
    assert (found[0]["late"], found[0]["num_inputs"]) == (2.5, 1.0), "the median of all rounds, not that of the first"
    assert found[0]["latency_seconds_median"] == pytest.approx(2.5) and found[0]["rounds"] == 2
    del ran[:]
    bench.bench(WorkerJob("passes", "store"), ["resident", 7, 5], 1, lambda line: None)
    assert ran == [5, 7, "resident"]
