"""Images as the inputs of a module: what `TextEncoder` is for texts.

Shapes: B images, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from offramp.errors import UsageError
from offramp.tasks.images import Image
from offramp.tasks.pixels import ImageEncoder

_DOT = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154"
    "78da636060600000000400012734270a0000000049454e44ae426082"
)
"""A PNG of one pixel."""


class ImageInputs:
    """Encodes images for one model, whose argument `name` takes pixels."""

    max_length = 1
    """An image has no length."""
    sample = (_DOT,)
    """What a process encodes to come to its footprint."""

    def __init__(self, encoder: ImageEncoder, name: str) -> None:
        self.encoder, self.name = encoder, name

    @classmethod
    def from_folder(cls, folder: Path, name: str) -> ImageInputs:
        """Of a folder with an image processor. Raises SourceError."""
        return cls(ImageEncoder.from_folder(folder), name)

    def encode(self, images: Sequence[Image | bytes]) -> dict[str, np.ndarray]:
        """Argument -> float32 [B, 3, H, W]. Raises UsageError for what is no image, or cannot be decoded."""
        for image in images:
            _require_image(image)
        return {self.name: self.encoder.encode(images)}

    def encoding_bytes(self, images: Iterable[Image | bytes]) -> int:
        """The most that decoding any of these takes. Raises as `encode`."""
        return max((self._encoding_bytes(image) for image in images), default=0)

    def _encoding_bytes(self, image: Image | bytes) -> int:
        _require_image(image)
        return self.encoder.decoding_bytes(image)


def _require_image(image: object) -> None:
    if not isinstance(image, (Image, bytes)):
        raise UsageError("the model takes images, not texts", None, "give --input a file, a folder or a zip of images")
