"""Model folders: where training starts, and the run folder that it leaves.

A run folder is a plain folder of transformers, with the exits beside the model in `exits.safetensors` and `exits.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from offramp.division import family_of, open_source
from offramp.errors import SourceError, UsageError
from offramp.models.exits import FORM, ModelWithExits
from offramp.store.files import disk_full_is_ours, fsync_folder, write_atomic
from offramp.tasks import has_tokenizer


def require_trainable(folder: Path, max_length: int) -> None:
    """Refuse, before anything is loaded, what could not be trained or divided afterwards.

    Raises SourceError for the folder, UsageError for a `max_length` that the model cannot read.
    """
    with open_source(folder) as source:
        encoder = family_of(source.config).encoder(source.config)
    if not has_tokenizer(folder):
        raise SourceError("no tokenizer", folder, "copy the tokenizer's files there")
    if max_length > encoder.max_length:
        what = f"max_length {max_length} is more than the {encoder.max_length} tokens that the model reads"
        raise UsageError(what, None, "take a smaller one")


def load_model(folder: Path, labels: Sequence[str]) -> PreTrainedModel:
    """The classifier of a folder in float32, with a new head where the folder has none for that many labels.

    A new head is drawn from torch's generator. Raises SourceError if any part of the encoder is not in the folder.
    """
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type="single_label_classification",
        dtype=torch.float32,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    random = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    base = model.base_model_prefix + "."
    lost = sorted(name for name in random if name.startswith(base) and not name.startswith(base + "pooler."))
    if lost:
        what = f"{len(lost)} tensors of the encoder are missing or mis-shaped, the first is {lost[0]!r}"
        raise SourceError(what, folder, "get the checkpoint again")
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def save_model(model: ModelWithExits, folder: Path) -> None:
    """Write config and weights as transformers does, and the exits beside them."""
    model.model.save_pretrained(folder)
    tensors = model.exit_tensors()
    description = {"form": FORM, "exits": list(range(1, len(model.heads) + 1)), "trained": True}
    write_atomic(folder / "exits.safetensors", [save(tensors, {"format": "pt"})])
    write_atomic(folder / "exits.json", [json.dumps(description).encode() + b"\n"])


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to build in: it becomes `out` when the block ends, and is removed when the block fails.

    Raises UsageError if either of the two exists, DiskFullError.
    """
    partial = out.with_name(out.name + ".partial")
    if os.path.lexists(out):
        raise UsageError("target exists", out, "choose another name, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        what = "another training writes here, or one was killed"
        raise UsageError(what, partial, "wait for it to end, or remove the folder") from None
    try:
        with disk_full_is_ours(out):
            yield partial
            _settle(partial)
            partial.rename(out)
            fsync_folder(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _settle(folder: Path) -> None:
    """Make files durable, and their modes what the umask says: safetensors lets nobody else read its files."""
    mode = (folder / "exits.json").stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)
