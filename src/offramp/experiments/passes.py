"""Benchmark passes in a worker process: warm up, run, and describe.

The peak is the kernel's high-water mark of the whole process, imports included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from offramp.measure import read_memory
from offramp.profiling.random_inputs import random_sweep
from offramp.session import Classifier

WARM_UP_PASSES = 2


def measure_random(classifier: Classifier, length: int, num_passes: int) -> dict[str, Any]:
    """Warm up, run `num_passes` sweeps of random inputs of `length` tokens, and return the record."""
    num_rows = classifier.settings.num_rows
    for index in range(WARM_UP_PASSES):
        classifier.predict_batches(random_sweep(classifier, num_rows, length, index))
    warm = classifier.record()
    for index in range(num_passes):
        classifier.predict_batches(random_sweep(classifier, num_rows, length, WARM_UP_PASSES + index))
    return _record(classifier, WARM_UP_PASSES, warm)


def measure_inputs(classifier: Classifier, inputs: Sequence[Any]) -> dict[str, Any]:
    """Warm up on the first batches, run all inputs once, and return the record; `texts` holds the answers."""
    warm_up = inputs[: WARM_UP_PASSES * classifier.settings.num_rows * classifier.settings.num_batches]
    classifier.predict(warm_up)
    num_warm, warm = len(classifier.latencies), classifier.record()
    began = time.perf_counter()
    results = classifier.predict(inputs)
    found = {
        "seconds": time.perf_counter() - began,
        "answers": [result.score if result.label is None else result.label for result in results],
        "exit_stages": [result.exit_stage for result in results],
    }
    return {**_record(classifier, num_warm, warm), "texts": found}


def _record(classifier: Classifier, num_warm: int, warm: dict[str, Any]) -> dict[str, Any]:
    """Return the record without the first `num_warm` sweeps, after which the record was `warm`."""
    record, latencies = classifier.record(first_batch=num_warm), classifier.latencies[num_warm:]
    read_bytes, num_inputs = (record[key] - warm[key] for key in ("bytes_read_total", "num_inputs"))
    return {
        **record,
        "latencies_seconds": latencies,
        "peak_rss_bytes": read_memory().peak_bytes,
        "bytes_read_per_input": read_bytes / max(num_inputs, 1),
    }
