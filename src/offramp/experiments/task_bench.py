"""Cost and gain of an exit policy on the texts of a task, compared with the plain model and with truncated models.

The plain model is the same store, backend and budget without any exit head; a truncated model ends after a layer and
answers there. Each is measured in processes of its own, interleaved; results are medians of rounds, and the largest
peak. Speed-ups are wall-clock ratios to the plain model at the same batch size; the ratio of layer counts is given for
comparison and is no measurement.

Shapes: N texts, R rounds, U timed units (texts, batches, or all texts at once).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from offramp.errors import BudgetError
from offramp.experiments.bench import run_rounds
from offramp.experiments.children import Log, run_worker
from offramp.experiments.evaluation import model_label_ids, trained_length
from offramp.experiments.held_out import held_out
from offramp.experiments.jobs import WorkerJob
from offramp.measure import median, percentile
from offramp.measure.statistics import paired_ratio
from offramp.runtime.config import EngineConfig
from offramp.session.inputs import InputSource
from offramp.store import Store
from offramp.store.exits import read_exits
from offramp.store.scratch import scratch_folder
from offramp.tasks.arrays import Record, stacked
from offramp.tasks.examples import Splits, digest, spread
from offramp.tasks.images import Image
from offramp.tasks.lines import silent
from offramp.tasks.metrics import metrics_of_ids, paired_interval, score
from offramp.tasks.text import Text

LARGE_BATCH = 8
BATCHES = (1, LARGE_BATCH, "bulk")
PAIRED_OVER = {1: "texts", LARGE_BATCH: "batches", "bulk": "rounds"}
"""Batch size -> what is resampled, in addition to rounds, for the interval of a speed-up. In bulk mode batches depend
on the plan, so two rivals have no batch in common."""
Records = Sequence[Mapping[str, Any]]
"""One record per round, as worker processes return them."""


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows of a split with their labels."""

    task: str
    split: str
    metrics: tuple[str, ...]
    texts: list[Text | Image | Record]
    labels: tuple[str, ...]
    """Labels of the model by id; empty for a regression."""
    truth_N: np.ndarray
    data_sha256: str
    training_rows: int | None
    """Number of rows of the split that were trained on; None: unknown."""
    includes_training_rows: bool
    """False if these rows were left out."""

    def answers(self, records: Records) -> np.ndarray:
        """Return the answers in the records of rounds: label ids or values [R, N]."""
        rounds = [record["texts"]["answers"] for record in records]
        return np.array([list(map(self.labels.index, found)) if self.labels else found for found in rounds])


@dataclass(frozen=True)
class Rival:
    """One configuration that is measured."""

    name: str
    """`plain`, `exits` or `truncated`."""
    exit: str
    batch: int | str
    deadline_seconds: float | None = None

    def __str__(self) -> str:
        return f"{self.name if self.name == 'plain' else self.exit}, batch {self.batch}"

    def configure(self, config: EngineConfig) -> EngineConfig:
        """Return `config` with the policy, batch size and deadline of this rival."""
        return replace(config, exit=self.exit, batch=self.batch, deadline=self.deadline_seconds)


@dataclass(frozen=True)
class Measured:
    """Results of one rival. Latencies are per batch; scores in percent, differences in points, 95 % intervals.

    Comparisons with the plain model are None for the plain model itself. Intervals are None for a single round, which
    does not show how much rounds differ; those of speed-ups for fewer rounds than `measure.statistics` judges.
    """

    rival: str
    exit: str
    batch: int | str
    rows: int
    """Rows per batch in the plan; in bulk mode, batches of shorter texts have more."""
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
    """Seconds of the plain model divided by those of this rival, in the same round; the median over rounds."""
    speedup_low: float | None
    speedup_high: float | None
    paired_over: str
    """Unit that was resampled, in addition to rounds, for the interval of the speed-up."""
    mean_exit: float
    layer_count_speedup: float
    """Number of layers divided by the mean exit; not a measurement."""


def take_sample(
    store: Store, data: Splits, split: str, num_rows: int, *, include: bool = False, log: Log = silent
) -> Sample:
    """Return at most `num_rows` evenly spaced rows of a split; of several splits with this name (MNLI's dev) the first.

    Rows that the model was trained on are left out, unless `include` is True.

    Raises UsageError for an unknown split, for labels that the model does not have, and for a split with many rows that
    were trained on.
    """
    ids = model_label_ids(data.labels, store.program.problem, store.labels, store.path, log)
    name, examples = next(iter(data.named([split]).items()))
    kept = held_out(store.path, {name: examples}, include, log)[name]
    rows = [(text, ids[int(label)] if ids else label) for text, label in spread(kept.examples, num_rows)]
    labels = store.labels if data.labels else ()
    truth_N = np.array([label for _, label in rows])
    known, metrics = (kept.training_rows, kept.includes_training_rows), metrics_of_ids(data.metrics, ids)
    return Sample(data.name, name, metrics, [text for text, _ in rows], labels, truth_N, digest(rows), *known)


def rivals_of(store: Store, exit: str, deadline_seconds: float | None, batches: Sequence[int | str]) -> list[Rival]:
    """Return the plain model and the policy at each batch size, and the truncated models at batch 1 to limit run time.

    A store whose exits are not trained has no truncated models.
    """
    found = [Rival("plain", "none", batch) for batch in batches]
    if exit != "none" or deadline_seconds is not None:
        found += [Rival("exits", exit, batch, deadline_seconds) for batch in batches]
    description = read_exits(store) if store.manifest.exits else None
    if description is not None and description.trained:
        found += [Rival("truncated", f"stage:{number}", 1) for number in range(1, len(store.program.layers))]
    return found


