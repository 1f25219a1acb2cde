"""Reading of `preprocessor_config.json`: the image processors of transformers that resize, crop and scale.

Each of them is expressed by the fields of `tasks.pixels.ImageEncoder`. Unknown processors and unknown keys raise an
error, because a key that is ignored silently would give wrong pixels.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, Tuple, Union

from offramp.errors import SourceError
from offramp.tasks.model_files import ModelFiles

FILE_NAME = "preprocessor_config.json"
BILINEAR, BICUBIC = 2, 3
"""Resampling filters, by Pillow's numbers."""
Size = Tuple[int, int]
"""Height and width in pixels."""

_WHOLE_EDGE = 384
"""Smallest edge length at which ConvNext resizes the whole image and does not crop."""
_REMEDY = f"describe what the model reads in {FILE_NAME} alone: offramp.tasks.pixels.ImageEncoder(...).to_json()"
_AGAIN = "save the image processor again"
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711),
}  # fmt: skip
_EDGE = {"default_to_square": False, "do_center_crop": True, "crop_size": 224}
_DEFAULTS: Dict[str, Any] = {
    "do_convert_rgb": False, "do_resize": True, "size": 224, "default_to_square": True, "resample": BICUBIC,
    "do_center_crop": False, "crop_size": None, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": 0.5, "image_std": 0.5, "do_pad": False,
}  # fmt: skip
_PROCESSORS: Dict[str, Dict[str, Any]] = {
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
"""Default values of each processor, where they differ from `_DEFAULTS`."""
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
"""Processor -> values of `model_type` that use it where the file names no processor."""
_WITHOUT_EFFECT = {
    "image_processor_type", "feature_extractor_type", "processor_class", "model_input_names", "use_fast", "pad_size",
    "do_reduce_labels", "reduce_labels", "image_seq_length", "data_format", "input_data_format", "device",
    "return_tensors", "disable_grouping", "_valid_processor_keys",
}  # fmt: skip
"""Keys that do not change pixels."""


def read_processor(files: ModelFiles) -> Tuple[Dict[str, Any], Path]:
    """Read the image processor of a model folder or a store. Returns its configuration, with a type, and its path.

    Raises SourceError if the folder has no image processor, or none is known for its model type.
    """
    name = "processor_config.json"
    tree = files.read_object(name, _AGAIN).get("image_processor")
    if not isinstance(tree, dict):
        name = FILE_NAME
        if not files.has(name):
            raise SourceError(f"no image processor (looked for {name})", files.folder, "copy the file there")
        tree = files.read_object(name, _AGAIN)
    if _type_of(tree):
        return tree, files.folder / name
    family = files.read_object("config.json", _AGAIN).get("model_type")  # the earliest published files name no type
    kind = next((kind for kind, families in _FAMILIES.items() if family in families), None)
    if kind is None:
        raise SourceError(f"no image processor is named, and none is known of {family!r}", files.folder, _REMEDY)
    return {**tree, "image_processor_type": kind}, files.folder / name


def fields_of(tree: Mapping[str, Any], where: object) -> Dict[str, Any]:
    """Return the arguments of an `ImageEncoder`.

    Raises SourceError for an unknown processor or key, ValueError, TypeError or ArithmeticError for an invalid value.
    """
    name = _type_of(tree)
    if name not in _PROCESSORS:
        raise SourceError(f"unknown image processor {name!r}, known are {', '.join(_PROCESSORS)}", where, _REMEDY)
    defaults = {**_DEFAULTS, **_PROCESSORS[name]}
    unknown = sorted(set(tree) - set(defaults) - _WITHOUT_EFFECT)
    if unknown:
        what = f"the image processor has the key {unknown[0]!r}, which may change pixels"
        raise SourceError(what, where, _REMEDY)
    given = {key: tree.get(key, default) for key, default in defaults.items()}  # null does not stand for the default
    for key in (key for key in given if key.startswith("do_")):
        if given[key] not in (True, False, None):
            raise ValueError(f"{key} must be true or false, not {given[key]!r:.60}")
    if given["do_pad"]:
        raise ValueError("it pads images")
    size = _size(given["size"], given["default_to_square"]) if given["do_resize"] else None
    crop = _size(given["crop_size"], True) if given["do_center_crop"] else None
    if isinstance(crop, int):
        raise ValueError(f"crop_size is {crop}, known are a number, and height and width")
    if "crop_pct" in given and size is not None:  # ConvNext keeps this fraction of the image, but a large one whole
        if not isinstance(size, int) or crop is not None:
            raise ValueError(f"size is {size} and crop_size {crop}, ConvNext has a shortest edge alone")
        is_whole, square = size >= _WHOLE_EDGE, (size, size)
        size, crop = (square, None) if is_whole else (int(size / given["crop_pct"]), square)
    fields: Dict[str, Any] = {"size": size, "crop": crop, "transparent_is_white": bool(given["do_convert_rgb"])}
    if size is not None or given["resample"] is not None:
        fields["resample"] = given["resample"]
    if given["do_normalize"]:
        fields.update(mean=_three(given["image_mean"]), std=_three(given["image_std"]))
    return {**fields, "scale": given["rescale_factor"] if given["do_rescale"] else 1.0}


@contextmanager
def processor_errors(where: object) -> Iterator[None]:
    """Convert errors about invalid values to SourceError. `where` names the file of the processor."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError) as error:
        raise SourceError(f"image processor cannot be read ({error})", where, _REMEDY) from None


def _type_of(tree: Mapping[str, Any]) -> str:
    """Return the family of a processor, or "" if none is named.

    `ViTImageProcessorFast`, `ViTImageProcessorPil` and `ViTFeatureExtractor` are of family `ViT`.
    """
    found = str(tree.get("image_processor_type") or tree.get("feature_extractor_type") or "")
    for suffix in ("Fast", "Pil", "ImageProcessor", "FeatureExtractor"):
        if found.endswith(suffix):
            found = found[: -len(suffix)]
    return found


def _size(value: Any, square: bool) -> Union[Size, int]:
    """Return a size that is written as a number, a pair or an object, by the rules of transformers."""
    if isinstance(value, int):
        return (value, value) if square else value
    if isinstance(value, list) and len(value) == 2:
        return value[0], value[1]
    if isinstance(value, dict) and set(value) == {"height", "width"}:
        return value["height"], value["width"]
    if isinstance(value, dict) and set(value) == {"shortest_edge"}:
        return value["shortest_edge"]
    raise ValueError(f"size is {value}, known are a number, height and width, and shortest_edge")


def _three(values: Any) -> Tuple[float, ...]:
    """Return one value for each channel."""
    return tuple(values) if isinstance(values, (list, tuple)) else (values,) * 3


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite int or float. A bool is not a number."""
    return type(value) in (int, float) and math.isfinite(value)
