"""What `preprocessor_config.json` says of pixels: the image processors of transformers that resize, crop and scale.

All of them come down to the fields of `tasks.pixels.ImageEncoder`. Others are refused by name, and so is a key that is
not known: what is passed over in silence gives wrong pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offramp.errors import SourceError

FILE_NAME = "preprocessor_config.json"
BILINEAR, BICUBIC = 2, 3
"""Filters, by Pillow's numbers."""
Size = tuple[int, int]
"""Height and width."""

_WHOLE_EDGE = 384
"""From this size on, ConvNext resizes the whole image and cuts nothing away."""
_REMEDY = "describe what the model reads with ImageEncoder(...)"
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_EDGE = {"default_to_square": False, "do_center_crop": True, "crop_size": 224}
_DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": False,
    "do_resize": True,
    "size": 224,
    "default_to_square": True,
    "resample": BICUBIC,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": 0.5,
    "image_std": 0.5,
    "do_pad": False,
}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": {"resample": BILINEAR},
    "DeiT": {"size": 256, "do_center_crop": True, "crop_size": 224},
    "Beit": {"crop_size": 224},
    "Pvt": _IMAGENET,
    "Siglip": {"size": [224, 224], "default_to_square": False, "do_convert_rgb": True},
    "Bit": {**_EDGE, **_CLIP, "do_convert_rgb": True},
    "CLIP": {**_EDGE, **_CLIP, "do_convert_rgb": True},
    "MobileNetV1": {**_EDGE, "size": 256, "resample": BILINEAR},
    "MobileNetV2": {**_EDGE, "size": 256, "resample": BILINEAR},
    "ConvNext": {"size": 384, "default_to_square": False, "crop_pct": 224 / 256},
}
"""What differs from `_DEFAULTS` where a file does not say."""
_FAMILIES = {
    "ViT": ("vit", "vit_mae", "vit_msn", "ijepa", "swin", "swinv2", "swiftformer", "dinat"),
    "DeiT": ("deit",),
    "Beit": ("beit", "data2vec-vision"),
    "Pvt": ("pvt", "pvt_v2"),
    "Siglip": ("siglip",),
    "Bit": ("bit", "dinov2", "focalnet", "hiera"),
    "CLIP": ("clip",),
    "MobileNetV1": ("mobilenet_v1",),
    "MobileNetV2": ("mobilenet_v2",),
    "ConvNext": ("convnext", "convnextv2", "cvt", "regnet", "resnet"),
}
"""Which processor a model has whose file names none, by its `model_type`."""
_WITHOUT_EFFECT = {
    "image_processor_type", "feature_extractor_type", "processor_class", "model_input_names", "use_fast", "pad_size",
    "do_reduce_labels", "reduce_labels", "image_seq_length", "data_format", "input_data_format", "device",
    "return_tensors", "disable_grouping", "_valid_processor_keys",
}  # fmt: skip
"""Keys that change no pixel."""


def read_processor(folder: Path) -> tuple[dict[str, Any], Path]:
    """The image processor of a model folder, which names its type, and the file that it stands in.

    Raises SourceError if there is none, or none is known of the model.
    """
    path = folder / "processor_config.json"
    tree = _read_object(path).get("image_processor")
    if not isinstance(tree, dict):
        path = folder / FILE_NAME
        if not path.is_file():
            raise SourceError(f"no image processor (looked for {FILE_NAME})", folder, "copy the file there")
        tree = _read_object(path)
    return tree if _type_of(tree) else {**tree, "image_processor_type": _type_for(folder)}, path


def fields_of(tree: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The arguments of an `ImageEncoder`. Raises SourceError for a processor, a key or a value that is not known."""
    name = _type_of(tree)
    if name not in _PROCESSORS:
        raise SourceError(f"unknown image processor {name!r}, known are {', '.join(_PROCESSORS)}", where, _REMEDY)
    defaults = {**_DEFAULTS, **_PROCESSORS[name]}
    unknown = sorted(set(tree) - set(defaults) - _WITHOUT_EFFECT)
    if unknown:
        what = f"the image processor has the key {unknown[0]!r}, which may change pixels"
        raise SourceError(what, where, _REMEDY)
    given = {key: value for key, value in tree.items() if key in defaults}  # null is no default either
    try:
        return _fields({**defaults, **given})
    except (ValueError, TypeError, ArithmeticError) as error:
        raise bad_processor(error, where) from None


def bad_processor(error: Exception, where: object) -> SourceError:
    """What to raise for values that make no sense."""
    return SourceError(f"image processor cannot be read ({error})", where, _REMEDY)


def _type_of(tree: Mapping[str, Any]) -> str:
    """`ViT` of `ViTImageProcessorFast`, `ViTImageProcessorPil` and `ViTFeatureExtractor`; empty if none is named."""
    found = str(tree.get("image_processor_type") or tree.get("feature_extractor_type") or "")
    for suffix in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        found = found.removesuffix(suffix)
    return found


def _type_for(folder: Path) -> str:
    """Of a model whose file names none: the first ones that were published do not."""
    family = _read_object(folder / "config.json").get("model_type")
    for name, families in _FAMILIES.items():
        if family in families:
            return name
    raise SourceError(f"no image processor is named, and none is known of {family!r}", folder, _REMEDY)


def _fields(given: Mapping[str, Any]) -> dict[str, Any]:
    if given["do_pad"]:
        raise ValueError("it pads images")
    size = _size(given["size"], given["default_to_square"]) if given["do_resize"] else None
    crop = _crop(given["crop_size"]) if given["do_center_crop"] else None
    if "crop_pct" in given and size is not None:
        size, crop = _cut_away(size, given["crop_pct"], crop)
    fields: dict[str, Any] = {"size": size, "crop": crop, "transparent_is_white": bool(given["do_convert_rgb"])}
    if size is not None or given["resample"] is not None:
        fields["resample"] = given["resample"]
    if given["do_normalize"]:
        fields |= {"mean": _three(given["image_mean"]), "std": _three(given["image_std"])}
    return fields | {"scale": given["rescale_factor"] if given["do_rescale"] else 1.0}


def _cut_away(size: Size | int, share: float, crop: Size | None) -> tuple[Size | int, Size | None]:
    """What ConvNext resizes to and then crops, so that this share of an image is left."""
    if not isinstance(size, int) or crop is not None:
        raise ValueError(f"size is {size} and crop_size {crop}, ConvNext has a shortest edge alone")
    if size >= _WHOLE_EDGE:
        return (size, size), None
    return int(size / share), (size, size)


def _crop(value: Any) -> Size:
    found = _size(value, square=True)
    if isinstance(found, int):
        raise ValueError(f"crop_size is {value}, known are a number, and height and width")
    return found


def _size(value: Any, square: bool) -> Size | int:
    """A number, a pair or an object, as transformers reads them."""
    if isinstance(value, int):
        return (value, value) if square else value
    if isinstance(value, list) and len(value) == 2:
        return value[0], value[1]
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        return value["height"], value["width"]
    if isinstance(value, dict) and set(value) == {"shortest_edge"}:
        return value["shortest_edge"]
    raise ValueError(f"size is {value}, known are a number, height and width, and shortest_edge")


def _three(values: Any) -> tuple[float, ...]:
    """One value a channel."""
    if isinstance(values, list | tuple):
        return tuple(values)
    return (values,) * 3


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return type(value) in (int, float) and math.isfinite(value)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not JSON ({error})", path, "save the image processor again") from None
    if not isinstance(tree, dict):
        raise SourceError("not a JSON object", path, "save the image processor again")
    return tree
