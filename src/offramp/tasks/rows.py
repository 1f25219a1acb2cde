"""Labelled examples as rows of a training or evaluation batch.

Texts are stored as token ids in flat arrays (400,000 sentence pairs take about 80 MB). Images are decoded when a batch
is made, so that their number is not limited by memory.

Shapes: N rows, T tokens of all rows, B rows of a batch, S tokens of its longest row, H x W pixels.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Iterable, Sequence, Union

import numpy as np

from offramp.program.program import TEXT_INPUTS, Texts
from offramp.tasks.arrays import Record, stacked
from offramp.tasks.images import Image
from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.text import Text, TextEncoder

Indices = Union[Sequence[int], np.ndarray]


class Labelled:
    """Common base of rows: their number, and their lengths where inputs have no length."""

    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def lengths_N(self) -> np.ndarray:
        """Length of each row: 1."""
        return np.ones(len(self), np.int64)


@dataclass(frozen=True, eq=False)
class Rows(Labelled):
    """Token ids of N texts, and their labels."""

    ids_T: np.ndarray
    """int32."""
    types_T: np.ndarray | None
    """Token types, uint8; None where the model has at most one type."""
    starts: np.ndarray
    """Index of the first token of each row, and T [N + 1]."""
    labels_N: np.ndarray
    """Label ids in int64, or values of a regression in float32."""
    pad_token: int

    @property
    def lengths_N(self) -> np.ndarray:
        """Number of tokens of each row."""
        return np.diff(self.starts)

    def batch(self, indices: Indices) -> dict[str, np.ndarray]:
        """Return the inputs [B, S] of these rows, padded on the right, and `labels` [B].

        The inputs are `input_ids`, `attention_mask` and, if the model has several token types, `token_type_ids`.
        """
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


@dataclass(frozen=True, eq=False)
class ImageRows(Labelled):
    """N images and their label ids."""

    images: Sequence[Image]
    labels_N: np.ndarray
    encoder: ImageEncoder

    def batch(self, indices: Indices) -> dict[str, np.ndarray]:
        """Return `pixel_values` [B, 3, H, W] and `labels` [B]. Raises UsageError for an undecodable image."""
        pixels_B3HW = self.encoder.encode([self.images[int(index)] for index in indices])
        return {"pixel_values": pixels_B3HW, "labels": self.labels_N[indices]}


@dataclass(frozen=True, eq=False)
class ArrayRows(Labelled):
    """N records of arrays and their labels."""

    records: Sequence[Record]
    labels_N: np.ndarray

    def batch(self, indices: Indices) -> dict[str, np.ndarray]:
        """Return each argument [B, ...], and `labels` [B]."""
        return {**stacked([self.records[int(index)] for index in indices]), "labels": self.labels_N[indices]}


def encode_rows(
    examples: Iterable[tuple[Text, int | float]], text_encoder: TextEncoder, spec: Texts, *, is_regression: bool
) -> Rows:
    """Encode labelled texts, in order. `text_encoder` truncates long texts."""
    ids, types, starts, labels = array("i"), array("B"), array("q", [0]), []
    for text, label in examples:
        arrays = text_encoder.encode([text]).arrays
        ids.extend(arrays[TEXT_INPUTS[0]][0].tolist())
        if spec.num_token_types > 1:
            types.extend(arrays[TEXT_INPUTS[2]][0].tolist())
        starts.append(len(ids))
        labels.append(label)
    return Rows(
        np.frombuffer(ids, np.intc) if ids else np.empty(0, np.intc),
        np.frombuffer(types, np.uint8) if types else None,
        np.frombuffer(starts, np.int64),
        np.array(labels, np.float32 if is_regression else np.int64),
        spec.pad_token or 0,
    )


def _padded(flat_T: np.ndarray, parts: Sequence[slice], keep_BS: np.ndarray, filler: int) -> np.ndarray:
    padded_BS = np.full(keep_BS.shape, filler, np.int64)
    padded_BS[keep_BS] = np.concatenate([flat_T[part] for part in parts])
    return padded_BS
