"""The bench of a task: what a policy costs and gains on the task's own texts, beside the plain and truncated models.

The plain model is the same store, backend and budget with no head of an exit run; a truncated model is cut after a
layer and answers there. Each is measured in processes of its own, interleaved; what is shown are medians of rounds, and
the largest peak. Speed-ups are wall-clock, against the plain model at the same batch size. What a count of layers would
promise stands beside them and measures nothing.

Shapes: N texts, R rounds, U units that are timed (texts, batches, or all texts at once).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import numpy as np

from offramp.errors import BudgetError
from offramp.experiments.bench import run_rounds
from offramp.experiments.children import output_of
from offramp.experiments.evaluation import model_label_ids, trained_length
from offramp.measure import median, percentile
from offramp.store import Store
from offramp.store.exits import read_exits
from offramp.tasks.arrays import Record, stacked
from offramp.tasks.examples import Splits, digest, spread
from offramp.tasks.images import Image
from offramp.tasks.metrics import paired_interval, score
from offramp.tasks.text import Text

LARGE_BATCH = 8
BATCHES = (1, LARGE_BATCH, "bulk")
PAIRED_OVER = {1: "texts", LARGE_BATCH: "batches", "bulk": "rounds"}
"""What is drawn for the interval of a speed-up, rounds always included. The batches of bulk mode depend on the plan, so
that two rivals have no batch in common."""
NUM_DRAWS = 1000
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows of a split, and what is true of them."""

    task: str
    split: str
    metrics: tuple[str, ...]
    texts: list[Text | Image | Record]
    labels: tuple[str, ...]
    """Of the model, by their ids; none for a regression."""
    truth_N: np.ndarray
    data_sha256: str

    def answers(self, record: Mapping[str, Any]) -> np.ndarray:
        """What a process answered: label ids [N], or values [N]."""
        found = record["texts"]["answers"]
        return np.array([self.labels.index(answer) for answer in found] if self.labels else found)


@dataclass(frozen=True)
class Rival:
    """What is measured, and how it is called."""

    name: str
    """`plain`, `exits` or `truncated`."""
    exit: str
    batch: int | str
    deadline_seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.name if self.name == 'plain' else self.exit}, batch {self.batch}"

    @property
    def words(self) -> list[str]:
        """Options of the command line."""
        deadline = [] if self.deadline_seconds is None else ["--deadline", f"{self.deadline_seconds:.9f}"]
        return ["--exit", self.exit, "--batch", str(self.batch), *deadline]


@dataclass(frozen=True)
class Measured:
    """One rival. Latencies are those of a batch; scores are in percent, differences in points, intervals of 95 %.

    What is against the plain model is None for the plain model itself, and an interval is None where a single round of
    a single unit leaves nothing to draw.
    """

    rival: str
    exit: str
    batch: int | str
    rows: int
    """That the plan is made for; in bulk mode shorter texts are more."""
    latency_seconds_p50: float
    latency_seconds_p90: float
    latency_seconds_p99: float
    texts_per_second: float
    peak_rss_bytes: int
    bytes_read_per_text: float
    scores: dict[str, float]
    """Each metric, and `score`, their mean."""
    score_difference: float | None
    score_difference_low: float | None
    score_difference_high: float | None
    speedup: float | None
    """Seconds of the plain model over those of this one."""
    speedup_low: float | None
    speedup_high: float | None
    paired_over: str
    """What was drawn for the interval of the speed-up, beside rounds."""
    mean_exit: float
    layer_count_speedup: float
    """Layers over the mean exit: no measurement."""


