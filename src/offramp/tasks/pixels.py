"""Images to the pixels that one model reads, bit for bit as the image processors of transformers make them on Pillow.

An image is read as transformers reads a path: turned as its EXIF orientation says, then made RGB, for which an alpha
channel is dropped. How processors are written down is known to `tasks.processors`.

Shapes: B images, 3 channels (red, green, blue), H rows, W columns; V values of a byte.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.errors import MissingExtraError, OfframpError, UsageError
from offramp.tasks.images import Image
from offramp.tasks.processors import BICUBIC, Size, bad_processor, fields_of, is_number, read_processor

if TYPE_CHECKING:
    from PIL import Image as Pillow

MAX_PIXELS = 1 << 26
"""Of one image, as it lies there and as it is resized: 192 MiB of bytes. Pillow itself warns from 89 million on."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What `images.SUFFIXES` promise. Pillow knows others, and starts a program for some of them."""
_NUM_FILTERS = 6
_BYTES_A_PIXEL = 8
"""Pillow keeps four for each, and converting copies; twice that where transparent becomes white."""
_WHITE = (255, 255, 255, 255)


@dataclass(frozen=True)
class ImageEncoder:
    """How an image becomes the pixels that a model reads: resized, cut, scaled. Safe from several threads."""

    size: Size | int | None = None
    """What an image is resized to: height and width, or its shorter edge alone. None: it keeps its size."""
    crop: Size | None = None
    """Height and width of what is then cut out of its middle; zeros are put around a smaller image."""
    resample: int = BICUBIC
    """Filter to resize with, by Pillow's number: nearest, Lanczos, bilinear, bicubic, box, Hamming."""
    scale: float = 1 / 255
    """Factor of each byte."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Of each channel; subtracted from the scaled byte."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Of each channel; what remains is divided by it."""
    transparent_is_white: bool = False
    """Whether a colour that the file marks as transparent becomes white: what `do_convert_rgb` comes to."""

    def __post_init__(self) -> None:
        for name in ("size", "crop"):
            if not _is_size(getattr(self, name), or_edge=name == "size"):
                raise ValueError(f"{name} must be positive whole numbers, not {getattr(self, name)}")
        if type(self.resample) is not int or self.resample not in range(_NUM_FILTERS):
            raise ValueError(f"resample must be from 0 to {_NUM_FILTERS - 1}, not {self.resample}")
        for name, values in (("scale", (self.scale,) * 3), ("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(is_number(value) and (value or name == "mean") for value in values):
                raise ValueError(f"{name} must be finite, not 0, and one for each channel, not {values}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> ImageEncoder:
        """Read the image processor of a model folder, as transformers chooses and reads it.

        Raises SourceError for a folder without one, and for one that is not known or has keys which are not.
        """
        return cls.from_json(*read_processor(Path(folder)))

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], where: object = None) -> ImageEncoder:
        """Read the configuration of an image processor of transformers; `where` it comes from stands in errors.

        Raises SourceError for a processor that is not known, for a key that is not known and may change pixels, and
        for values that make no sense.
        """
        fields = fields_of(tree, where)
        try:
            return cls(**fields)
        except (ValueError, TypeError) as error:
            raise bad_processor(error, where) from None

    def to_json(self) -> dict[str, Any]:
        """The configuration of an image processor that makes the same, to be kept as `processors.FILE_NAME`.

        `from_json` reads it, and so does transformers.
        """
        tree: dict[str, Any] = {"image_processor_type": "ViTImageProcessor"}
        tree |= {"do_resize": self.size is not None, "do_center_crop": self.crop is not None}
        if self.size is not None:
            tree["size"] = {"shortest_edge": self.size} if isinstance(self.size, int) else _named(self.size)
        if self.crop is not None:
            tree["crop_size"] = _named(self.crop)
        tree |= {"resample": self.resample, "do_rescale": True, "rescale_factor": self.scale}
        tree |= {"do_normalize": True, "image_mean": list(self.mean), "image_std": list(self.std)}
        return tree | {"do_convert_rgb": self.transparent_is_white}

    @property
    def shape(self) -> Size | None:
        """Height and width of all that is encoded; None if they depend on the image."""
        return self.crop or (self.size if isinstance(self.size, tuple) else None)

    def encode(self, images: Sequence[Image | bytes]) -> np.ndarray:
        """Encode images, or the bytes of image files, in order, as float32 [B, 3, H, W]; none give (0, 3, H, W).

        Raises UsageError for an image that cannot be read or decoded, that has, or is resized to, more than
        `MAX_PIXELS`, or that comes out of another size than the first; MissingExtraError without Pillow.
        """
        values_3V = self._values()
        pixels_B3HW = np.empty((len(images), 3, *(self.shape or (0, 0))), np.float32)
        for row, image in enumerate(images):
            data, where = (image, f"image {row + 1}") if isinstance(image, bytes) else (image.read(), image)
            bytes_HW3 = self._bytes(data, where)
            if row == 0:
                pixels_B3HW = np.empty((len(images), 3, *bytes_HW3.shape[:2]), np.float32)
            _require_same(bytes_HW3.shape[:2], pixels_B3HW.shape[2:], where)
            for channel in range(3):
                pixels_B3HW[row, channel] = values_3V[channel][bytes_HW3[:, :, channel]]
        return pixels_B3HW

    def decoding_bytes(self, image: Image | bytes) -> int:
        """What it takes to encode this image, beside the pixels that come of it. Raises UsageError as `encode`."""
        data, where = (image, "image") if isinstance(image, bytes) else (image.read(), image)
        with _opened(data, where) as opened:
            num_pixels = opened.height * opened.width
        return len(data) + num_pixels * _BYTES_A_PIXEL * (2 if self.transparent_is_white else 1)

    def _values(self) -> np.ndarray:
        """What becomes of each byte: scaled in float64, the rest in float32."""
        scaled_V = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean_3, std_3 = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (scaled_V - mean_3[:, None]) / std_3[:, None]

    def _bytes(self, data: bytes, where: object) -> np.ndarray:
        """An image [H, W, 3] of its final size."""
        image = _decoded(data, where, self.transparent_is_white)
        if self.size is not None:
            height, width = self.size if isinstance(self.size, tuple) else _scaled(image.height, image.width, self.size)
            _require_moderate(height, width, where)
            image = image.resize((width, height), self.resample)
        bytes_HW3 = np.asarray(image)
        return bytes_HW3 if self.crop is None else _cropped(bytes_HW3, self.crop)


def _decoded(data: bytes, where: object, transparent_is_white: bool) -> Pillow.Image:
    """Upright, and RGB."""
    with _opened(data, where) as image:
        from PIL import Image as Pillow
        from PIL import ImageOps

        ImageOps.exif_transpose(image, in_place=True)
        if isinstance(image.info.get("transparency"), bytes):
            del image.info["transparency"]  # of many colours; Pillow would drop it with a warning
        found = image.convert("RGB")
        if transparent_is_white and found.info.get("transparency") is not None:
            white = Pillow.new("RGBA", found.size, _WHITE)
            found = Pillow.alpha_composite(white, found.convert("RGBA")).convert("RGB")
        return found


@contextmanager
def _opened(data: bytes, where: object) -> Iterator[Pillow.Image]:
    """An image of which the head is read; what Pillow raises, then or within, names where it comes from."""
    try:
        from PIL import Image as Pillow
        from PIL import UnidentifiedImageError
    except ImportError:
        raise MissingExtraError("Pillow", "vision") from None
    try:
        with Pillow.open(io.BytesIO(data), formats=_FORMATS) as image:
            _require_moderate(image.height, image.width, where)
            yield image
    except OfframpError:
        raise
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        raise _too_large(where) from None
    except Exception as error:  # Pillow raises nothing narrower
        reason = f"none of {', '.join(_FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise UsageError(f"image cannot be decoded ({reason})", where, "save it again, or leave it out") from None


def _require_moderate(height: int, width: int, where: object) -> None:
    if height * width > MAX_PIXELS:
        raise _too_large(where)


def _too_large(where: object) -> UsageError:
    return UsageError(f"image has, or is resized to, more than {MAX_PIXELS} pixels", where, "make it smaller")


def _require_same(found: Sequence[int], first: Sequence[int], where: object) -> None:
    if tuple(found) != tuple(first):
        what = "image comes out {} x {} (height x width), the first of its batch {} x {}".format(*found, *first)
        raise UsageError(what, where, "resize to height and width, or crop")


def _scaled(height: int, width: int, edge: int) -> Size:
    """With this shorter edge."""
    longer = int(edge * max(height, width) / min(height, width))
    return (longer, edge) if width <= height else (edge, longer)


def _cropped(bytes_HW3: np.ndarray, size: Size) -> np.ndarray:
    found_HW3 = np.zeros((*size, 3), np.uint8)
    (rows, to_rows), (columns, to_columns) = map(_middle, bytes_HW3.shape, size)
    found_HW3[to_rows, to_columns] = bytes_HW3[rows, columns]
    return found_HW3


def _middle(length: int, wanted: int) -> tuple[slice, slice]:
    """What is taken of the middle, and where it comes to lie."""
    start = (length - wanted) // 2
    if start >= 0:
        return slice(start, start + wanted), slice(0, wanted)
    return slice(0, length), slice(-start, -start + length)


def _is_size(size: Any, or_edge: bool) -> bool:
    """Whether it is a height and a width, a shorter edge if this will do, or None."""
    if size is None:
        return True
    lengths = [size] if or_edge and type(size) is int else size if isinstance(size, tuple) and len(size) == 2 else [0]
    return all(type(length) is int and length > 0 for length in lengths) and math.prod(lengths) <= MAX_PIXELS


def _named(size: Size) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}
