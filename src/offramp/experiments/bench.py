"""Latency, peak and bytes read of a store for several budgets: each in processes of its own, interleaved, medians
over all rounds.

A process measures itself: its peak is the kernel's high-water mark of the whole process, imports included.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offramp.experiments.children import output_of
from offramp.measure import median, percentile, read_memory
from offramp.program.inputs import Batch
from offramp.runtime.profile import DeviceProfile, load_profile
from offramp.session import Classifier
from offramp.store import Store
from offramp.tasks.text import token_batch

RANDOM_LENGTH = 128
"""Tokens of a random input."""
WARM_UP_PASSES = 2


def random_length(store: str, max_length: int | None) -> int:
    """Tokens of a random input: as many as asked for, else RANDOM_LENGTH, but no more than the model reads; 1 of what
    has no length. Raises StoreError for a module whose stages are no graphs.
    """
    with Store(store, verify="never") as opened:
        texts = opened.program.texts
        return 1 if texts is None else min(max_length or RANDOM_LENGTH, texts.max_length)


def random_tokens(
    classifier: Classifier, num_rows: int, length: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask and types of random input [num_rows, length]; a linear congruence, so that no generator library is
    loaded.
    """
    texts = classifier.store.program.texts
    assert texts is not None
    vocab_size = texts.vocab_size
    ids = (np.arange(num_rows * length, dtype=np.int64) * 7919 + seed * 104729 + 1) % vocab_size
    ids = ids.reshape(num_rows, length)
    return ids, np.ones_like(ids), np.zeros_like(ids)


def random_batch(classifier: Classifier, num_rows: int, length: int, seed: int) -> Batch:
    """Random tokens, or whatever else the store takes, made likewise."""
    program = classifier.store.program
    if program.texts is not None:
        return token_batch(program.texts, *random_tokens(classifier, num_rows, length, seed))
    found = {}
    for name, value in program.inputs.items():
        shape = (num_rows, *(axis for axis in value.axes[1:] if isinstance(axis, int)))
        numbers = (np.arange(int(np.prod(shape)), dtype=np.int64) * 7919 + seed * 104729 + 1) % 256
        is_real = np.issubdtype(np.dtype(value.dtype), np.floating)  # of ids any table has the first two
        values = numbers.astype(np.float32) / 128 - 1 if is_real else numbers % 2
        found[name] = values.reshape(shape).astype(value.dtype)
    return Batch(found, num_rows, 1, np.ones(num_rows, np.int64))


def random_sweep(classifier: Classifier, num_rows: int, length: int, number: int) -> list[Batch]:
    """As many random batches as share a sweep: one, but in bulk."""
    num_batches = classifier.settings.num_batches
    places = range(number * num_batches, (number + 1) * num_batches)
    return [random_batch(classifier, num_rows, length, place) for place in places]


def measure_tokens(classifier: Classifier, num_rows: int, length: int, num_passes: int) -> dict[str, Any]:
    """Warm up, run `num_passes` batches of random inputs, and describe them."""
    for index in range(WARM_UP_PASSES):
        classifier.predict_batches(random_sweep(classifier, num_rows, length, index))
    warm = classifier.record()
    for index in range(num_passes):
        classifier.predict_batches(random_sweep(classifier, num_rows, length, WARM_UP_PASSES + index))
    return describe(classifier, WARM_UP_PASSES, warm)


def measure_texts(classifier: Classifier, texts: Sequence[Any]) -> dict[str, Any]:
    """Warm up on the first batches, run all texts once, and describe that; under `texts`, what became of each."""
    warm_up = texts[: WARM_UP_PASSES * classifier.settings.num_rows * classifier.settings.num_batches]
    classifier.predict(warm_up)
    num_warm, warm = len(classifier.latencies), classifier.record()
    began = time.perf_counter()
    results = classifier.predict(texts)
    found = {
        "seconds": time.perf_counter() - began,
        "answers": [result.score if result.label is None else result.label for result in results],
        "exit_stages": [result.exit_stage for result in results],
    }
    return {**describe(classifier, num_warm, warm), "texts": found}


def describe(classifier: Classifier, num_warm: int, warm: dict[str, Any]) -> dict[str, Any]:
    """The record of a benchmark process, without its first `num_warm` batches, after which the record was `warm`."""
    record, latencies = classifier.record(first_batch=num_warm), classifier.latencies[num_warm:]
    read_bytes, num_inputs = (record[key] - warm[key] for key in ("bytes_read_total", "num_inputs"))
    return {
        **record,
        "latencies_seconds": latencies,
        "peak_rss_bytes": read_memory().peak_bytes,
        "bytes_read_per_input": read_bytes / max(num_inputs, 1),
    }


def run_rounds(
    commands: Mapping[str, Sequence[str]], rounds: int, say: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run each command once a round, another one first in each; yields (name, the JSON object on its last line). A
    failure ends the benchmark.
    """
    names = list(commands)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            output = output_of(commands[name], say if number == 0 else lambda line: None)
            say(f"round {number + 1}/{rounds}: {name}")
            yield name, json.loads(output.strip().splitlines()[-1])


def bench(
    store: str, budgets: Sequence[str], options: Sequence[str], rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One record a budget (in bytes), in order. `options` go to each process as `offramp bench --once` takes them.

    The smallest budget runs first: if one is impossible, it is that, and nothing was measured in vain.
    """
    base = [sys.executable, "-m", "offramp", "bench", store, "--once", *options]
    commands = {budget: [*base, "--budget", budget] for budget in sorted(budgets, key=int)}
    found: dict[str, list[dict[str, Any]]] = {budget: [] for budget in budgets}
    for budget, record in run_rounds(commands, rounds, say):
        found[budget].append(record)
    return [summary(records) for records in found.values()]


def profile_here(
    store: str, longest: int | None, options: Sequence[str], path: Path, say: Callable[[str], None]
) -> DeviceProfile:
    """The device profile of a store, measured in a process that is there for this alone, or remembered from before.

    `longest`: tokens of the longest text; None where inputs have no length.
    """
    words = ["--save-profile", str(path), "--remembered", *options]
    words += [] if longest is None else ["--max-length", str(longest)]
    say("measuring what each exit takes on this machine, unless that is known: at most 2 minutes")
    output_of([sys.executable, "-m", "offramp", "bench", store, *words], say)
    return load_profile(path)


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Records of the same command as one: the median over all batches of all rounds, the largest peak, medians of the
    rest.
    """
    latencies = [seconds for record in records for seconds in record["latencies_seconds"]]
    kept = {key: value for key, value in records[0].items() if key not in ("latencies_seconds", "texts")}
    for key in ("bound_seconds", "bytes_read_per_input", "seconds_total"):
        kept[key] = median([record[key] for record in records])
    kept["peak_rss_bytes"] = max(record["peak_rss_bytes"] for record in records)
    kept["latency_seconds_median"] = median(latencies)
    kept["latency_seconds_p95"] = percentile(latencies, 95)
    kept["rounds"] = len(records)
    return kept
