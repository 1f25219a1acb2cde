"""Jobs of a sweep in this process."""

import json

import pytest

from offramp.experiments import pools, steps, sweep, worker
from offramp.experiments.children import LostError
from offramp.experiments.steps import take_step
from tests.experiments import toy_worker


@pytest.fixture
def in_process(monkeypatch):
    """Run jobs in this process, and return the list of the steps that were taken."""
    taken = []

    def run_worker(job, log=print, timeout_seconds=None, started=None):
        taken.append(job.step)
        model = job.step.get("experiment", {}).get("model")
        if model == "toy-is-killed":
            raise LostError("a worker process ended with -9 and no result")
        return json.loads(json.dumps(take_step(job.step, log) if job.job == "step" else worker._RUN[job.job](job)))

    monkeypatch.setitem(steps._STEPS, "toy", toy_worker.toy)
    monkeypatch.setattr(pools, "run_worker", run_worker)
    monkeypatch.setattr(sweep, "run_worker", run_worker)
    return taken
