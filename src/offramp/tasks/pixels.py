"""Encoding of images as pixel arrays, bit for bit equal to the image processors of transformers on Pillow.

An image is read as transformers reads a path: rotated by its EXIF orientation, then converted to RGB, which drops an
alpha channel. The configuration files of image processors are read by `tasks.processors`.

Shapes: B images, 3 channels (red, green, blue), H rows, W columns; V = 256 values of a byte.
"""

from __future__ import annotations

import io
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from offramp.errors import OfframpError, UsageError, import_error
from offramp.program.inputs import Batch
from offramp.tasks.images import Image
from offramp.tasks.model_files import AnyFolder, files_of
from offramp.tasks.processors import BICUBIC, Size, fields_of, is_number, processor_errors, read_processor

if TYPE_CHECKING:
    from PIL import Image as Pillow

MAX_PIXELS = 1 << 26
"""Largest number of pixels of one image: 192 MiB as RGB. Pillow warns above 89 million."""
MAX_ENCODED_PIXELS = 1 << 23
"""Largest number of pixels that an image processor may make of any image: 3840 x 2160, and room. A pixel takes up to 19
bytes meanwhile."""
_FEW_PIXELS = 1 << 20
"""Pixels that are encoded before they are compared with those of the model."""
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats of the suffixes in `images.SUFFIXES`. Pillow starts an external program for some of its other formats."""
_NUM_FILTERS = 6
_PILLOW_BYTES = 4
"""Memory of a pixel in Pillow."""
_ARRAY_BYTES = 3 + 8 + 4
"""Memory of a pixel while its values are looked up: its bytes, and of one channel the index and the value."""
_WHITE = (255, 255, 255, 255)
_ONE_PIXEL_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154"
    "78da636060600000000400012734270a0000000049454e44ae426082"
)
_ONE_PIXEL_JPEG = bytes.fromhex(
    f"ffd8ffdb004300{'ff' * 64}ffdb004301{'ff' * 64}ffc00011080001000103012200021101031101ffc40015000101"
    "00000000000000000000000000000003ffc40014100100000000000000000000000000000000ffc4001401010000000000000000"
    "0000000000000000ffc40014110100000000000000000000000000000000ffda000c03010002110311003f009800ffd9"
)


@dataclass(frozen=True)
class ImageEncoder:
    """Preprocessing of images for one model: resize, center crop, scale, normalize. Thread-safe."""

    size: Optional[Union[Size, int]] = None
    """Target height and width of resizing, or the target length of the shorter edge. None: no resizing."""
    crop: Optional[Size] = None
    """Height and width of the center crop after resizing. A smaller image is padded with zeros."""
    resample: int = BICUBIC
    """Resampling filter by Pillow's number: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming."""
    scale: float = 1 / 255
    """Factor that each byte is multiplied by."""
    mean: Tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Value of each channel that is subtracted after scaling."""
    std: Tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Value of each channel that the difference is divided by."""
    transparent_is_white: bool = False
    """True if a colour that the file marks as transparent becomes white: the effect of `do_convert_rgb`."""

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
    def from_folder(cls, folder: AnyFolder) -> ImageEncoder:
        """Read the image processor of a model folder or a store, by the rules of transformers.

        Raises SourceError for a folder without an image processor, and for an unknown processor or key.
        """
        return cls.from_json(*read_processor(files_of(folder)))

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], where: object = None) -> ImageEncoder:
        """Read the configuration of an image processor of transformers. `where` names its file in error messages.

        Raises SourceError for an unknown processor, for an unknown key that may change pixels, and for invalid values.
        """
        with processor_errors(where):
            return cls(**fields_of(tree, where))

    def to_json(self) -> Dict[str, Any]:
        """Return an equivalent image processor configuration, for a file named `processors.FILE_NAME`.

        Both `from_json` and transformers read it.
        """
        tree: Dict[str, Any] = {"image_processor_type": "ViTImageProcessor"}
        tree.update(do_resize=self.size is not None, do_center_crop=self.crop is not None)
        for name, size in (("size", self.size), ("crop_size", self.crop)):
            if size is not None:
                tree[name] = {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]}
        tree.update(resample=self.resample, do_rescale=True, rescale_factor=self.scale)
        tree.update(do_normalize=True, image_mean=list(self.mean), image_std=list(self.std))
        return {**tree, "do_convert_rgb": self.transparent_is_white}

    @property
    def shape(self) -> Optional[Size]:
        """Height and width of every encoded image; None if they depend on the image."""
        return self.crop or (self.size if isinstance(self.size, tuple) else None)

    def encode(self, images: Sequence[Union[Image, bytes]], largest: Optional[Size] = None) -> np.ndarray:
        """Return images, or the bytes of image files, as float32 [B, 3, H, W]; (0, 3, H, W) for no images.

        `largest`: largest height and width that the model takes, if they are known; much larger images are refused
        before they take memory.

        Raises UsageError for an image that cannot be read or decoded, that has more than `MAX_PIXELS`, or more than
        `MAX_ENCODED_PIXELS` after resizing, or whose encoded size differs from that of the first; MissingExtraError
        without Pillow.
        """
        values_3V = self._values()
        pixels_B3HW = np.empty((len(images), 3, *((None if images else self.shape) or (0, 0))), np.float32)
        for row, image in enumerate(images):
            data, where = (image, f"image {row + 1}") if isinstance(image, bytes) else (image.read(), image)
            bytes_HW3 = self._bytes(data, where, largest)
            if row == 0:
                pixels_B3HW = np.empty((len(images), 3, *bytes_HW3.shape[:2]), np.float32)
            if bytes_HW3.shape[:2] != pixels_B3HW.shape[2:]:
                sizes = "{} x {} (height x width), the first of its batch {} x {}"
                what = f"image comes out {sizes.format(*bytes_HW3.shape[:2], *pixels_B3HW.shape[2:])}"
                raise UsageError(what, where, "resize to height and width, or crop")
            for channel in range(3):
                pixels_B3HW[row, channel] = values_3V[channel][bytes_HW3[:, :, channel]]
        return pixels_B3HW

    def decoding_bytes(self, image: Union[Image, bytes]) -> int:
        """Return the temporary memory in bytes for encoding an image, without the result. Raises as `encode`."""
        data, where = (image, "image") if isinstance(image, bytes) else (image.read(), image)
        with _opened(data, where) as opened:
            height, width = opened.height, opened.width
        rows, columns = self._resized(height, width)
        num_encoded = math.prod(self.crop or (rows, columns))
        num_copied = height * width * (4 if self.transparent_is_white else 2)  # converting makes copies
        num_resized = 0 if self.size is None else height * width + height * columns + rows * columns
        return len(data) + max(_PILLOW_BYTES * max(num_copied, num_resized), _ARRAY_BYTES * num_encoded)

    def _resized(self, height: int, width: int) -> Size:
        """Return the height and width that an image of this height and width is resized to."""
        if self.size is None:
            return height, width
        return self.size if isinstance(self.size, tuple) else _scaled(height, width, self.size)

    def _values(self) -> np.ndarray:
        """Return the encoded value of each byte [3, V]. Scaling is in float64 and the rest in float32, as in
        transformers.
        """
        scaled_V = (np.arange(256, dtype=np.float64) * self.scale).astype(np.float32)
        mean_3, std_3 = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        return (scaled_V - mean_3[:, None]) / std_3[:, None]

    def _bytes(self, data: bytes, where: object, largest: Optional[Size]) -> np.ndarray:
        """Return an image [H, W, 3] after resizing and cropping, uint8."""
        image = _decoded(data, where, self.transparent_is_white)
        height, width = self._resized(image.height, image.width)
        if largest is not None:
            _require_moderate(*(self.crop or (height, width)), where, max(_FEW_PIXELS, math.prod(largest)))
        if self.size is not None:
            _require_moderate(height, width, where, MAX_ENCODED_PIXELS)
            image = image.resize((width, height), self.resample)
        if self.crop is not None:  # Pillow pads with zeros
            height, width = self.crop
            top, left = (image.height - height) // 2, (image.width - width) // 2
            image = image.crop((left, top, left + width, top + height))
        return np.asarray(image)


