"""Pixels are those of transformers' image processors on Pillow, bit for bit, for images read from disk."""

import importlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from transformers import AutoImageProcessor

from offramp.tasks.pixels import ImageEncoder
from offramp.tasks.processors import _FAMILIES, _PROCESSORS, FILE_NAME
from tests.selection import examples

SIZES = [(1, 1), (31, 47), (224, 224), (97, 256), (300, 223), (513, 61)]
"""Height and width."""
MODULES = {"MobileNetV1": "mobilenet_v1", "MobileNetV2": "mobilenet_v2"}
CONFIGS = {
    "vit": {"image_processor_type": "ViTImageProcessor"},
    "vit of old": {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "do_resize": True, "resample": 3},
    "vit, fast": {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 30, "width": 44}, "resample": 1},
    "vit, pair": {"image_processor_type": "ViTImageProcessor", "size": [30, 44], "image_mean": 0.4, "image_std": 0.25},
    "deit, nulls": {
        "image_processor_type": "DeiTImageProcessor",
        **dict.fromkeys(("do_resize", "resample", "do_center_crop", "do_rescale", "do_normalize", "image_mean")),
    },
    "edge, null": {
        "image_processor_type": "DeiTImageProcessor",
        "size": 40,
        "default_to_square": None,
        "crop_size": 30,
    },
    "vit, edge": {
        "image_processor_type": "ViTImageProcessor",
        "size": 40,
        "default_to_square": False,
        "do_center_crop": True,
        "crop_size": {"height": 37, "width": 50},
    },
    "vit, bytes": {"image_processor_type": "ViTImageProcessor", "do_rescale": False, "do_normalize": False, "size": 9},
    "vit, plain": {"image_processor_type": "ViTImageProcessor", "do_normalize": False, "rescale_factor": 0.1},
    "vit, no scale": {"image_processor_type": "ViTImageProcessor", "do_rescale": False, "image_std": [3, 2, 0.7]},
    "crop alone": {
        "image_processor_type": "DeiTImageProcessor",
        "do_resize": False,
        "crop_size": 64,
    },
    "deit": {"image_processor_type": "DeiTImageProcessor"},
    "deit, odd": {"image_processor_type": "DeiTImageProcessor", "size": 33, "crop_size": 40, "resample": 2},
    "resnet-50": {
        "crop_pct": 0.875,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ConvNextFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": 224,
    },
    "convnext": {"image_processor_type": "ConvNextImageProcessor"},
    "convnext, edge": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 95},
        "crop_pct": 0.9,
        "resample": 5,
    },
    "convnext, wider": {"image_processor_type": "ConvNextImageProcessor", "size": 64, "crop_pct": 1.3, "resample": 4},
    "bit": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 28, "resample": 0},
    "clip": {"image_processor_type": "CLIPImageProcessor"},
    "beit": {"image_processor_type": "BeitImageProcessor", "do_center_crop": True, "do_reduce_labels": True},
}


def random_image(height, width, seed=0, channels=3):
    bytes_HWC = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Pillow.fromarray(bytes_HWC[:, :, 0] if channels == 1 else bytes_HWC)


def save(folder, image, name="image.png", **options):
    path = folder / name
    image.save(path, **options)
    return path


def write_config(folder, config):
    (folder / FILE_NAME).write_text(json.dumps(config))
    return folder


def theirs(folder, path):
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(str(path), return_tensors="np")["pixel_values"]


def require_equal(folder, path):
    encoder = ImageEncoder.from_folder(folder)
    ours_B3HW = encoder.encode([path.read_bytes()])
    theirs_B3HW = theirs(folder, path)
    assert ours_B3HW.dtype == np.float32
    np.testing.assert_array_equal(ours_B3HW, theirs_B3HW)
    return encoder


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_those_of_transformers(tmp_path, name, size):
    write_config(tmp_path, CONFIGS[name])
    encoder = require_equal(tmp_path, save(tmp_path, random_image(*size)))
    write_config(tmp_path, encoder.to_json())
    assert require_equal(tmp_path, tmp_path / "image.png") == encoder


@pytest.mark.parametrize("name", _PROCESSORS)
def test_defaults_are_those_of_transformers(tmp_path, name):
    write_config(tmp_path, {"image_processor_type": f"{name}ImageProcessor"})
    bare = require_equal(tmp_path, save(tmp_path, random_image(91, 350)))
    module = MODULES.get(name, name.lower())
    theirs = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    getattr(theirs, f"{name}ImageProcessorPil")().save_pretrained(tmp_path)
    assert ImageEncoder.from_folder(tmp_path) == bare


