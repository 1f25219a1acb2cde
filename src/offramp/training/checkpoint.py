"""Model folders: the source of training, and the run folder that it writes.

A run folder is a transformers folder with the exits beside the model in `exits.safetensors` and `exits.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import AutoTokenizer, PreTrainedModel

from offramp.checkpoints.checkpoint import WithExits, auto_class, load_classifier
from offramp.checkpoints.exits import ModelWithExits, ModuleWithExits
from offramp.checkpoints.inputs import (
    AnyRows,
    Facts,
    facts_of,
    has_known_names,
    points_of_folder,
    rows_of,
    takes_images,
)
from offramp.checkpoints.source import open_source
from offramp.errors import SourceError, UsageError
from offramp.policies.evidence import REGRESSION, SINGLE_LABEL
from offramp.program.heads import DEFAULT_FORM
from offramp.store.exits import describe_exits
from offramp.store.files import write_atomic
from offramp.tasks import has_tokenizer
from offramp.tasks.examples import label_ids
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.processors import FILE_NAME as PROCESSOR

Log = Callable[[str], None]
"""Receives one line of progress."""


def require_trainable(folder: Path, max_length: int) -> tuple[Facts, str]:
    """Return the inputs and outputs of a model folder and its fingerprint; raise if it cannot be trained or divided.

    Nothing is loaded. Raises SourceError for the folder, UsageError if the model does not support `max_length` tokens.
    """
    with open_source(folder) as source:
        fingerprint = source.fingerprint()
    facts = facts_of(folder)
    if facts.texts is None:
        return facts, fingerprint
    if not has_tokenizer(folder):
        raise SourceError("no tokenizer", folder, "copy the tokenizer files there")
    if max_length > facts.max_length:
        what = f"max_length {max_length} exceeds the {facts.max_length} tokens that the model supports"
        raise UsageError(what, None, "use a smaller max_length")
    return facts, fingerprint


def with_exits(model: PreTrainedModel, source: Path, form: str) -> WithExits:
    """Return the model with a new head at each possible exit.

    Raises SourceError for a head form that it does not support.
    """
    if has_known_names(source):
        return ModelWithExits(model, form)
    if form != DEFAULT_FORM:
        raise unsupported_form(form, source)
    return ModuleWithExits(model, points_of_folder(model.eval(), source), of_texts=not takes_images(source))


def unsupported_form(form: str, where: object) -> SourceError:
    """Return the error for a head form that only text encoders of the BERT family support."""
    what = f"heads of the form {form!r} require a text encoder of the BERT family"
    return SourceError(what, where, f"use {DEFAULT_FORM}")


def label_order(labels: Sequence[str], own: Sequence[str], folder: Path, *, keeps_head: bool) -> list[int]:
    """Return the id of each label in the model, given the labels of the model folder.

    A classifier with the same set of labels keeps its own order, because its head was trained with it. Otherwise labels
    are numbered as given. Raises SourceError if the head is kept and its labels differ.

    Args:
        labels: labels of the data.
        own: labels of the model, possibly empty.
        folder: the model folder, for messages.
        keeps_head: whether the head of the model is kept as it is.
    """
    ids = label_ids(labels, own)
    if ids is None and keeps_head and own:
        what = f"the labels of the model are {', '.join(own)}, those of the data are {', '.join(labels)}"
        raise SourceError(what, folder, "train a model with --loss last first")
    return list(range(len(labels))) if ids is None else ids


def load_model(folder: Path, labels: Sequence[str]) -> tuple[PreTrainedModel, bool]:
    """Return the classifier of a folder in float32, and whether its head is new. Without labels it is a regression.

    A new head is initialised from the generator of torch if the folder has no head for this number of labels. Raises
    SourceError if any part of the encoder is missing.
    """
    names = list(labels) or ["score"]
    model, info = auto_class(folder).from_pretrained(
        folder,
        id2label=dict(enumerate(names)),
        label2id={label: index for index, label in enumerate(names)},
        problem_type=SINGLE_LABEL if labels else REGRESSION,
        dtype=torch.float32,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    initialised = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    base = model.base_model_prefix + "."
    missing = sorted(name for name in initialised if name.startswith(base) and not name.startswith(base + "pooler."))
    if missing:
        what = f"{len(missing)} tensors of the encoder are missing or mis-shaped, the first is {missing[0]!r}"
        raise SourceError(what, folder, "download the checkpoint again")
    return model, bool(initialised)


def save_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of a folder in the format of transformers; for an image model, its image processor."""
    if takes_images(source):
        tree = ImageEncoder.from_folder(source).to_json()
        write_atomic(folder / PROCESSOR, [json.dumps(tree, indent=1).encode() + b"\n"])
        return
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)


def save_model(model: WithExits, folder: Path, *, with_exits: bool = True) -> None:
    """Write config and weights in the format of transformers, and the exits beside them."""
    model.model.save_pretrained(folder)
    if with_exits:
        save_exits(model, folder)


def save_exits(model: WithExits, folder: Path, weights_sha256: str = "") -> None:
    """Write the exits beside the model. `weights_sha256` identifies the weights of a module without a model folder."""
    write_atomic(folder / "exits.safetensors", [save(model.exit_tensors(), {"format": "pt"})])
    points = model.points if isinstance(model, ModuleWithExits) else ()
    places = [(call.module, call.number, width) for call, width in points]
    description = describe_exits(model.form, len(model.heads) + 1, places, weights_sha256)
    write_atomic(folder / "exits.json", [description])


class FolderModel:
    """A model folder as the subject of training."""

    def __init__(self, folder: Path, max_length: int) -> None:
        """Raises the errors of `require_trainable`."""
        self._folder = folder
        self.facts, self.fingerprint = require_trainable(folder, max_length)

    def load(self, labels: Sequence[str]) -> tuple[PreTrainedModel, bool]:
        """Return the classifier and whether its head is new."""
        return load_model(self._folder, labels)

    def with_exits(self, model: PreTrainedModel, form: str) -> WithExits:
        """Return the classifier with a new head at each possible exit."""
        return with_exits(model, self._folder, form)

    def rows(self, examples: Sequence[Any], max_length: int, is_regression: bool, log: Log) -> AnyRows:
        """Return the examples as rows, one per example."""
        return rows_of(self._folder, self.facts, examples, max_length, is_regression, log)

    def save(self, model: WithExits, folder: Path, *, with_exits: bool) -> None:
        """Write a transformers folder with the exits beside the model."""
        save_tokenizer(self._folder, folder)
        save_model(model, folder, with_exits=with_exits)

    def saved(self, folder: Path) -> WithExits | PreTrainedModel:
        """Load the result of `save`."""
        return load_classifier(folder)

    def release(self) -> None:
        """Do nothing: the folder holds no resources."""