class ImageInputs:
    """Encoder of images for one model: an `InputEncoder` of `Image` objects and the bytes of image files."""

    max_length = 1
    sample: Tuple[bytes, ...] = (_ONE_PIXEL_PNG, _ONE_PIXEL_JPEG)
    """Images of the most frequent formats, so that their decoders are in memory when the process is measured."""

    def __init__(self, encoder: ImageEncoder, name: str, largest: Optional[Size] = None) -> None:
        """`name` is the input of the model that takes pixels; `largest`: see `ImageEncoder.encode`."""
        self.encoder, self.name, self._largest = encoder, name, largest

    def encode(self, inputs: Sequence[Union[Image, bytes]]) -> Batch:
        """Return one input of float32 [B, 3, H, W]. Raises UsageError for an input that is not a decodable image."""
        pixels_B3HW = self.encoder.encode([_require_image(image) for image in inputs], self._largest)
        return Batch({self.name: pixels_B3HW}, len(inputs), 1, np.ones(len(inputs), np.int64))

    def lengths(self, inputs: Iterable[Union[Image, bytes]]) -> Iterator[int]:
        """Yield 1 for each image, without decoding it."""
        return (1 for _ in inputs)

    def encoding_bytes(self, inputs: Iterable[Union[Image, bytes]]) -> int:
        """Return the most memory in bytes that decoding any one of the images takes. Raises as `encode`."""
        return max((self.encoder.decoding_bytes(_require_image(image)) for image in inputs), default=0)


