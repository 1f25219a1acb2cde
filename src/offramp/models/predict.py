"""What every exit says of many rows, a window at a time, so that no number of rows is too large. No gradient.

Shapes: N rows of a window, B of a batch, H hidden, C labels; K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from offramp.errors import NonFiniteError
from offramp.models.exits import ModelWithExits
from offramp.tasks.rows import Rows

WINDOW_BATCHES = 64
"""Rows of this many batches are sorted by length, so that those of a batch are about equally long."""

Classifier = ModelWithExits | PreTrainedModel
"""With exits or without."""


def predict(model: Classifier, rows: Rows, batch_size: int) -> np.ndarray:
    """What each exit says of all rows: logits [K, N, C], float32; K is 1 for a model without exits."""
    windows = [logits_NKC for _, logits_NKC in predict_windows(model, rows, batch_size)]
    return np.ascontiguousarray(np.concatenate(windows).swapaxes(0, 1))


def predict_windows(model: Classifier, rows: Rows, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """The same as windows: index of the first row, and logits [N, K, C]. Raises NonFiniteError naming the exit."""

    def logits(inputs: dict[str, Tensor]) -> list[Tensor]:
        return model(**inputs) if isinstance(model, ModelWithExits) else [model(**inputs).logits]

    for start, logits_NKC in run_windows(model, logits, rows, batch_size):
        _require_finite(logits_NKC)
        yield start, logits_NKC


def feature_windows(model: Classifier, rows: Rows, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Windows of the first token's hidden state where each exit stands, [N, K, H]."""
    backbone = (model.model if isinstance(model, ModelWithExits) else model).base_model
    num_exits = len(model.heads) + 1 if isinstance(model, ModelWithExits) else 1

    def first_tokens(inputs: dict[str, Tensor]) -> list[Tensor]:
        hidden_states = backbone(**inputs, output_hidden_states=True).hidden_states
        return [hidden_BSH[:, 0] for hidden_BSH in hidden_states[-num_exits:]]

    return run_windows(model, first_tokens, rows, batch_size)


def pooled_windows(model: ModelWithExits, rows: Rows, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Windows of what the heads see, [N, K - 1, H]."""
    return run_windows(model, lambda inputs: model.pooled(**inputs), rows, batch_size)


@torch.inference_mode()
def run_windows(
    model: Classifier, call: Callable[[dict[str, Tensor]], list[Tensor]], rows: Rows, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Windows of what `call` gives for the inputs of a batch, stacked, in the order of the rows; dropout is off."""
    model.eval()
    device = next(model.parameters()).device
    for start in range(0, len(rows), WINDOW_BATCHES * batch_size):
        indices = np.arange(start, min(start + WINDOW_BATCHES * batch_size, len(rows)))
        order = indices[np.argsort(rows.lengths_N[indices], kind="stable")]
        parts = []
        for first in range(0, len(order), batch_size):
            inputs = to_tensors(rows.batch(order[first : first + batch_size]), device)
            del inputs["labels"]
            parts.append(torch.stack([tensor.float().cpu() for tensor in call(inputs)], 1).numpy())
        yield start, np.concatenate(parts)[np.argsort(order, kind="stable")]


def to_tensors(batch: dict[str, np.ndarray], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A batch of `Rows` for a model."""
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


def _require_finite(logits_NKC: np.ndarray) -> None:
    bad_K = ~np.isfinite(logits_NKC).all(axis=(0, 2))
    if bad_K.any():
        what = f"output of exit {int(bad_K.argmax()) + 1} is not finite"
        raise NonFiniteError(what, "the trained model", "lower the learning rate")
