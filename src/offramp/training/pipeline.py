"""Training of exits, from a checkpoint and labelled examples to a run folder.

`train_exits` imports torch when it is called.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import MissingExtraError, SourceError, UsageError
from offramp.tasks.arrays import Record
from offramp.tasks.examples import digest, spread
from offramp.tasks.metrics import default_metrics
from offramp.training.settings import ExitMetrics, TrainSettings

if TYPE_CHECKING:
    from torch import nn

    from offramp.checkpoints.checkpoint import WithExits
    from offramp.checkpoints.inputs import AnyRows
    from offramp.training.checkpoint import FolderModel
    from offramp.training.own import OwnModule

Examples = Sequence[tuple[Any, int | float]]
"""Texts, pairs of texts, images or records of arrays, each with its label."""
MAX_HEADS_ROWS = 50_000
"""Maximum number of rows for training heads on a frozen model. Linear heads need no more; the cache is kilobytes per
row."""


def _silent(line: str) -> None:
    """Discard a line of progress."""


def train_exits(
    model: str | Path | nn.Module,
    train: Examples,
    tune: Examples,
    out: str | Path,
    *,
    labels: Sequence[str],
    metrics: Sequence[str] = (),
    settings: TrainSettings | None = None,
    data: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = _silent,
) -> ExitMetrics:
    """Fine-tune a classifier together with its exits and save both in a run folder.

    Args:
        model: a folder with a classifier, or with an encoder that gets a new head; exits in the folder are ignored. Or
            any module that returns logits: it is trained in place, unless the loss is `heads-only`.
        train: texts, pairs of texts or images, with the id of their label (in a regression, their value). For a module,
            the inputs of one row: an array or a tensor, several as a tuple or a dict.
        tune: examples in the same format, not used for training.
        out: the run folder. transformers can load it; the exits lie beside the model. For a module it contains weights
            and exits, for `offramp.divide(module, ..., exits=out)`. An interrupted training is resumed; a module must
            then have the weights that the first attempt started from. A complete run of the same configuration is only
            measured.
        labels: the name of each label id; empty for a regression. A classifier with the same labels keeps its order.
        metrics: keys of `tasks.metrics.METRICS`. Default: accuracy, or Pearson and Spearman.
        settings: training settings; None for the defaults of `TrainSettings`.
        data: description of the examples in JSON, kept in `train.json` and part of the configuration.
        progress: called with about twenty lines of text.

    Returns:
        Scores and logits of each exit on `tune`. On the CPU, equal arguments and thread counts give equal files, with
        or without interruption. The generators of random, numpy and torch are seeded. Processes started by torchrun or
        accelerate train together; the first one writes.

    Raises:
        UsageError: no examples, or `out` exists and is not a run of this configuration.
        SourceError: the model cannot be trained.
        NonFiniteError: training diverged; the message names the exit.
        MissingExtraError: torch, transformers or accelerate is missing.
    """
    settings = settings or TrainSettings()
    train, tune = (_with_plain_labels(part, bool(labels)) for part in (train, tune))
    for name, examples in (("train", train), ("tune", tune)):
        _require_examples(name, examples, len(labels))
    _require_libraries()
    from offramp.checkpoints.checkpoint import quiet_libraries
    from offramp.training.checkpoint import FolderModel, label_order
    from offramp.training.folders import await_folder, await_run, is_finished, run_folder
    from offramp.training.own import OwnModule
    from offramp.training.trainer import require_possible

    require_possible(settings)
    out = Path(out)
    if isinstance(model, (str, os.PathLike)):
        subject, where = FolderModel(Path(model), settings.max_length), Path(model)
    else:  # digests and batches use arrays, whatever the type of the inputs
        train, tune = ([(Record.of(item), label) for item, label in part] for part in (train, tune))
        subject, where = OwnModule(model, train, labels), Path(type(model).__name__)
    ids = label_order(labels, subject.facts.labels, where, keeps_head=settings.loss == "heads-only")
    named = tuple(labels[ids.index(number)] for number in range(len(ids)))
    train, tune = ([(text, ids[int(label)] if ids else label) for text, label in part] for part in (train, tune))
    job = _Job(subject, where, train, tune, named, tuple(metrics) or default_metrics(labels), settings, progress)
    config = _config(job, data or {})
    try:
        with quiet_libraries():
            if is_finished(out, config):
                progress(f"already trained: {out}")
            elif is_first_process():
                with run_folder(out, config) as folder:
                    _train(job, folder)
            else:
                _train(job, await_folder(out))
                await_run(out, config)
            return _measure(job, out)
    finally:
        subject.release()


@dataclass(frozen=True)
class _Job:
    """Validated arguments of `train_exits`."""

    subject: FolderModel | OwnModule
    where: Path
    """The folder, or the class name of the module."""
    train: Examples
    tune: Examples
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    settings: TrainSettings
    progress: Callable[[str], None]


def _train(job: _Job, folder: Path) -> None:
    from transformers import set_seed

    set_seed(job.settings.seed)  # the heads are initialised next
    classifier, head_is_new = job.subject.load(job.labels)
    if job.settings.loss == "heads-only" and head_is_new:
        what = f"heads-only keeps the model as it is, but it has no head for {len(job.labels) or 1} outputs"
        raise SourceError(what, job.where, "train a model with --loss last first")
    model: WithExits = job.subject.with_exits(classifier, job.settings.heads)  # type: ignore[arg-type]
    if job.settings.loss != "heads-only":
        _fit_model(job, model, folder)
    if job.settings.loss != "last" and job.settings.heads_epochs and len(model.heads):
        _fit_heads(job, model, folder)
    if is_first_process():
        job.subject.save(model, folder, with_exits=job.settings.loss != "last")  # type: ignore[arg-type]


def _fit_model(job: _Job, model: WithExits, folder: Path) -> None:
    from offramp.training.folders import checkpoints, last_checkpoint
    from offramp.training.trainer import fit

    rows = _rows(job, job.train)
    place = checkpoints(folder, "model")
    done = last_checkpoint(place)
    job.progress(f"training {len(model.heads) + 1} exits on {len(rows)} rows{_from(done)}")
    fit(model, rows, job.settings, place, done, job.progress)


def _fit_heads(job: _Job, model: WithExits, folder: Path) -> None:
    from transformers import set_seed

    from offramp.checkpoints.checkpoint import device
    from offramp.training.folders import checkpoints, last_checkpoint
    from offramp.training.frozen import pool_rows
    from offramp.training.trainer import fit

    rows = _rows(job, spread(job.train, MAX_HEADS_ROWS))
    place = checkpoints(folder, "heads")
    done = last_checkpoint(place)
    job.progress(f"training {len(model.heads)} heads on a frozen model with {len(rows)} rows{_from(done)}")
    place.mkdir(parents=True, exist_ok=True)
    model.to(device())  # the Trainer would move only the heads
    pooled = pool_rows(model, rows, job.settings.batch_size, place / f"pooled-{_rank()}.npy")
    set_seed(job.settings.seed)  # the same state whether the file existed or not
    settings = replace(job.settings, loss="heads-only", epochs=job.settings.heads_epochs)
    fit(model, pooled, settings, place, done, job.progress)


def _from(checkpoint: Path | None) -> str:
    return f", resumed from {checkpoint.name}" if checkpoint else ""


def _measure(job: _Job, folder: Path) -> ExitMetrics:
    """Measure the saved model in float32; autocast would remain active in the model that was trained with it."""
    from offramp.checkpoints.checkpoint import predict
    from offramp.tasks.metrics import score_exits

    rows = _rows(job, job.tune)
    job.progress(f"measuring the exits on {len(rows)} rows")
    logits_KNC = predict(job.subject.saved(folder), rows, job.settings.batch_size)
    return ExitMetrics(tuple(score_exits(job.metrics, rows.labels_N, logits_KNC)), logits_KNC)


def _rows(job: _Job, examples: Examples) -> AnyRows:
    return job.subject.rows(examples, job.settings.max_length, not job.labels, job.progress)


def _config(job: _Job, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration that identifies a training, as JSON."""
    left_out = ("exit_weights", "report_to", "save_steps")
    return {
        "format": 1,
        "model_sha256": job.subject.fingerprint,
        "data": dict(data),
        "train_sha256": digest(job.train),
        "labels": list(job.labels),
        "exit_weights": job.settings.weights(job.subject.facts.num_exits),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **{key: value for key, value in asdict(job.settings).items() if key not in left_out},
    }


def _with_plain_labels(examples: Examples, are_ids: bool) -> Examples:
    """Return the examples with labels as Python numbers, because NumPy and torch scalars are not valid JSON."""

    def plain(label: Any) -> Any:
        if not are_ids:
            return float(label)
        return (
            operator.index(label) if hasattr(label, "__index__") else label
        )  # other types are refused by _require_examples

    return [(item, plain(label)) for item, label in examples]


def _require_examples(name: str, examples: Examples, num_labels: int) -> None:
    if not examples:
        raise UsageError(f"no examples to {name} on", None, "pass at least one")
    for _, label in examples:
        if num_labels and not (isinstance(label, int) and 0 <= label < num_labels):
            raise ValueError(f"label ids of {name} must be from 0 to {num_labels - 1}, got {label}")
        if not num_labels and not math.isfinite(label):
            raise ValueError(f"values of {name} must be finite, got {label}")


def is_first_process() -> bool:
    """Return whether this process writes and prints: the only one, or the first of those started by torchrun."""
    return _rank() == "0"


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _require_libraries() -> None:
    for library in ("torch", "transformers", "accelerate"):
        if find_spec(library) is None:
            raise MissingExtraError(library, "train")