def _require_image(image: object) -> Union[Image, bytes]:
    if not isinstance(image, (Image, bytes)):
        raise UsageError("the model takes images, not texts", None, "give --input a file, a folder or a zip of images")
    return image


def _decoded(data: bytes, where: object, transparent_is_white: bool) -> Pillow.Image:
    """Return an image as RGB, rotated by its EXIF orientation."""
    with _opened(data, where) as image:
        from PIL import Image as Pillow
        from PIL import ImageOps

        ImageOps.exif_transpose(image, in_place=True)
        if isinstance(image.info.get("transparency"), bytes):
            del image.info["transparency"]  # several colours are transparent: Pillow would drop this with a warning
        found = image.convert("RGB")
        if transparent_is_white and found.info.get("transparency") is not None:
            white = Pillow.new("RGBA", found.size, _WHITE)
            found = Pillow.alpha_composite(white, found.convert("RGBA")).convert("RGB")
        return found


@contextmanager
def _opened(data: bytes, where: object) -> Iterator[Pillow.Image]:
    """Open an image, reading its header only. Pillow's errors, here or in the `with` block, become UsageError."""
    try:
        from PIL import Image as Pillow
        from PIL import UnidentifiedImageError
    except ImportError as error:
        raise import_error(error, "Pillow", "vision") from None
    try:
        with Pillow.open(io.BytesIO(data), formats=_FORMATS) as image:
            _require_moderate(image.height, image.width, where)
            yield image
    except OfframpError:
        raise
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        raise _too_large(where) from None
    except Exception as error:  # Pillow's decoders raise many types
        reason = f"none of {', '.join(_FORMATS)}" if isinstance(error, UnidentifiedImageError) else error
        raise UsageError(f"image cannot be decoded ({reason})", where, "save it again, or leave it out") from None


def _require_moderate(height: int, width: int, where: object, most: Optional[int] = None) -> None:
    if height * width > (MAX_PIXELS if most is None else most):
        raise _too_large(where, most)


def _too_large(where: object, most: Optional[int] = None) -> UsageError:
    number = MAX_PIXELS if most is None else most
    return UsageError(f"image has, or is resized to, more than {number} pixels", where, "make it smaller")


def _scaled(height: int, width: int, edge: int) -> Size:
    """Return height and width scaled so that the shorter edge has length `edge`."""
    longer = int(edge * max(height, width) / min(height, width))
    return (longer, edge) if width <= height else (edge, longer)


def _is_size(size: Any, or_edge: bool) -> bool:
    """Return whether `size` is None, a valid height and width, or, if `or_edge`, a valid edge length."""
    if size is None:
        return True
    lengths = [size] if or_edge and type(size) is int else size if isinstance(size, tuple) and len(size) == 2 else [0]
    return all(type(length) is int and length > 0 for length in lengths) and math.prod(lengths) <= MAX_ENCODED_PIXELS
