"""A user-defined module as the subject of training, the counterpart of `checkpoint` for model folders.

The run folder contains weights (`model.safetensors`), exits and the configuration; the code of the module is not saved.

Shapes: B rows, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, load_model
from safetensors.torch import save_model as save_weights
from torch import nn

from offramp.checkpoints.checkpoint import device, to_tensors
from offramp.checkpoints.exits import ModuleWithExits, Point, answer_of, points_of
from offramp.checkpoints.inputs import BATCH, AnyRows, Facts
from offramp.errors import SourceError
from offramp.policies.evidence import REGRESSION, SINGLE_LABEL
from offramp.program.heads import DEFAULT_FORM
from offramp.streaming.placeholders import content_sha256, weights_of
from offramp.tasks.arrays import Record, require_alike
from offramp.tasks.rows import ArrayRows
from offramp.training.checkpoint import Log, save_exits, unsupported_form

WEIGHTS = "model.safetensors"


class OwnModule:
    """A module trained in place.

    Afterwards it is in evaluation mode, on the CPU, with the weights of the run folder.
    """

    def __init__(self, module: nn.Module, examples: Sequence[tuple[Any, int | float]], labels: Sequence[str]) -> None:
        """`examples`: inputs with their labels; `labels`: names of the label ids, empty for a regression.

        Raises SourceError if the output of the module is not logits [B, C].
        """
        self.module, self._name = module.cpu().eval(), type(module).__name__
        self._problem, self._num_labels = (SINGLE_LABEL, len(labels)) if labels else (REGRESSION, 1)
        inputs = to_tensors(_rows(examples[:BATCH], not labels).batch(range(min(BATCH, len(examples)))))
        del inputs["labels"]
        self._points = self._points_of(inputs)
        width = max((width for _, width in self._points), default=1)
        self.facts = Facts(self._problem, tuple(labels), len(self._points) + 1, width, 1)
        self.fingerprint = content_sha256(weights_of(module))

    def load(self, labels: Sequence[str]) -> tuple[nn.Module, bool]:
        """Return the module and False: its head is its own."""
        return self.module, False

    def with_exits(self, model: nn.Module, form: str) -> ModuleWithExits:
        """Return the module with a new head at each point. Raises SourceError for a form other than the default."""
        if form != DEFAULT_FORM:
            raise unsupported_form(form, self._name)
        return ModuleWithExits(model, self._points, self._num_labels, self._problem)

    def rows(self, examples: Sequence[Any], max_length: int, is_regression: bool, log: Log) -> AnyRows:
        """Return the examples as rows, one per example; records have no length."""
        return _rows(examples, is_regression)

    def save(self, model: ModuleWithExits, folder: Path, *, with_exits: bool) -> None:
        """Write the weights, and the exits beside them."""
        save_weights(self.module.cpu().eval(), str(folder / WEIGHTS))
        if with_exits:
            save_exits(model, folder, content_sha256(weights_of(self.module)))

    def saved(self, folder: Path) -> ModuleWithExits:
        """Load the result of `save` into the module. Without saved exits the model has no heads."""
        load_model(self.module.cpu().eval(), folder / WEIGHTS)
        exits = folder / "exits.safetensors"
        points = self._points if exits.is_file() else ()
        model = ModuleWithExits(self.module, points, self._num_labels, self._problem)
        if points:
            model.load_exits(load_file(exits))
        return model.to(device())

    def release(self) -> None:
        """Move the module back to the CPU in evaluation mode."""
        self.module.cpu().eval()

    def _points_of(self, inputs: dict[str, torch.Tensor]) -> list[Point]:
        wanted = [len(next(iter(inputs.values()))), self._num_labels]
        with torch.no_grad():
            shape = list(answer_of(self.module, inputs).shape)
        if shape != wanted:
            raise SourceError(
                f"the output of the module has shape {shape}, expected logits {wanted}",
                self._name,
                "pass one label per logit",
            )
        positional = [inputs[name] for name in sorted(inputs, key=lambda name: (len(name), name)) if name.isdigit()]
        return points_of(self.module, tuple(positional) if positional else inputs)


def _rows(examples: Sequence[tuple[Any, int | float]], is_regression: bool) -> ArrayRows:
    labels_N = np.array([label for _, label in examples], np.float32 if is_regression else np.int64)
    records = [Record.of(item) for item, _ in examples]
    require_alike(records)
    return ArrayRows(records, labels_N)
