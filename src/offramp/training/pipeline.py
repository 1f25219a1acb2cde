"""From a checkpoint folder and labelled texts to a run folder. Torch is imported when `train_exits` is called."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import MissingExtraError, SourceError, UsageError
from offramp.tasks.examples import digest
from offramp.tasks.text import Text
from offramp.training.settings import ExitMetrics, TrainSettings

if TYPE_CHECKING:
    from offramp.models.exits import ModelWithExits
    from offramp.tasks.rows import Rows

Examples = Sequence[tuple[Text, int | float]]


def _silent(line: str) -> None:
    """Drop a line of progress."""


def train_exits(
    model_folder: str | Path,
    train: Examples,
    tune: Examples,
    out: str | Path,
    *,
    labels: Sequence[str],
    metrics: Sequence[str] = (),
    settings: TrainSettings | None = None,
    progress: Callable[[str], None] = _silent,
) -> ExitMetrics:
    """Fine-tune a classifier together with an exit after each layer, and save both in a run folder.

    Args:
        model_folder: a classifier, or a bare encoder that gets a new head, of a family that offramp divides. Exits that
            lie there are not taken over.
        train: texts, or pairs of texts, with the id of their label; with their value in a regression.
        tune: the same, never trained on.
        out: the run folder. transformers loads it as it is; the exits lie beside the model. An interrupted training is
            gone on with; a run of the same configuration that is whole is measured again, and nothing else.
        labels: the name of each label id; none: a regression.
        metrics: keys of `tasks.metrics.METRICS`; accuracy, or Pearson and Spearman, if none.
        settings: the defaults of `TrainSettings` if None.
        progress: is called with some twenty lines of text.

    Returns what each exit says of `tune`, and how good it is. Equal arguments give equal files on the CPU with equally
    many threads, interrupted or not; the generators of random, numpy and torch are seeded on the way. Processes that
    torchrun or accelerate started train together; the first of them writes.

    Raises UsageError for no examples, and for an `out` that is something else or of another configuration; SourceError
    for the model; NonFiniteError naming the exit when training diverges; MissingExtraError without torch, transformers
    or accelerate.
    """
    settings = settings or TrainSettings()
    model_folder, out = Path(model_folder), Path(out)
    for name, examples in (("train", train), ("tune", tune)):
        _require_examples(name, examples, len(labels))
    metrics = tuple(metrics) or (("accuracy",) if labels else ("pearson", "spearman"))
    _require_libraries()
    from offramp.models.checkpoint import quiet_libraries
    from offramp.training.checkpoint import require_trainable
    from offramp.training.folders import is_finished, run_folder
    from offramp.training.trainer import require_possible

    require_possible(settings)
    num_exits, fingerprint = require_trainable(model_folder, settings.max_length)
    config = _config(num_exits, fingerprint, train, labels, settings)
    with quiet_libraries():
        if is_finished(out, config):
            progress(f"trained before: {out}")
            return _measure(out, tune, metrics, settings, progress)
        if not _is_first_process():
            return _train(
                out.with_name(out.name + ".partial"), model_folder, train, tune, labels, metrics, settings, progress
            )
        with run_folder(out, config) as folder:
            return _train(folder, model_folder, train, tune, labels, metrics, settings, progress)


def _train(
    folder: Path,
    model_folder: Path,
    train: Examples,
    tune: Examples,
    labels: Sequence[str],
    metrics: Sequence[str],
    settings: TrainSettings,
    progress: Callable[[str], None],
) -> ExitMetrics:
    from transformers import set_seed

    from offramp.models.exits import ModelWithExits
    from offramp.training.checkpoint import load_model, save_model, save_tokenizer
    from offramp.training.folders import checkpoints, last_checkpoint
    from offramp.training.frozen import pool_rows
    from offramp.training.trainer import fit

    set_seed(settings.seed)  # the heads are drawn next
    classifier, head_is_new = load_model(model_folder, labels)
    if settings.loss == "heads-only" and head_is_new:
        what = f"heads-only leaves the model as it is, and it has no head for {len(labels) or 1} outputs"
        raise SourceError(what, model_folder, "train one with --loss last first")
    model = ModelWithExits(classifier, settings.heads)
    rows = _rows(model, model_folder, train, settings, progress)
    done = last_checkpoint(folder)
    progress(f"training {len(model.heads) + 1} exits on {len(rows)} texts" + (f", from {done.name}" if done else ""))
    if settings.loss == "heads-only":
        place = checkpoints(folder)
        place.mkdir(exist_ok=True)
        pooled = pool_rows(model, rows, settings.batch_size, place / f"pooled-{os.environ.get('RANK', '0')}.npy")
        set_seed(settings.seed)  # as many numbers were drawn, whether the file was there or not
        fit(model, pooled, settings, place, done, progress)
    else:
        fit(model, rows, settings, checkpoints(folder), done, progress)
    if _is_first_process():
        save_tokenizer(model_folder, folder)
        save_model(model, folder, with_exits=settings.loss != "last")
    measured = model.model if settings.loss == "last" else model
    return _measured(measured, _rows(model, model_folder, tune, settings, progress), metrics, settings, progress)


def _measure(
    folder: Path, tune: Examples, metrics: Sequence[str], settings: TrainSettings, progress: Callable[[str], None]
) -> ExitMetrics:
    from offramp.models.checkpoint import load_classifier
    from offramp.models.exits import ModelWithExits

    model = load_classifier(folder)
    encoded_by = model if isinstance(model, ModelWithExits) else ModelWithExits(model)
    return _measured(model, _rows(encoded_by, folder, tune, settings, progress), metrics, settings, progress)


def _measured(
    model: Any, rows: Rows, metrics: Sequence[str], settings: TrainSettings, progress: Callable[[str], None]
) -> ExitMetrics:
    from offramp.models.predict import predict
    from offramp.tasks.metrics import score_exits

    progress(f"measuring the exits on {len(rows)} texts")
    logits_KNC = predict(model, rows, settings.batch_size)
    return ExitMetrics(tuple(score_exits(metrics, rows.labels_N, logits_KNC)), logits_KNC)


def _rows(
    model: ModelWithExits, folder: Path, examples: Examples, settings: TrainSettings, progress: Callable[[str], None]
) -> Rows:
    from offramp.policies.evidence import REGRESSION
    from offramp.tasks import TextEncoder
    from offramp.tasks.rows import encode_rows

    text_encoder = TextEncoder.from_folder(folder, model.encoder, settings.max_length, progress)
    return encode_rows(examples, text_encoder, model.encoder, is_regression=model.encoder.problem == REGRESSION)


def _config(
    num_exits: int, fingerprint: str, train: Examples, labels: Sequence[str], settings: TrainSettings
) -> dict[str, Any]:
    """What must be equal for a training to be the same: all of it is JSON."""
    given = {
        key: value for key, value in asdict(settings).items() if key not in ("exit_weights", "report_to", "save_steps")
    }
    return {
        "format": 1,
        "model_sha256": fingerprint,
        "train_sha256": digest(train),
        "labels": list(labels),
        "exit_weights": settings.weights(num_exits),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **given,
    }


def _require_examples(name: str, examples: Examples, num_labels: int) -> None:
    if not examples:
        raise UsageError(f"no examples to {name} on", None, "give at least one")
    for _, label in examples:
        if num_labels and not (isinstance(label, int) and 0 <= label < num_labels):
            raise ValueError(f"label ids of {name} must be from 0 to {num_labels - 1}, not {label}")
        if not num_labels and not math.isfinite(label):
            raise ValueError(f"values of {name} must be finite, not {label}")


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _require_libraries() -> None:
    for library in ("torch", "transformers", "accelerate"):
        if find_spec(library) is None:
            raise MissingExtraError(library, "train")
