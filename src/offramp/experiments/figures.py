"""Records of jobs that measure: figures, raw samples, and the environment, of offramp and of rivals alike.

Figures are in seconds, bytes, percent and layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.errors import NonFiniteError
from offramp.measure import median, percentile

SAMPLE = "sample.json"
"""Name of the file with the labels of the rows that are measured, in the folder of their step."""
Tree = Mapping[str, Any]


def measured(found: Tree, step: Tree, memory: Any) -> dict[str, Any]:
    """Return figures and raw samples of a measurement that has ended: imports from here on are not in its peak."""
    run = dict(found)
    texts, seconds = run.pop("texts", None), run.pop("latencies_seconds")
    figures = {"memory": found["peak_rss_bytes"], "predicted_memory": found["predicted_peak_bytes"]}
    figures |= {"bytes": found["bytes_read_per_input"], "bound": found["bound_seconds"]}
    samples = {} if memory is None else {"memory": [list(each) for each in memory], "spans": run.pop("spans")}
    return completed(figures, seconds, run, texts, step, samples)


def completed(
    figures: Tree, seconds: Sequence[float], run: Tree, texts: Tree | None, step: Tree, more: Tree | None = None
) -> dict[str, Any]:
    """Return figures and raw samples with those of latencies and scores, the record of the run, and the environment.

    `texts` are the answers to the rows of the sample of the step, if there is one; `more` are other samples.
    """
    from offramp.measure.conditions import surroundings

    known = {"latency": median(seconds), "latency_p95": percentile(seconds, 95), "latency_p99": percentile(seconds, 99)}
    known |= figures
    samples: dict[str, Any] = {"latencies": seconds}
    if texts is not None:
        about = _scored(json.loads((Path(step["sample"]) / SAMPLE).read_text()), texts)
        known |= {**about.pop("scores"), "mean_exit": sum(texts["exit_stages"]) / len(texts["exit_stages"])}
        known["time_per_input"] = texts["seconds"] / len(texts["answers"])
        samples |= {"exits": texts["exit_stages"], **about}
    about = {"run": dict(run), "environment": surroundings(step["store"])}
    return {"figures": known, "samples": {**samples, **(more or {})}, **about}


def _scored(sample: Tree, texts: Tree) -> dict[str, Any]:
    """Return answers and truths as numbers, and the scores. Raises NonFiniteError for a score that is no number."""
    import numpy as np

    from offramp.tasks.metrics import score

    labels = sample["labels"]
    answers = [labels.index(answer) for answer in texts["answers"]] if labels else texts["answers"]
    scores = score(sample["metrics"], np.array(sample["truth"]), np.array(answers))
    if not all(map(np.isfinite, scores.values())):
        raise NonFiniteError(f"the score is {scores['score']}", None, "train the exits again")
    about = {name: sample[name] for name in ("truth", "metrics", "labels")}
    return {"scores": scores, "answers": answers, **about}