def bench_task(
    store: Store, sample: Sample, config: EngineConfig, rounds: int, log: Log
) -> tuple[list[Measured], dict[str, Any]]:
    """Measure each rival on the sample; return their results and one record of the common conditions.

    The exit and deadline of `config` are those of the policy; its batch size is not used. A batch size that the budget
    does not hold is left out; for batch 1 that is a BudgetError. Errors of store, policy and budget are raised before
    anything is measured.
    """
    if config.max_length is None and store.program.texts is not None:
        config = replace(config, max_length=trained_length(store.path))
    with scratch_folder("offramp-bench-") as folder:
        inputs = InputSource(file=str(write_inputs(sample, folder)))

        def job(kind: str, rival: Rival) -> WorkerJob:
            return WorkerJob(kind, str(store.path), rival.configure(config), inputs)

        with_policy = [Rival("exits", config.exit, batch, config.deadline) for batch in BATCHES]
        batches = [rival.batch for rival in with_policy if _has_room(job("plan", rival), log)]
        rivals = rivals_of(store, config.exit, config.deadline, batches)
        found: dict[str, list[dict[str, Any]]] = {str(rival): [] for rival in rivals}
        for name, record in run_rounds({str(rival): job("inputs", rival) for rival in rivals}, rounds, log):
            found[name].append(record)
    num_layers = len(store.program.layers)
    plain = {rival.batch: found[str(rival)] for rival in rivals if rival.name == "plain"}
    rows = [measured(rival, found[str(rival)], plain[rival.batch], sample, num_layers) for rival in rivals]
    return rows, _common(sample, plain[1][0], rounds, num_layers)


def measured(rival: Rival, records: Records, plain: Records, sample: Sample, num_layers: int) -> Measured:
    """Summarise the rounds of a rival and compare them with those of the plain model at the same batch size."""
    latencies = [record["latencies_seconds"] for record in records]
    p50, p90, p99 = (median([percentile(each, percent) for each in latencies]) for percent in (50, 90, 99))
    mean_exit = float(np.mean([record["texts"]["exit_stages"] for record in records]))
    answer_RN = sample.answers(records)
    each_round = [score(sample.metrics, sample.truth_N, answer_N) for answer_N in answer_RN]
    gain = speedup = (None, None, None)
    if rival.name != "plain":
        gain = paired_interval(sample.metrics, sample.truth_N, _distinct(answer_RN), _distinct(sample.answers(plain)))
        speedup = paired_ratio(_seconds(records, rival.batch), _seconds(plain, rival.batch))[:3]
    if len(records) == 1:
        gain = (gain[0], None, None)
    return Measured(
        rival.name,
        rival.exit,
        rival.batch,
        records[0]["batch"],
        p50,
        p90,
        p99,
        len(sample.texts) / median([record["texts"]["seconds"] for record in records]),
        max(record["peak_rss_bytes"] for record in records),
        median([record["bytes_read_per_input"] for record in records]),
        {name: float(np.mean([scores[name] for scores in each_round])) for name in each_round[0]},
        *gain,
        *speedup,
        PAIRED_OVER[rival.batch],
        mean_exit,
        num_layers / mean_exit,
    )


def _seconds(records: Records, batch: int | str) -> np.ndarray:
    """Return the seconds of each text, of each batch, or of all texts [R, U]."""
    if batch == "bulk":
        return np.array([[record["texts"]["seconds"]] for record in records])
    return np.array([record["latencies_seconds"] for record in records])


def _distinct(answer_RN: np.ndarray) -> np.ndarray:
    """Return one row where the answers of all rounds are equal, as they are without a deadline."""
    return answer_RN[:1] if (answer_RN == answer_RN[0]).all() else answer_RN


def _has_room(job: WorkerJob, log: Log) -> bool:
    """Return whether the budget holds the batch size of a `plan` job, which also raises all other errors."""
    try:
        run_worker(job)
    except BudgetError as error:
        if job.config.batch != LARGE_BATCH:
            raise
        log(f"batch {job.config.batch} is left out: {error}")
        return False
    return True


def write_inputs(sample: Sample, folder: Path) -> Path:
    """Write the inputs in a form that `offramp run` reads: lines of texts, a zip of images in order, or arrays."""
    texts: list[Any] = sample.texts
    if all(isinstance(text, Record) for text in texts):
        arrays: dict[str, Any] = stacked(texts)
        np.savez(folder / "inputs.npz", **arrays)
        return folder / "inputs.npz"
    if any(isinstance(text, Image) for text in texts):
        with ZipFile(folder / "inputs.zip", "w") as archive:
            for number, image in enumerate(texts):
                archive.writestr(f"{number:06d}{Path(image.member or image.path).suffix}", image.read())
        return folder / "inputs.zip"
    lines = [{"text": text} if isinstance(text, str) else {"text": text[0], "pair": text[1]} for text in texts]
    written = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "inputs.jsonl").write_bytes(written.encode("utf-8", "backslashreplace"))
    return folder / "inputs.jsonl"


def _common(sample: Sample, record: Mapping[str, Any], rounds: int, num_layers: int) -> dict[str, Any]:
    keys = ("model", "store_sha256", "dtype", "backend", "threads", "budget_bytes", "reads", "verify")
    data = {"task": sample.task, "split": sample.split, "metrics": list(sample.metrics)}
    data |= {name: getattr(sample, name) for name in ("training_rows", "includes_training_rows")}
    counts = {"num_texts": len(sample.texts), "num_layers": num_layers, "rounds": rounds}
    return {**data, "data_sha256": sample.data_sha256, **counts, **{key: record[key] for key in keys}}
