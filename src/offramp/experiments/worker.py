"""A worker process: `python -m offramp.experiments.worker` reads one JSON job on stdin and prints JSON lines.

Lines are `{"progress": text}`, and last `{"result": tree}` or `{"error": {"class", "what", "where", "remedy",
"environment"}}`. The process ends when its parent does. Libraries are imported by the job that needs them, since a
worker measures its own memory. Keeps to Python 3.8: `offramp profile` uses it.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Callable

from offramp.errors import OfframpError, UsageError, system_error
from offramp.experiments.jobs import WARM_UP_PASSES, WorkerJob, described
from offramp.measure import MemorySampler, default_threads, median, read_memory
from offramp.measure.processes import die_with_parent, is_orphan
from offramp.policies import Policy
from offramp.runtime.config import BULK
from offramp.session import Classifier, prepare_engine
from offramp.session.lengths import require_feasible
from offramp.session.records import SUMS
from offramp.tasks.lines import silent


def main() -> int:
    """Run the job on stdin; returns the exit code."""
    die_with_parent()
    tree = json.load(sys.stdin)
    parent = tree.pop("parent", None)
    if parent is not None and is_orphan(parent):
        return 1
    folder = ""
    try:
        job = WorkerJob.from_json(tree)
        folder = job.folder
        job = replace(job, config=replace(job.config, own_process=True))
        _send("result", _RUN[job.job](job))
        return 0
    except OfframpError as error:
        return _refuse(described(error), folder, error.exit_code)
    except Exception as error:
        found = system_error(error)  # no memory, a full disk
        if found is not None:
            return _refuse(described(found), folder, found.exit_code)
        traceback.print_exc()
        what = f"internal error in a worker process: {type(error).__name__}: {error}"
        return _refuse({"class": "OfframpError", "what": what, "where": None, "remedy": "report it"}, folder, 1)


def _refuse(error: dict[str, Any], folder: str, exit_code: int) -> int:
    """Send an error and the machine on which it was raised; return the exit code."""
    from offramp.measure.conditions import surroundings

    try:
        here = surroundings(folder)
    except (MemoryError, OSError):  # the reason may be lack of memory: the parent then says what it knows
        here = None
    _send("error", {**error, "environment": here})
    return exit_code


def _send(kind: str, tree: Any) -> None:
    print(json.dumps({kind: tree}), flush=True)


def _log(line: str) -> None:
    _send("progress", line)


def _prepare(job: WorkerJob, **more: Any) -> Classifier:
    options = {"texts": job.inputs.known(silent), **more}
    return prepare_engine(job.store, job.config, warn=lambda line: _log(f"offramp: warning: {line}"), **options)


def _plan(job: WorkerJob) -> dict[str, Any]:
    classifier = _prepare(job)
    require_feasible(classifier)
    return classifier.describe_plan()


def _passes(job: WorkerJob) -> dict[str, Any]:
    from offramp.profiling.random_inputs import random_length, random_sweep

    length = random_length(job.store, job.config.max_length)
    with _prepare(replace(job, config=replace(job.config, longest=length))) as classifier:
        num_rows, warm = classifier.settings.num_rows, {}
        for index in range(WARM_UP_PASSES + job.passes):
            if index == WARM_UP_PASSES:
                warm = classifier.record()
            classifier.predict_batches(random_sweep(classifier, num_rows, length, index))
        return {**_bench_record(classifier, WARM_UP_PASSES, warm), **_spans(job, classifier)}


def _tokens(job: WorkerJob) -> dict[str, Any]:
    import numpy as np

    from offramp.session.results import scores_of
    from offramp.tasks.text import token_batch

    longest = max(len(ids_S) for ids_S, _ in job.tokens)
    with _prepare(replace(job, config=replace(job.config, longest=longest))) as classifier:
        texts, warm, scores = classifier.store.program.texts, {}, []
        assert texts is not None, "the caller has made tokens for this store"
        for index, (ids_S, types_S) in enumerate(job.tokens):
            if index == WARM_UP_PASSES:
                warm = classifier.record()
            ids_BS, types_BS = np.array([ids_S], np.int64), np.array([types_S], np.int64)
            batch = token_batch(texts, ids_BS, np.ones_like(ids_BS), types_BS)
            scores += map(scores_of, classifier.predict_batches([batch], all_scores=True))
        return {**_bench_record(classifier, WARM_UP_PASSES, warm), "scores": scores}


def _inputs(job: WorkerJob, policy: Policy | None = None, restart: Callable[[], None] = lambda: None) -> dict[str, Any]:
    with _prepare(job, policy=policy) as classifier:
        inputs, settings = list(job.inputs), classifier.settings
        classifier.predict(inputs[: WARM_UP_PASSES * settings.num_rows * settings.num_batches])
        restart()
        num_warm, warm = len(classifier.latencies), classifier.record()
        began = time.perf_counter()
        results = classifier.predict(inputs)
        found = {
            "seconds": time.perf_counter() - began,
            "answers": [result.score if result.label is None else result.label for result in results],
            "exit_stages": [result.exit_stage for result in results],
        }
        return {**_bench_record(classifier, num_warm, warm), **_spans(job, classifier), "texts": found}


def _spans(job: WorkerJob, classifier: Classifier) -> dict[str, Any]:
    return {"spans": classifier.trace.spans()} if job.sampled else {}


def _bench_record(classifier: Classifier, num_warm: int, warm: dict[str, Any]) -> dict[str, Any]:
    """Return the record without the first `num_warm` sweeps, after which the record was `warm`."""
    record, latencies = classifier.record(first_batch=num_warm), classifier.latencies[num_warm:]
    record.update({key: record[key] - warm[key] for key in SUMS})
    peak_bytes, mean_bytes = read_memory().peak_bytes, record["bytes_read_total"] / max(record["num_inputs"], 1)
    found = {"latencies_seconds": latencies, "peak_rss_bytes": peak_bytes, "bytes_read_per_input": mean_bytes}
    return {**record, **found}


def _measure(job: WorkerJob) -> dict[str, Any]:
    from offramp.experiments.figures import measured
    from offramp.experiments.steps import planned_exits

    assert job.step is not None
    policy, sampler = planned_exits(job), MemorySampler()
    with sampler if job.sampled else nullcontext():
        if job.inputs:
            found = _inputs(job, policy, lambda: None if policy is None else policy.restart())
        else:
            found = _passes(job)
    return measured(found, job.step, sampler.samples if job.sampled else None)


def _step(job: WorkerJob) -> Any:
    from offramp.experiments.steps import take_step

    assert job.step is not None
    return take_step(job.step, _log)


def _run(job: WorkerJob) -> dict[str, Any]:
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
    require_feasible(classifier)  # before a profile is recalled: a plan that does not fit may look like one that does
    profile = device_profile(classifier, longest, _log, job.recall)
    return replace(profile, budget_bytes=config.budget_bytes).to_json()


def _reference(job: WorkerJob) -> dict[str, Any]:
    """Classify texts and pairs of texts one by one with transformers; `max_length` and `threads` are used."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from offramp.tasks.model_files import files_of
    from offramp.tasks.tokenizer import require_safe

    torch.set_num_threads(job.config.threads or default_threads().number)
    require_safe(files_of(job.store))
    tokenizer = AutoTokenizer.from_pretrained(job.store, local_files_only=True)  # a folder  # nosec B615
    model = AutoModelForSequenceClassification.from_pretrained(  # a folder  # nosec B615
        job.store, return_dict=True, local_files_only=True
    )
    model.eval()
    latencies, results = [], []
    for text in job.inputs:
        started = time.perf_counter()
        with torch.inference_mode():
            parts = (text,) if isinstance(text, str) else text
            inputs = tokenizer(*parts, truncation=True, max_length=job.config.max_length, return_tensors="pt")
            probability_C = model(**inputs).logits[0].softmax(0)
        latencies.append(time.perf_counter() - started)
        best = int(probability_C.argmax())
        results.append({"label": model.config.id2label[best], "score": float(probability_C[best])})
    record = {
        "latency_seconds_median": median(latencies),
        "seconds_total": sum(latencies),
        "peak_rss_bytes": read_memory().peak_bytes,
        "num_inputs": len(latencies),
    }
    return {"results": results, "record": record}


_RUN: dict[str, Callable[[WorkerJob], dict[str, Any]]] = {
    "plan": _plan, "passes": _passes, "inputs": _inputs, "tokens": _tokens, "run": _run, "profile": _profile,
    "reference": _reference, "measure": _measure, "step": _step,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
