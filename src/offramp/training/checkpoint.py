"""Model folders: where training starts, and the run folder that it leaves.

A run folder is a plain folder of transformers, with the exits beside the model in `exits.safetensors` and `exits.json`.
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
from offramp.checkpoints.exits import ModelWithExits
from offramp.checkpoints.inputs import (
    AnyRows,
    Facts,
    facts_of,
    has_known_names,
    points_of_folder,
    rows_of,
    takes_images,
)
from offramp.checkpoints.points import ModuleWithExits
from offramp.checkpoints.source import open_source
from offramp.errors import SourceError, UsageError
from offramp.policies.evidence import REGRESSION, SINGLE_LABEL
from offramp.store.exits import DEFAULT_FORM, describe_exits
from offramp.store.files import write_atomic
from offramp.tasks import has_tokenizer
from offramp.tasks.examples import label_ids
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.processors import FILE_NAME as PROCESSOR

Say = Callable[[str], None]


def require_trainable(folder: Path, max_length: int) -> tuple[Facts, str]:
    """Refuse, before anything is loaded, what could not be trained or divided afterwards.

    Returns what the model takes and gives, and the folder's fingerprint.

    Raises SourceError for the folder, UsageError for a `max_length` that the model cannot read.
    """
    with open_source(folder) as source:
        fingerprint = source.fingerprint()
    facts = facts_of(folder)
    if facts.texts is None:
        return facts, fingerprint
    if not has_tokenizer(folder):
        raise SourceError("no tokenizer", folder, "copy the tokenizer's files there")
    if max_length > facts.max_length:
        what = f"max_length {max_length} is more than the {facts.max_length} tokens that the model reads"
        raise UsageError(what, None, "take a smaller one")
    return facts, fingerprint


def with_exits(model: PreTrainedModel, source: Path, form: str) -> WithExits:
    """The model with a new head at each place for an exit. Raises SourceError for a form that it cannot have."""
    if has_known_names(source):
        return ModelWithExits(model, form)
    if form != DEFAULT_FORM:
        what = f"heads of the form {form!r} are for encoders of texts of the BERT family"
        raise SourceError(what, source, f"take {DEFAULT_FORM}")
    return ModuleWithExits(model, points_of_folder(model.eval(), source), of_texts=not takes_images(source))


def order_of(labels: Sequence[str], own: Sequence[str], folder: Path, *, keeps_head: bool) -> list[int]:
    """The id that each label gets in a model of a folder whose own labels these are.

    A classifier of the same labels keeps its order: its head knows them so. Any other takes them as they come; one
    whose head is not trained raises SourceError for labels that it does not know.
    """
    ids = label_ids(labels, own)
    if ids is None and keeps_head and own:
        what = f"the model's labels are {', '.join(own)}, those of the data {', '.join(labels)}"
        raise SourceError(what, folder, "train one with --loss last first")
    return list(range(len(labels))) if ids is None else ids


def load_model(folder: Path, labels: Sequence[str]) -> tuple[PreTrainedModel, bool]:
    """The classifier of a folder in float32, and whether its head is new: drawn from torch's generator, because the
    folder has none for that many labels. No labels: a regression.

    Raises SourceError if any part of the encoder is not in the folder.
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
    random = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    base = model.base_model_prefix + "."
    lost = sorted(name for name in random if name.startswith(base) and not name.startswith(base + "pooler."))
    if lost:
        what = f"{len(lost)} tensors of the encoder are missing or mis-shaped, the first is {lost[0]!r}"
        raise SourceError(what, folder, "get the checkpoint again")
    return model, bool(random)


def save_tokenizer(source: Path, folder: Path) -> None:
    """Write the tokenizer of a folder as transformers does; of a model of images its image processor."""
    if takes_images(source):
        tree = ImageEncoder.from_folder(source).to_json()
        write_atomic(folder / PROCESSOR, [json.dumps(tree, indent=1).encode() + b"\n"])
        return
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)


def save_model(model: WithExits, folder: Path, *, with_exits: bool = True) -> None:
    """Write config and weights as transformers does, and the exits beside them."""
    model.model.save_pretrained(folder)
    if with_exits:
        save_exits(model, folder)


def save_exits(model: WithExits, folder: Path, weights_sha256: str = "") -> None:
    """Write the exits beside the model. `weights_sha256`: of a module of one's own."""
    write_atomic(folder / "exits.safetensors", [save(model.exit_tensors(), {"format": "pt"})])
    points = model.points if isinstance(model, ModuleWithExits) else ()
    places = [(call.module, call.number, width) for call, width in points]
    description = describe_exits(model.form, len(model.heads) + 1, places, weights_sha256)
    write_atomic(folder / "exits.json", [description])


class FolderModel:
    """A model folder, as something that exits are trained on."""

    def __init__(self, folder: Path, max_length: int) -> None:
        """Raises as `require_trainable`."""
        self._folder = folder
        self.facts, self.fingerprint = require_trainable(folder, max_length)

    def load(self, labels: Sequence[str]) -> tuple[PreTrainedModel, bool]:
        """The classifier, and whether its head is new."""
        return load_model(self._folder, labels)

    def with_exits(self, model: PreTrainedModel, form: str) -> WithExits:
        """The classifier with a new head at each place for an exit."""
        return with_exits(model, self._folder, form)

    def rows(self, examples: Sequence[Any], max_length: int, is_regression: bool, say: Say) -> AnyRows:
        """One row an example."""
        return rows_of(self._folder, self.facts, examples, max_length, is_regression, say)

    def save(self, model: WithExits, folder: Path, *, with_exits: bool) -> None:
        """A folder of transformers, the exits beside the model."""
        save_tokenizer(self._folder, folder)
        save_model(model, folder, with_exits=with_exits)

    def saved(self, folder: Path) -> WithExits | PreTrainedModel:
        """What `save` wrote."""
        return load_classifier(folder)

    def leave(self) -> None:
        """Nothing is held."""