def take_sample(store: Store, data: Splits, split: str, num_rows: int) -> Sample:
    """At most so many rows of a split, evenly spaced; of several splits of this name (MNLI's dev) the first.

    Raises UsageError for an unknown split, and for labels that are not the model's.
    """
    ids = model_label_ids(data.labels, store.program.problem, store.labels, store.path)
    name, examples = next(iter(data.named([split]).items()))
    rows = [(text, ids[int(label)] if ids else label) for text, label in spread(examples, num_rows)]
    labels = store.labels if data.labels else ()
    truth_N = np.array([label for _, label in rows])
    return Sample(data.name, name, data.metrics, [text for text, _ in rows], labels, truth_N, digest(rows))


def rivals_of(store: Store, exit: str, deadline_seconds: float | None, batches: Sequence[int | str]) -> list[Rival]:
    """The plain model and the policy at each batch size; each truncated model at batch 1, for time's sake.

    A store whose exits were never trained has none to be cut at.
    """
    found = [Rival("plain", "none", batch) for batch in batches]
    if exit != "none" or deadline_seconds is not None:
        found += [Rival("exits", exit, batch, deadline_seconds) for batch in batches]
    description = read_exits(store) if store.manifest.exits else None
    if description is not None and description.trained:
        found += [Rival("truncated", f"stage:{number}", 1) for number in range(1, len(store.program.layers))]
    return found


def bench_task(
    store: Store,
    sample: Sample,
    exit: str,
    deadline_seconds: float | None,
    options: Sequence[str],
    rounds: int,
    say: Say,
) -> tuple[list[Measured], dict[str, Any]]:
    """Measure each rival on the sample, and one record of what all had in common.

    `options` go to each process, as `offramp bench --once` and `offramp plan` take them. A batch size that the budget
    does not hold is left out; if it is batch 1, that is the BudgetError. What is wrong with store, policy or budget is
    raised before anything is measured.
    """
    with TemporaryDirectory() as folder:
        words = ["--input", str(_write_inputs(sample, Path(folder))), *options]
        length = trained_length(store.path) if store.program.texts is not None else None
        words += [] if length is None or "--max-length" in options else ["--max-length", str(length)]
        batches = [
            batch for batch in BATCHES if _has_room(store, Rival("exits", exit, batch, deadline_seconds), words, say)
        ]
        rivals = rivals_of(store, exit, deadline_seconds, batches)
        base = [sys.executable, "-m", "offramp", "bench", str(store.path), "--once", *words]
        commands = {str(rival): [*base, *rival.words] for rival in rivals}
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        for name, record in run_rounds(commands, rounds, say):
            found[name].append(record)
    num_layers = len(store.program.layers)
    plain = {rival.batch: found[str(rival)] for rival in rivals if rival.name == "plain"}
    rows = [measured(rival, found[str(rival)], plain[rival.batch], sample, num_layers) for rival in rivals]
    return rows, _common(sample, plain[1][0], rounds, num_layers)


def measured(
    rival: Rival,
    records: Sequence[Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]],
    sample: Sample,
    num_layers: int,
) -> Measured:
    """What the rounds of a rival come to, beside those of the plain model at the same batch size."""
    latencies = [record["latencies_seconds"] for record in records]
    p50, p90, p99 = (median([percentile(each, percent) for each in latencies]) for percent in (50, 90, 99))
    mean_exit = float(np.mean([record["texts"]["exit_stages"] for record in records]))
    answer_RN = np.stack([sample.answers(record) for record in records])
    each_round = [score(sample.metrics, sample.truth_N, answer_N) for answer_N in answer_RN]
    gain = speedup = (None, None, None)
    if rival.name != "plain":
        gain = paired_interval(sample.metrics, sample.truth_N, _distinct(answer_RN), _distinct(_answers(plain, sample)))
        speedup = paired_speedup(_seconds(plain, rival.batch), _seconds(records, rival.batch))
    return Measured(
        rival.name, rival.exit, rival.batch, records[0]["batch"], p50, p90, p99,
        len(sample.texts) / median([record["texts"]["seconds"] for record in records]),
        max(record["peak_rss_bytes"] for record in records),
        median([record["bytes_read_per_input"] for record in records]),
        {name: float(np.mean([scores[name] for scores in each_round])) for name in each_round[0]},
        *gain, *speedup, PAIRED_OVER[rival.batch], mean_exit, num_layers / mean_exit,
    )  # fmt: skip


