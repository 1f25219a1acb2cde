"""Loads a classifier and its exits from a run folder, or from a store that transformers can load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from offramp.checkpoints.exits import ModelWithExits
from offramp.checkpoints.inputs import has_known_names, takes_images
from offramp.checkpoints.points import ModuleWithExits
from offramp.checkpoints.source import open_source
from offramp.errors import SourceError
from offramp.program.program import Call
from offramp.store.exits import parse_exits

WithExits = ModelWithExits | ModuleWithExits
"""A classifier of texts divided by tensor names, or any other."""


def auto_class(folder: Path) -> Any:
    """Return the auto class of transformers that loads the classifier of a folder."""
    return AutoModelForImageClassification if takes_images(folder) else AutoModelForSequenceClassification


def load_classifier(folder: Path) -> WithExits | PreTrainedModel:
    """Return the classifier of a folder in float32, with its exits if it has any, on the GPU if there is one.

    Weights of the head that the folder lacks are initialised. Raises SourceError for exits that do not fit.
    """
    with open_source(folder) as source:
        exits = source.exits()
    with quiet_libraries():
        model = auto_class(folder).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    if exits is None:
        return model.to(device())
    tensors, file = exits
    description = parse_exits(file.read_bytes(), folder, SourceError)
    if not description.trained:
        raise SourceError("the exits were never trained", folder, "train them, or remove their two files")
    points = [(Call(module, number), width) for module, number, width in description.points]
    with_exits = (
        ModelWithExits(model, description.form.name)
        if has_known_names(folder)
        else ModuleWithExits(model, points, of_texts=not takes_images(folder))
    )
    try:
        with_exits.load_exits(load_file(tensors))
    except (ValueError, SafetensorError) as error:
        raise SourceError(f"exits cannot be read ({error})", tensors, "train the exits again") from None
    return with_exits.to(device())


def device() -> str:
    """Return the device that models run on: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars of transformers, and its warning that a bare encoder gets a new head."""
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
