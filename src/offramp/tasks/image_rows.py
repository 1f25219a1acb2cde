"""Labelled images as rows of a batch: decoded when a batch wants them, so that no number of images is too large.

Shapes: N images, B of a batch, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from offramp.tasks.images import Image
from offramp.tasks.pixels import ImageEncoder


@dataclass(frozen=True, eq=False)
class ImageRows:
    """N images and their label ids."""

    images: Sequence[Image]
    labels_N: np.ndarray
    encoder: ImageEncoder

    def __len__(self) -> int:
        return len(self.images)

    @property
    def lengths_N(self) -> np.ndarray:
        """All alike."""
        return np.ones(len(self), np.int64)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """`pixel_values` [B, 3, H, W] and `labels` [B]. Raises UsageError for an image that cannot be decoded."""
        pixels_B3HW = self.encoder.encode([self.images[int(index)] for index in indices])
        return {"pixel_values": pixels_B3HW, "labels": self.labels_N[indices]}
