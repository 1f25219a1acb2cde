"""Rivals as jobs of a sweep: the model is converted first, and each round is a process of the rival's own.

A worker process of offramp makes the token ids, starts the rival, and completes the record with its figures: they are
those of the other jobs, but latencies begin with token ids, where those of texts in offramp begin with the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offramp.errors import AbsentError, OfframpError, RefusedError
from offramp.experiments.against import token_inputs
from offramp.experiments.children import Log, TimedOutError
from offramp.experiments.figures import completed
from offramp.experiments.jobs import WARM_UP_PASSES
from offramp.experiments.rivals import MEASURE_SECONDS, TIMED_OUT, Chosen, RivalJob, model_digest, prepared, versions
from offramp.measure import default_threads
from offramp.runtime.sweep import Outcome
from offramp.session.inputs import InputSource
from offramp.session.results import result_of
from offramp.store import Store


def convert(step: Mapping[str, Any], log: Log) -> dict[str, Any]:
    """Convert the model of a rival, unless the cache has it; return the digest of the model.

    Raises AbsentError where something is not installed.
    """
    chosen, model = Chosen(step["rival"], step["python"]), Path(step["model"])
    _versions(chosen)
    digest = model_digest(model)
    _converted(chosen, model, digest, log)
    return {"digest": digest}


def measure(step: Mapping[str, Any], log: Log) -> dict[str, Any]:
    """Run one round of a rival: its record, with figures and raw samples."""
    chosen, model = Chosen(step["rival"], step["python"]), Path(step["model"])
    source, threads = InputSource(**step["inputs"]), step["threads"] or default_threads().number
    installed = _versions(chosen)  # of now: the conversion may be of last month
    form = _converted(chosen, model, step["digest"], log)
    with Store(step["store"], "never") as store:
        inputs = token_inputs(store, source, step["passes"], step["max_length"], log)
        job = RivalJob(chosen, model, form, inputs, WARM_UP_PASSES, threads, step["options"])
        message = job.run(step["timeout"] or MEASURE_SECONDS)
        if message.get("kind") == TIMED_OUT:
            raise TimedOutError(f"{chosen.name}: {message['failed']}", model, "give a longer timeout in the recipe")
        if "failed" in message:
            raise OfframpError(f"{chosen.name}: {message['failed']}", model)
        found = message["result"]
        texts = _texts(found, store) if source else None
    run = {"rival": chosen.name, "python": chosen.python, "versions": installed, "threads": threads}
    run |= {"precision": found["precision"], **step["options"]}
    figures = {"memory": found["peak_rss_bytes"]}
    if not chosen.rival.maps_files:
        figures["bytes"] = found["bytes_read_per_input"]
    return completed(figures, found["latencies_seconds"], run, texts, step)


def _versions(chosen: Chosen) -> Mapping[str, str]:
    """Return the versions of what a rival needs. Raises AbsentError where something is not installed."""
    found = versions(chosen)
    if isinstance(found, str):
        raise AbsentError(f"{chosen.name}: {found}", None, f"install it, or give --rival {chosen.name}=PYTHON")
    return found


def _converted(chosen: Chosen, model: Path, digest: str, log: Log) -> Path | None:
    """Return the folder of what a rival reads; None: the model. Raises RefusedError where it cannot be converted."""
    form = prepared(chosen, model, digest, log)
    if isinstance(form, str):
        raise RefusedError(f"{chosen.name}: {form}", model, "leave this rival out")
    return form


def _texts(found: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """Return the answers to the texts after the warm-up, all at the last exit. Raises RefusedError for other logits."""
    output, labels, rows = store.program.output, store.labels, found["logits"][WARM_UP_PASSES:]
    assert output is not None, "the store has a head"
    if len(rows[0]) != output.num_labels:
        what = f"it gives {len(rows[0])} logits, and the model has {output.num_labels}"
        raise RefusedError(what, store.path, "leave this rival out")
    results = [result_of(Outcome(np.array(logits_C)), output.problem, labels) for logits_C in rows]
    answers = [result.score if result.label is None else result.label for result in results]
    exits = [len(store.program.layers)] * len(answers)
    return {"answers": answers, "exit_stages": exits, "seconds": sum(found["latencies_seconds"])}
