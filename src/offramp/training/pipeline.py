"""Training of exits, from a model and labelled examples to a run folder. Torch is imported when training begins."""

import math
import operator
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from offramp.errors import MissingExtraError, UsageError
from offramp.program.checks import require_known
from offramp.training.settings import Examples, ExitMetrics, TrainOptions


def train_exits(
    model: Any, train: Examples, tune: Examples, out: str | Path, *, labels: Sequence[str], **options: Any
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
        options: fields of `TrainOptions`: `settings`, `metrics`, `data`, `progress`.

    Returns:
        Scores and logits of each exit on `tune`. On the CPU, equal arguments and thread counts give equal files, with
        or without interruption. The generators of random, numpy and torch are seeded. Processes started by torchrun or
        accelerate train together; the first one writes.

    Raises:
        ValueError: an unknown option, and a label that is none of `labels`.
        UsageError: no examples, or `out` exists and is not a run of this configuration.
        SourceError: the model cannot be trained.
        NonFiniteError: training diverged; the message names the exit.
        MissingExtraError: torch, transformers or accelerate is missing.
    """
    require_known(TrainOptions, options, "option of train_exits")
    train, tune = _checked("train", train, len(labels)), _checked("tune", tune, len(labels))
    for library in ("torch", "transformers", "accelerate"):
        if find_spec(library) is None:
            raise MissingExtraError(library, "train")
    from offramp.training.job import Job

    return Job(model, train, tune, labels, TrainOptions(**options)).run(Path(out))


def _checked(name: str, examples: Examples, num_labels: int) -> Examples:
    """Return the examples with labels as Python numbers, because NumPy and torch scalars are not valid JSON."""
    checked: list[tuple[Any, int | float]] = []
    for item, given in examples:
        label: Any = given
        if not num_labels:
            label = float(label)
            if not math.isfinite(label):
                raise ValueError(f"values of {name} must be finite, got {label}")
        else:
            label = operator.index(label) if hasattr(label, "__index__") else label
            if not (isinstance(label, int) and 0 <= label < num_labels):
                raise ValueError(f"label ids of {name} must be from 0 to {num_labels - 1}, got {label}")
        checked.append((item, label))
    if not checked:
        raise UsageError(f"no examples to {name} on", None, "pass at least one")
    return checked