def paired_speedup(plain_RU: np.ndarray, own_RU: np.ndarray) -> tuple[float, float | None, float | None]:
    """Seconds of the plain model over one's own, and the 95 % interval; None where there is nothing to draw.

    Seconds are medians over rounds, summed over units. The interval is the percentile bootstrap over rounds and units,
    drawn alike for both sides, from a fixed seed.
    """
    num_rounds, num_units = plain_RU.shape

    def ratio(rounds: np.ndarray, units: np.ndarray) -> float:
        plain, own = (np.median(seconds_RU[np.ix_(rounds, units)], axis=0).sum() for seconds_RU in (plain_RU, own_RU))
        return float(plain / own)

    whole = ratio(np.arange(num_rounds), np.arange(num_units))
    if num_rounds * num_units == 1:
        return whole, None, None
    generator = np.random.default_rng(0)
    drawn = [
        ratio(generator.integers(0, num_rounds, num_rounds), generator.integers(0, num_units, num_units))
        for _ in range(NUM_DRAWS)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return whole, float(low), float(high)


def _seconds(records: Sequence[Mapping[str, Any]], batch: int | str) -> np.ndarray:
    """[R, U]: of each text, of each batch, or of all texts."""
    if batch == "bulk":
        return np.array([[record["texts"]["seconds"]] for record in records])
    return np.array([record["latencies_seconds"] for record in records])


def _answers(records: Sequence[Mapping[str, Any]], sample: Sample) -> np.ndarray:
    return np.stack([sample.answers(record) for record in records])


def _distinct(answer_RN: np.ndarray) -> np.ndarray:
    """One row where all rounds answered alike, as they do unless a deadline cuts."""
    return answer_RN[:1] if (answer_RN == answer_RN[0]).all() else answer_RN


def _has_room(store: Store, rival: Rival, words: Sequence[str], say: Say) -> bool:
    """Whether the budget holds a batch size; in a process of its own, which tells all else that is wrong as well."""
    try:
        output_of([sys.executable, "-m", "offramp", "plan", str(store.path), "--json", *words, *rival.words])
    except BudgetError as error:
        if rival.batch != LARGE_BATCH:
            raise
        say(f"batch {rival.batch} is left out: {error}")
        return False
    return True


def _write_inputs(sample: Sample, folder: Path) -> Path:
    """As `offramp run` reads them: lines of texts, a zip of images whose names are in order, or arrays."""
    if all(isinstance(text, Record) for text in sample.texts):
        arrays: dict[str, Any] = stacked([text for text in sample.texts if isinstance(text, Record)])
        np.savez(folder / "inputs.npz", **arrays)
        return folder / "inputs.npz"
    if any(isinstance(text, Image) for text in sample.texts):
        path = folder / "inputs.zip"
        with ZipFile(path, "w") as archive:
            for number, image in enumerate(sample.texts):
                assert isinstance(image, Image)
                archive.writestr(f"{number:06d}{Path(image.member or image.path).suffix}", image.read())
        return path
    path = folder / "inputs.jsonl"
    pairs = [{"text": text} if isinstance(text, str) else {"text": text[0], "pair": text[1]} for text in sample.texts]  # type: ignore[index]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def _common(sample: Sample, record: Mapping[str, Any], rounds: int, num_layers: int) -> dict[str, Any]:
    keys = ("model", "store_sha256", "backend", "threads", "budget_bytes", "reads", "verify")
    return {
        "task": sample.task,
        "split": sample.split,
        "metrics": list(sample.metrics),
        "data_sha256": sample.data_sha256,
        "num_texts": len(sample.texts),
        "num_layers": num_layers,
        "rounds": rounds,
        **{key: record[key] for key in keys},
    }
