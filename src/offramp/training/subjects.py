"""Subjects of training: a model folder, or a user-defined module.

The run folder of a model folder is a transformers folder with the exits beside the model in `exits.safetensors` and
`exits.json`. That of a module has its weights in `model.safetensors`; the code of the module is not saved.

Shapes: B rows, C labels.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import torch as safetensors
from torch import nn
from transformers import PreTrainedModel

from offramp.checkpoints import inputs
from offramp.checkpoints.auto_tokenizer import save_tokenizer
from offramp.checkpoints.checkpoint import WithExits, auto_class, device, load_classifier, refusing, to_tensors
from offramp.checkpoints.downloads import DOWNLOADS, downloads_of, to_bytes
from offramp.checkpoints.exits import ModelWithExits, ModuleWithExits, Point, answer_of, points_of
from offramp.checkpoints.source import open_source
from offramp.errors import SourceError, UsageError
from offramp.policies.evidence import REGRESSION, SINGLE_LABEL
from offramp.program.heads import DEFAULT_FORM
from offramp.store.exits import describe_exits
from offramp.store.files import write_atomic
from offramp.store.trained_rows import read_trained_rows
from offramp.streaming.placeholders import content_sha256, weights_of
from offramp.tasks.arrays import Record, require_alike
from offramp.tasks.model_files import advice_of_stores, files_of
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.processors import FILE_NAME as PROCESSOR
from offramp.tasks.rows import ArrayRows
from offramp.tasks.tokenizer import has_vocabulary

WEIGHTS = "model.safetensors"
Log = Callable[[str], None]
"""Receives one line of progress."""


class FolderModel:
    """A model folder as the subject of training."""

    def __init__(self, folder: Path, max_length: int) -> None:
        """Read the config and the fingerprint of the folder, without its weights.

        Raises SourceError for a folder that cannot be trained or divided, UsageError if the model does not support
        `max_length` tokens.
        """
        self.name = folder
        with open_source(folder) as source:
            self.fingerprint = source.fingerprint()
        self.trained_rows, self.downloads = read_trained_rows(folder), downloads_of(folder)
        self.facts = inputs.facts_of(folder)
        if self.facts.texts is None:
            return
        if not has_vocabulary(folder):
            with advice_of_stores(files_of(folder)):
                raise SourceError("no tokenizer", folder, "copy the tokenizer's files to the model's folder")
        if self.facts.texts.pad_token is None:
            what = "texts of this model cannot be padded, so that they make no batch to train on"
            remedy = "if config.json names no pad_token_id, set it, to eos_token_id if its tokenizer has no other"
            raise SourceError(what, folder, remedy)
        if max_length > self.facts.max_length:
            what = f"max_length {max_length} exceeds the {self.facts.max_length} tokens that the model supports"
            raise UsageError(what, None, "use a smaller max_length")

    def load(self, labels: Sequence[str]) -> tuple[PreTrainedModel, bool]:
        """Return the classifier and whether its head is new."""
        return load_model(self.name, labels)

    def with_exits(self, model: Any, form: str) -> WithExits:
        """Return the classifier with a new head at each exit. Raises SourceError for an unsupported form."""
        if inputs.has_known_names(self.name):
            return ModelWithExits(model, form)
        _require_default(form, self.name)
        points = inputs.points_of_folder(model.eval(), self.name)
        return ModuleWithExits(model, points, of_texts=not inputs.takes_images(self.name))

    def rows(self, examples: Sequence[Any], max_length: int, is_regression: bool, log: Log) -> inputs.AnyRows:
        """Return the examples as rows, one per example."""
        return inputs.rows_of(self.name, self.facts, examples, max_length, is_regression, log)

    def save(self, model: Any, folder: Path, *, with_exits: bool) -> None:
        """Write a transformers folder with its tokenizer or image processor, and the exits beside the model."""
        save_model(model, folder, with_exits=with_exits)
        if inputs.takes_images(self.name):
            tree = ImageEncoder.from_folder(self.name).to_json()
            write_atomic(folder / PROCESSOR, [json.dumps(tree, indent=1).encode() + b"\n"])
        else:
            save_tokenizer(self.name, folder)  # it needs the config of the model
        if self.downloads:
            write_atomic(folder / DOWNLOADS, [to_bytes(self.downloads)])

    def saved(self, folder: Path) -> WithExits | PreTrainedModel:
        """Load the result of `save`."""
        return load_classifier(folder)


class OwnModule:
    """A module trained in place.

    Afterwards it is in evaluation mode, on the CPU, with the weights of the run folder.
    """

    def __init__(self, module: nn.Module, examples: Sequence[tuple[Any, int | float]], labels: Sequence[str]) -> None:
        """`examples`: inputs with their labels; `labels`: names of the label ids, empty for a regression.

        Raises SourceError if the output of the module is not logits [B, C].
        """
        self.module, self.name, self.trained_rows = module.cpu().eval(), type(module).__name__, None
        self._problem, self._num_labels = (SINGLE_LABEL, len(labels)) if labels else (REGRESSION, 1)
        few = examples[: inputs.BATCH]
        batch = to_tensors(self.rows(few, 1, not labels).batch(range(len(few))))
        del batch["labels"]
        self._points = self._points_of(batch)
        width = max((width for _, width in self._points), default=1)
        self.facts = inputs.Facts(self._problem, tuple(labels), len(self._points) + 1, width, 1)
        self.fingerprint = content_sha256(weights_of(module))

    def load(self, labels: Sequence[str]) -> tuple[nn.Module, bool]:
        """Return the module and False: its head is its own."""
        return self.module, False

    def with_exits(self, model: nn.Module, form: str) -> ModuleWithExits:
        """Return the module with a new head at each point. Raises SourceError for a form other than the default."""
        _require_default(form, self.name)
        return ModuleWithExits(model, self._points, self._num_labels, self._problem)

    def rows(self, examples: Sequence[Any], max_length: int, is_regression: bool, log: Log = print) -> ArrayRows:
        """Return the examples as rows, one per example; records have no length."""
        labels_N = np.array([label for _, label in examples], np.float32 if is_regression else np.int64)
        records = [Record.of(item) for item, _ in examples]
        require_alike(records)
        return ArrayRows(records, labels_N)

    def save(self, model: Any, folder: Path, *, with_exits: bool) -> None:
        """Write the weights, and the exits beside them."""
        safetensors.save_model(self.module.cpu().eval(), str(folder / WEIGHTS))
        if with_exits:
            save_exits(model, folder, content_sha256(weights_of(self.module)))

    def saved(self, folder: Path) -> ModuleWithExits:
        """Load the result of `save` into the module. Without saved exits the model has no heads."""
        safetensors.load_model(self.module.cpu().eval(), folder / WEIGHTS)
        exits = folder / "exits.safetensors"
        points = self._points if exits.is_file() else ()
        model = ModuleWithExits(self.module, points, self._num_labels, self._problem)
        if points:
            model.load_exits(safetensors.load_file(exits))
        return model.to(device())

    def _points_of(self, batch: dict[str, torch.Tensor]) -> list[Point]:
        expected = [len(next(iter(batch.values()))), self._num_labels]
        with torch.no_grad():
            shape = list(answer_of(self.module, batch).shape)
        if shape != expected:
            what = f"the output of the module has shape {shape}, expected logits {expected}"
            remedy = "pass one label per logit"
            if self._problem == REGRESSION:
                remedy = "return one value per row"
            raise SourceError(what, self.name, remedy)
        positional = sorted((name for name in batch if name.isdecimal()), key=int)
        return points_of(self.module, tuple(batch[name] for name in positional) if positional else batch)


def _require_default(form: str, where: object) -> None:
    """Raise SourceError for a head form that only text encoders of the BERT family support."""
    if form != DEFAULT_FORM:
        what = f"heads of the form {form!r} require a text encoder of the BERT family"
        raise SourceError(what, where, f"use {DEFAULT_FORM}")


def load_model(folder: Path, labels: Sequence[str]) -> tuple[PreTrainedModel, bool]:
    """Return the classifier of a folder in float32, and whether its head is new. Without labels it is a regression.

    A new head is initialised from the generator of torch if the folder has no head for this number of labels. Raises
    SourceError if any part of the encoder is missing.
    """
    names = dict(enumerate(labels or ["score"]))
    with refusing(folder):
        model, info = auto_class(folder).from_pretrained(
            folder,
            id2label=names,
            label2id={label: index for index, label in names.items()},
            problem_type=SINGLE_LABEL if labels else REGRESSION,
            dtype=torch.float32,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **inputs.PLAIN_OUTPUT,
        )
    initialised = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    base = model.base_model_prefix + "."
    missing = sorted(name for name in initialised if name.startswith(base) and not name.startswith(base + "pooler."))
    if missing:
        what = f"{len(missing)} tensors of the encoder are missing or mis-shaped, the first is {missing[0]!r}"
        raise SourceError(what, folder, "download the checkpoint again")
    return model, bool(initialised)


def save_model(model: WithExits, folder: Path, *, with_exits: bool = True) -> None:
    """Write config and weights in the format of transformers, and the exits beside them."""
    model.model.save_pretrained(folder)
    if with_exits:
        save_exits(model, folder)


def save_exits(model: WithExits, folder: Path, weights_sha256: str = "") -> None:
    """Write the exits beside the model. `weights_sha256` identifies the weights of a module without a model folder."""
    write_atomic(folder / "exits.safetensors", [safetensors.save(model.exit_tensors(), {"format": "pt"})])
    points = model.points if isinstance(model, ModuleWithExits) else ()
    places = [(call.module, call.number, width) for call, width in points]
    description = describe_exits(model.form, len(model.heads) + 1, places, weights_sha256)
    write_atomic(folder / "exits.json", [description])
