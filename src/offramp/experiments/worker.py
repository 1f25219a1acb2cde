"""A worker process: `python -m offramp.experiments.worker` reads one JSON job on stdin and prints JSON lines.

Lines are `{"progress": text}`, and last `{"result": tree}` or `{"error": {"class", "what", "where", "remedy"}}`. The
process ends when its parent does. Libraries are imported by the job that needs them, since a worker measures its own
memory. Keeps to Python 3.8: `offramp profile` uses it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Callable

from offramp.errors import OfframpError, UsageError
from offramp.experiments.jobs import WorkerJob
from offramp.runtime.config import BULK
from offramp.session import Classifier, prepare_engine

_PR_SET_PDEATHSIG = 1
"""Option of prctl(2): the signal that this process receives when its parent ends."""


def main() -> int:
    """Run the job on stdin; returns the exit code."""
    _die_with_parent()
    tree = json.load(sys.stdin)
    parent = tree.pop("parent", None)
    if parent is not None and os.getppid() != parent:  # the parent ended before prctl took effect
        return 1
    try:
        job = WorkerJob.from_json(tree)
        job = replace(job, config=replace(job.config, own_process=True))
        _send("result", _RUN[job.job](job))
        return 0
    except OfframpError as error:
        where = None if error.where is None else str(error.where)
        about = {"class": type(error).__name__, "what": error.what, "where": where, "remedy": error.remedy}
        _send("error", about)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        what = f"internal error in a worker process: {type(error).__name__}: {error}"
        _send("error", {"class": "OfframpError", "what": what, "where": None, "remedy": "report it"})
        return 1


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends. Other systems have no such call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _send(kind: str, tree: Any) -> None:
    print(json.dumps({kind: tree}), flush=True)


def _log(line: str) -> None:
    _send("progress", line)


def _prepare(job: WorkerJob, **more: Any) -> Classifier:
    options = {"texts": job.inputs.known(), **more}
    return prepare_engine(job.store, job.config, warn=lambda line: _log(f"offramp: warning: {line}"), **options)


def _plan(job: WorkerJob) -> dict[str, Any]:
    classifier = _prepare(job)
    classifier.plan.require_feasible(classifier.items)
    return classifier.describe_plan()


def _passes(job: WorkerJob) -> dict[str, Any]:
    from offramp.experiments.passes import measure_random
    from offramp.profiling.random_inputs import random_length

    length = random_length(job.store, job.config.max_length)
    with _prepare(replace(job, config=replace(job.config, longest=length))) as classifier:
        return measure_random(classifier, length, job.passes)


def _inputs(job: WorkerJob) -> dict[str, Any]:
    from offramp.experiments.passes import measure_inputs

    with _prepare(job) as classifier:
        return measure_inputs(classifier, list(job.inputs))


def _run(job: WorkerJob) -> dict[str, Any]:
    from offramp.measure import MemorySampler, read_memory

    inputs = list(islice(job.inputs, job.max_inputs))
    sampler = MemorySampler()
    with sampler if job.sampled else nullcontext(), _prepare(job) as classifier:
        results = classifier.predict(inputs, more=False)
        record = {**classifier.record(), "peak_rss_bytes": read_memory().peak_bytes}
    found = {"results": [asdict(result) for result in results], "record": record}
    return {**found, "samples": sampler.samples, "spans": classifier.trace.spans()} if job.sampled else found


def _profile(job: WorkerJob) -> dict[str, Any]:
    from offramp.profiling.profiler import Scheduled, device_profile
    from offramp.profiling.random_inputs import random_length

    if job.config.batch == BULK:
        raise UsageError("a profile is of a fixed number of rows", None, "give --batch 8, or another number")
    longest = random_length(job.store, job.config.max_length)
    config = replace(job.config, exit="none", deadline=None, profile=None, longest=longest)
    classifier = _prepare(replace(job, config=config), policy=Scheduled())
    profile = device_profile(classifier, longest, _log, job.recall)
    return replace(profile, budget_bytes=config.budget).to_json()


def _reference(job: WorkerJob) -> dict[str, Any]:
    from offramp.experiments.reference import classify

    return classify(job.store, job.inputs, job.config)


_RUN: dict[str, Callable[[WorkerJob], dict[str, Any]]] = {
    "plan": _plan,
    "passes": _passes,
    "inputs": _inputs,
    "run": _run,
    "profile": _profile,
    "reference": _reference,
}

if __name__ == "__main__":
    sys.exit(main())
