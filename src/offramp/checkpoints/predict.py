"""Logits of every exit for many rows, a window of rows at a time to bound memory. No gradients.

Shapes: N rows of a window, B of a batch, H hidden, C labels; K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from offramp.checkpoints.checkpoint import WithExits
from offramp.checkpoints.exits import ModelWithExits
from offramp.checkpoints.inputs import AnyRows
from offramp.checkpoints.points import ModuleWithExits
from offramp.checkpoints.stored import StoredWithExits
from offramp.errors import NonFiniteError

WINDOW_BATCHES = 64
"""Rows of this many batches are sorted by length, so that those of a batch are about equally long."""

Classifier = WithExits | StoredWithExits | PreTrainedModel
"""A classifier with exits or without."""


def predict(model: Classifier, rows: AnyRows, batch_size: int) -> np.ndarray:
    """Return the logits of each exit for all rows, float32 [K, N, C]; K is 1 for a model without exits."""
    windows = [logits_NKC for _, logits_NKC, _ in predict_windows(model, rows, batch_size)]
    return np.ascontiguousarray(np.concatenate(windows).swapaxes(0, 1))


def predict_windows(
    model: Classifier, rows: AnyRows, batch_size: int, *, with_features: bool = False
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Yield windows of rows: index of the first row, logits [N, K, C], and, if requested, features [N, K, H].

    A feature is the first token's hidden state where an exit stands. Raises NonFiniteError naming the exit.
    """

    def outputs(inputs: dict[str, Tensor]) -> list[list[Tensor]]:
        logits, hidden = _with_hidden(model, inputs)
        return [logits, [hidden_BSH[:, 0] for hidden_BSH in hidden]] if with_features else [logits]

    for start, logits_NKC, *features in run_windows(model, outputs, rows, batch_size):
        _require_finite(logits_NKC)
        yield start, logits_NKC, features[0] if with_features else None


def _with_hidden(model: Classifier, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
    if isinstance(model, (ModelWithExits, ModuleWithExits, StoredWithExits)):
        return model.with_hidden(**inputs)
    output = model(**inputs, output_hidden_states=True)
    return [output.logits], output.hidden_states[-1:]


def pooled_windows(model: WithExits, rows: AnyRows, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield windows of the pooled values that the heads read, [N, K - 1, H]."""
    return run_windows(model, lambda inputs: [model.pooled(**inputs)], rows, batch_size)


@torch.inference_mode()
def run_windows(
    model: Classifier, call: Callable[[dict[str, Tensor]], list[list[Tensor]]], rows: AnyRows, batch_size: int
) -> Iterator[Any]:
    """Yield windows in the order of the rows: index of the first row, and an array for each list of tensors that `call`
    returns for the inputs of a batch. Dropout is off.
    """
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for start in range(0, len(rows), WINDOW_BATCHES * batch_size):
        indices = np.arange(start, min(start + WINDOW_BATCHES * batch_size, len(rows)))
        order = indices[np.argsort(rows.lengths_N[indices], kind="stable")]
        parts = []
        for first in range(0, len(order), batch_size):
            inputs = to_tensors(rows.batch(order[first : first + batch_size]), device)
            del inputs["labels"]
            parts.append([torch.stack([t.float().cpu() for t in tensors], 1).numpy() for tensors in call(inputs)])
        back = np.argsort(order, kind="stable")
        yield start, *(np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True))


def to_tensors(batch: dict[str, np.ndarray], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return a batch of rows as tensors for a model."""
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


def _require_finite(logits_NKC: np.ndarray) -> None:
    bad_K = ~np.isfinite(logits_NKC).all(axis=(0, 2))
    if bad_K.any():
        what = f"output of exit {int(bad_K.argmax()) + 1} is not finite"
        raise NonFiniteError(what, "the trained model", "lower the learning rate")
