"""From a checkpoint folder and labelled texts to a run folder. Torch is imported when `train_exits` is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from offramp.errors import MissingExtraError, UsageError
from offramp.tasks.text import Text
from offramp.training.settings import ExitMetrics, TrainSettings


def _silent(line: str) -> None:
    """Drop a line of progress."""


def train_exits(
    model_folder: str | Path,
    train: Sequence[tuple[Text, int]],
    tune: Sequence[tuple[Text, int]],
    out: str | Path,
    *,
    labels: Sequence[str],
    settings: TrainSettings | None = None,
    progress: Callable[[str], None] = _silent,
) -> ExitMetrics:
    """Fine-tune a classifier together with an exit after each layer, and save both in a new run folder.

    Args:
        model_folder: a classifier, or a bare encoder that gets a new head, of a family that offramp divides.
        train: texts, or pairs of texts, with the id of their label.
        tune: the same, never trained on.
        out: the run folder; must not exist. transformers loads it as it is; the exits lie beside the model.
        labels: the name of each label id.
        settings: the defaults of `TrainSettings` if None.
        progress: is called with some twenty lines of text.

    Returns what each exit says of `tune`, and how often it is right. Equal arguments give equal files on the CPU with
    equally many threads; the generators of random, numpy and torch are seeded on the way. One process, one device.

    Raises UsageError for no examples or an `out` that exists, SourceError for the model, NonFiniteError naming the
    exit when training diverges, MissingExtraError without torch, transformers or accelerate.
    """
    settings = settings or TrainSettings()
    model_folder, out = Path(model_folder), Path(out)
    _require_examples("train", train, len(labels))
    _require_examples("tune", tune, len(labels))
    _require_libraries()
    from offramp.training.checkpoint import new_folder, require_trainable

    require_trainable(model_folder, settings.max_length)
    with new_folder(out) as folder, _quiet_libraries():
        return _train_into(folder, model_folder, train, tune, labels, settings, progress)


def _train_into(
    folder: Path,
    model_folder: Path,
    train: Sequence[tuple[Text, int]],
    tune: Sequence[tuple[Text, int]],
    labels: Sequence[str],
    settings: TrainSettings,
    progress: Callable[[str], None],
) -> ExitMetrics:
    from transformers import set_seed

    from offramp.models.exits import ModelWithExits
    from offramp.training.checkpoint import load_model, load_tokenizer, save_model
    from offramp.training.encoding import encode_examples, make_collator
    from offramp.training.trainer import fit, predict

    set_seed(settings.seed)  # the heads are drawn next
    model = ModelWithExits(load_model(model_folder, labels))
    tokenizer = load_tokenizer(model_folder)
    tokenizer.save_pretrained(folder)  # before its first use, which leaves max_length in it
    train_rows, tune_rows = (
        encode_examples(examples, tokenizer, model.model, settings.max_length) for examples in (train, tune)
    )
    collate = make_collator(tokenizer)
    progress(f"training {len(model.heads) + 1} exits on {len(train)} texts")
    fit(model, train_rows, collate, settings, folder, progress)
    save_model(model, folder)
    progress(f"measuring the exits on {len(tune)} texts")
    logits_KNC = predict(model, tune_rows, collate, settings.batch_size).numpy()
    right_KN = logits_KNC.argmax(-1) == [label for _, label in tune]
    return ExitMetrics(tuple(right_KN.mean(axis=1).tolist()), logits_KNC)


def _require_examples(name: str, examples: Sequence[tuple[Text, int]], num_labels: int) -> None:
    if not examples:
        raise UsageError(f"no examples to {name} on", None, "give at least one")
    for _, label in examples:
        if not 0 <= label < num_labels:
            raise ValueError(f"label ids of {name} must be from 0 to {num_labels - 1}, not {label}")


def _require_libraries() -> None:
    for library in ("torch", "transformers", "accelerate"):
        if find_spec(library) is None:
            raise MissingExtraError(library, "train")


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep transformers from drawing bars, and from telling that a bare encoder gets a new head."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