@pytest.mark.parametrize("family", [family for families in _FAMILIES.values() for family in families])
def test_a_model_whose_file_names_no_processor_has_that_of_its_family(tmp_path, family):
    write_config(tmp_path, {"do_normalize": True})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    require_equal(tmp_path, save(tmp_path, random_image(61, 50)))


def test_a_nested_processor_comes_first(tmp_path):
    nested = {"image_processor": {"image_processor_type": "CLIPImageProcessor"}, "processor_class": "CLIPProcessor"}
    write_config(tmp_path, CONFIGS["vit"])
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    require_equal(tmp_path, save(tmp_path, random_image(61, 50)))
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    require_equal(tmp_path, tmp_path / "image.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_images_are_turned_upright(tmp_path, orientation, suffix):
    write_config(tmp_path, {**CONFIGS["vit"], "do_resize": False})
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, random_image(20, 33), f"image.{suffix}", exif=exif)
    require_equal(tmp_path, path)
    assert ImageEncoder(None).encode([path.read_bytes()]).shape[2:] == ((20, 33) if orientation < 5 else (33, 20))


def grey_with_alpha():
    return random_image(20, 33, channels=2)


def palette(colours=256):
    return random_image(20, 33).quantize(colours)


MODES = {
    "grey.png": lambda: (random_image(20, 33, channels=1), {}),
    "grey.jpg": lambda: (random_image(20, 33, channels=1), {}),
    "grey.pgm": lambda: (random_image(20, 33, channels=1), {}),
    "grey and alpha.png": lambda: (grey_with_alpha(), {}),
    "alpha.png": lambda: (random_image(20, 33, channels=4), {}),
    "alpha.webp": lambda: (random_image(20, 33, channels=4), {}),
    "cmyk.jpg": lambda: (random_image(20, 33).convert("CMYK"), {}),
    "cmyk.tif": lambda: (random_image(20, 33).convert("CMYK"), {}),
    "ycbcr.tif": lambda: (random_image(20, 33).convert("YCbCr"), {}),
    "lab.tif": lambda: (Pillow.frombytes("LAB", (33, 20), random_image(20, 33).tobytes()), {}),
    "black and white.png": lambda: (random_image(20, 33).convert("1"), {}),
    "palette.png": lambda: (palette(), {}),
    "palette.gif": lambda: (palette(), {}),
    "palette.bmp": lambda: (palette(), {}),
    "clear palette.png": lambda: (palette(8), {"transparency": 3}),
    "clear palette.gif": lambda: (palette(8), {"transparency": 3}),
    "half clear palette.png": lambda: (palette(8), {"transparency": bytes(range(0, 256, 32))}),
    "clear colour.png": lambda: (random_image(20, 33).quantize(4).convert("RGB"), {"transparency": (1, 2, 3)}),
    "clear grey.png": lambda: (random_image(20, 33, channels=1), {"transparency": 7}),
    "deep grey.png": lambda: (Pillow.fromarray(np.arange(660, dtype=np.uint16).reshape(20, 33) * 90), {}),
    "deep grey.tif": lambda: (Pillow.fromarray(np.arange(660, dtype=np.int32).reshape(20, 33) - 99), {}),
    "real.tif": lambda: (Pillow.fromarray(np.linspace(-9, 300, 660, dtype=np.float32).reshape(20, 33)), {}),
    "moving.gif": lambda: (palette(), {"save_all": True, "append_images": [palette(4)]}),
    "moving.webp": lambda: (random_image(20, 33), {"save_all": True, "append_images": [random_image(20, 33, 1)]}),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("name", MODES)
def test_images_of_all_modes_become_rgb(tmp_path, name, white):
    write_config(tmp_path, {**CONFIGS["vit"], "do_resize": False, "do_convert_rgb": white})
    image, options = MODES[name]()
    require_equal(tmp_path, save(tmp_path, image, name, **options))


@settings(deadline=None, database=None, max_examples=examples(60))
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    size=st.none() | st.integers(1, 60) | st.tuples(st.integers(1, 60), st.integers(1, 60)),
    crop=st.none() | st.tuples(st.integers(1, 60), st.integers(1, 60)),
    resample=st.integers(0, 5),
    scale=st.floats(1e-4, 2),
    mean=st.floats(-3, 3),
    std=st.floats(0.01, 9),
)
def test_what_an_encoder_writes_transformers_reads(
    tmp_path_factory, height, width, size, crop, resample, scale, mean, std
):
    encoder = ImageEncoder(size, crop, resample, scale, (mean, 0.5, -mean), (std, 1.0, 0.3))
    folder = write_config(tmp_path_factory.mktemp("encoder"), encoder.to_json())
    assert require_equal(folder, save(folder, random_image(height, width), "image.bmp")) == encoder
