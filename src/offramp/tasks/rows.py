"""Labelled texts as token ids, close together in memory: 400,000 sentence pairs take some 80 MB.

Shapes: N rows, T tokens of all of them, B rows of a batch, S tokens of its longest.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from offramp.program.program import Texts
from offramp.program.encoder import Encoder
from offramp.tasks.text import Text, TextEncoder


@dataclass(frozen=True, eq=False)
class Rows:
    """Token ids of N texts, and their labels: ids, or values of a regression."""

    ids_T: np.ndarray
    """int32"""
    types_T: np.ndarray | None
    """uint8; None where the model has one type or none."""
    starts: np.ndarray
    """[N + 1], where each row begins."""
    labels_N: np.ndarray
    """int64, or float32 for values."""
    pad_token: int

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each row."""
        return np.diff(self.starts)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """`input_ids`, `attention_mask` and perhaps `token_type_ids` [B, S], padded on the right; `labels` [B]."""
        lengths_B = self.starts[1:][indices] - self.starts[:-1][indices]
        keep_BS = np.arange(lengths_B.max())[None, :] < lengths_B[:, None]
        parts = [slice(self.starts[index], self.starts[index + 1]) for index in indices]
        found = {
            "input_ids": _padded(self.ids_T, parts, keep_BS, self.pad_token),
            "attention_mask": keep_BS.astype(np.int64),
            "labels": self.labels_N[indices],
        }
        if self.types_T is not None:
            found["token_type_ids"] = _padded(self.types_T, parts, keep_BS, 0)
        return found


def encode_rows(
    examples: Iterable[tuple[Text, int | float]],
    text_encoder: TextEncoder,
    encoder: Encoder | Texts,
    *,
    is_regression: bool,
) -> Rows:
    """One row an example, in order; `text_encoder` cuts what is too long."""
    ids, types, starts, labels = array("i"), array("B"), array("q", [0]), []
    for text, label in examples:
        batch = text_encoder.encode([text])
        ids.extend(batch.ids_BS[0].tolist())
        if encoder.num_token_types > 1:
            types.extend(batch.types_BS[0].tolist())
        starts.append(len(ids))
        labels.append(label)
    return Rows(
        np.frombuffer(ids, np.intc) if ids else np.empty(0, np.intc),
        np.frombuffer(types, np.uint8) if types else None,
        np.frombuffer(starts, np.int64),
        np.array(labels, np.float32 if is_regression else np.int64),
        encoder.pad_token,
    )


def _padded(flat_T: np.ndarray, parts: Sequence[slice], keep_BS: np.ndarray, filler: int) -> np.ndarray:
    padded_BS = np.full(keep_BS.shape, filler, np.int64)
    padded_BS[keep_BS] = np.concatenate([flat_T[part] for part in parts])
    return padded_BS
