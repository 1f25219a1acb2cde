import io
import json
import struct
import subprocess
import sys
import threading
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from offramp.errors import MissingExtraError, SourceError, UsageError
from offramp.tasks import pixels
from offramp.tasks.images import SUFFIXES, Image
from offramp.tasks.pixels import ImageEncoder, ImageInputs
from offramp.tasks.processors import FILE_NAME

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "vision"
"""Beside the checkout where it lies there."""
VIT = {"image_processor_type": "ViTImageProcessor"}
ENCODERS = [
    ImageEncoder(),
    ImageEncoder(32, (28, 30), 0, 1.0, (0.5, -1.0, 2.0), (0.5, 1, -2.0), True),
    ImageEncoder((30, 40)),
]


def png(height=4, width=6, colour=(255, 0, 51), suffix="png"):
    stream = io.BytesIO()
    Pillow.new("RGB", (width, height), colour).save(stream, Pillow.registered_extensions()[f".{suffix}"])
    return stream.getvalue()


def png_that_claims(height, width):
    """Nothing of this size is ever there."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write_config(folder, tree):
    (folder / FILE_NAME).write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("height_width", [(4, 6), (300, 200)])
def test_arrays_of_encoding_take_no_more_than_is_counted(encoder, height_width):
    """Of Pillow's memory nothing is traced: the images are counted by their sizes."""
    image, inputs = png(*height_width), ImageInputs(encoder, "pixels")
    inputs.encode([image])  # loads Pillow
    tracemalloc.start()
    try:
        pixels_B3HW = encoder.encode([image])
        taken = tracemalloc.get_traced_memory()[1] - pixels_B3HW.nbytes
    finally:
        tracemalloc.stop()
    small = 96 << 10  # a buffer of Pillow, tables, and what Python makes for a call
    assert taken <= inputs.encoding_bytes([image]) + small
    largest = max(height_width[0] * height_width[1], pixels_B3HW[0, 0].size)
    assert largest * 4 <= inputs.encoding_bytes([image]) - len(image) <= 20 * largest


def test_the_sample_has_the_decoders_of_frequent_formats():
    formats = [Pillow.open(io.BytesIO(image)).format for image in ImageInputs.sample]
    assert formats == ["PNG", "JPEG"]
    for encoder in ENCODERS:
        assert len(ImageInputs(encoder, "pixels").encode(list(ImageInputs.sample)).arrays["pixels"]) == 2


def test_bytes_are_scaled_and_shifted_channel_by_channel():
    encoder = ImageEncoder(mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 0.1))
    pixels_B3HW = encoder.encode([png(), png(colour=(0, 255, 0))])
    assert pixels_B3HW.shape == (2, 3, 4, 6)
    assert pixels_B3HW.dtype == np.float32
    np.testing.assert_allclose(pixels_B3HW[:, :, 0, 0], [[1, -0.5, 2], [-1, 1.5, 0]], atol=1e-6)
    assert np.ptp(pixels_B3HW, axis=(2, 3)).max() == 0


def test_zeros_are_put_around_what_is_smaller_than_the_crop():
    pixels_HW = ImageEncoder(crop=(7, 2)).encode([png(colour=(255, 255, 255))])[0, 0]
    assert pixels_HW.tolist() == [[0, 0]] * 2 + [[1, 1]] * 4 + [[0, 0]]


@pytest.mark.parametrize("suffix", [suffix[1:] for suffix in SUFFIXES])
def test_every_kind_of_image_that_is_found_is_decoded(suffix):
    pixels_B3HW = ImageEncoder().encode([png(colour=(90, 90, 90), suffix=suffix)])
    np.testing.assert_allclose(pixels_B3HW, np.full((1, 3, 4, 6), 90 / 255), atol=0.02)


def test_transparency_is_dropped_in_silence():
    palette = Pillow.linear_gradient("L").resize((6, 4)).convert("RGB").quantize(4)
    clear, opaque = io.BytesIO(), io.BytesIO()
    palette.save(clear, "PNG", transparency=bytes((9, 99, 200, 255)))
    palette.save(opaque, "PNG")
    pixels_B3HW = ImageEncoder(transparent_is_white=True).encode([clear.getvalue(), opaque.getvalue()])
    assert (pixels_B3HW[0] == pixels_B3HW[1]).all()
    assert np.ptp(pixels_B3HW[0]) > 0.5


def test_no_images_have_the_shape_of_one():
    assert ImageEncoder((5, 7)).encode([]).shape == (0, 3, 5, 7)
    assert ImageEncoder(32, (28, 30)).encode([]).shape == (0, 3, 28, 30)
    assert ImageEncoder(32).encode([]).shape == (0, 3, 0, 0)


@given(sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3))
def test_an_encoder_knows_its_shape(sizes):
    for encoder in ENCODERS:
        if encoder.shape or len(set(sizes)) == 1:
            found = encoder.encode([png(*size) for size in sizes]).shape
            assert found == (len(sizes), 3, *(encoder.shape or sizes[0]))


def test_files_and_members_of_zips_are_images(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("cat/a.png", png())
    images = [png(), Image(tmp_path / "a.png"), Image(tmp_path / "a.zip", "cat/a.png")]
    pixels_B3HW = ImageEncoder().encode(images)
    assert (pixels_B3HW == ImageEncoder().encode([png()] * 3)).all()


def test_several_threads_encode_the_same(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(64):
            archive.writestr(f"cat/{number}.png", png(colour=(number, 0, 0)))
    images = [Image(tmp_path / "a.zip", f"cat/{number}.png") for number in range(64)]
    found = []
    threads = [threading.Thread(target=lambda: found.append(ImageEncoder().encode(images))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for pixels_B3HW in found:
        np.testing.assert_allclose(pixels_B3HW[:, 0, 0, 0], np.arange(64) / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "none of JPEG"),
        (b"text", "none of JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of JPEG"),
        (png(200, 200, suffix="jpg")[:-99], "truncated"),
        (png()[:50], "image cannot be decoded"),
        (png_that_claims(0, 4), "image cannot be decoded"),
    ],
)
def test_what_cannot_be_decoded_is_named(tmp_path, data, reason):
    (tmp_path / "bad.png").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("cat/bad.png", data)
    for image, where in [
        (Image(tmp_path / "bad.png"), r".*/bad.png"),
        (Image(tmp_path / "bad.zip", "cat/bad.png"), r".*/bad.zip/cat/bad.png"),
        (data, "image 2"),
    ]:
        with pytest.raises(UsageError, match=rf"^image cannot be decoded \(.*\) - {where} - save it again") as caught:
            ImageEncoder().encode([png(), image])
        assert reason in str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("edge", [8193, 10_000, 20_000])
def test_absurdly_large_images_are_refused_before_they_are_decoded(edge):
    match = r"image has, or is resized to, more than 67108864 pixels - image 1 - make it smaller"
    with pytest.raises(UsageError, match=match):
        ImageEncoder((8, 8)).encode([png_that_claims(edge, edge)])


def test_a_warning_that_is_an_error_tells_the_same():
    with pytest.raises(UsageError, match="more than 67108864 pixels"):
        ImageEncoder((8, 8)).encode([png_that_claims(10_000, 10_000)])


def test_a_sliver_is_not_blown_up():
    with pytest.raises(UsageError, match="is resized to, more than 8388608 pixels"):
        ImageEncoder(224, (224, 224)).encode([png(1, 2000)])


def test_images_of_different_sizes_are_no_batch():
    match = r"comes out 5 x 6 \(height x width\), the first of its batch 4 x 6 - image 2 - resize"
    with pytest.raises(UsageError, match=match):
        ImageEncoder().encode([png(), png(5)])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_is_written_is_read(tmp_path, encoder):
    tree = json.loads(json.dumps(encoder.to_json()))
    assert ImageEncoder.from_json(tree) == encoder
    assert ImageEncoder.from_folder(write_config(tmp_path, tree)) == encoder


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 0},
        {"size": (3, -1)},
        {"size": (3,)},
        {"size": [3, 3]},
        {"size": 2.5},
        {"size": True},
        {"crop": 3},
        {"crop": (1 << 14, 1 << 13)},
        {"resample": 6},
        {"resample": None},
        {"scale": 0},
        {"scale": float("nan")},
        {"mean": (1.0, 2.0)},
        {"mean": (1.0, 2.0, "3")},
        {"std": (1.0, 0.0, 1.0)},
    ],
)
def test_an_encoder_checks_its_fields(fields):
    with pytest.raises(ValueError, match=rf"^{next(iter(fields))} must be "):
        ImageEncoder(**fields)


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        (
            {"image_processor_type": "EfficientNetImageProcessor"},
            "unknown image processor 'EfficientNet', known are ViT",
        ),
        ({"image_processor_type": "MobileViTImageProcessor"}, "unknown image processor 'MobileViT'"),
        ({**VIT, "do_flip_channel_order": True}, "has the key 'do_flip_channel_order', which may change pixels"),
        ({**VIT, "crop_pct": 0.9}, "has the key 'crop_pct', which may"),
        ({**VIT, "auto_map": {}}, "has the key 'auto_map', which may"),
        ({**VIT, "do_pad": True}, r"cannot be read \(it pads images\)"),
        ({**VIT, "size": {"longest_edge": 3}}, r"cannot be read \(size is \{'longest_edge': 3\}, known are a number"),
        ({**VIT, "size": {"shortest_edge": 3, "longest_edge": 4}}, r"cannot be read \(size is"),
        ({**VIT, "size": {"shortest_edge": "3"}}, r"cannot be read \(size must be positive whole numbers, not 3"),
        ({**VIT, "size": None}, r"cannot be read \(size is None"),
        ({**VIT, "size": [3, 4, 5]}, r"cannot be read \(size is \[3, 4, 5\]"),
        ({**VIT, "do_center_crop": True}, r"cannot be read \(size is None"),
        ({**VIT, "do_center_crop": True, "crop_size": {"shortest_edge": 3}}, r"cannot be read \(crop_size is"),
        ({**VIT, "resample": "bicubic"}, r"cannot be read \(resample must be"),
        ({**VIT, "resample": None}, r"cannot be read \(resample must be"),
        ({**VIT, "image_mean": [0.5]}, r"cannot be read \(mean must be"),
        ({**VIT, "image_std": None}, r"cannot be read \(std must be"),
        ({**VIT, "rescale_factor": "1/255"}, r"cannot be read \(scale must be"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 64, "crop_pct": 0}, "division by zero"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": 64, "crop_pct": None}, r"cannot be read \("),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": {"height": 3, "width": 3}},
            "ConvNext has a shortest edge alone",
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": 64, "do_center_crop": True, "crop_size": 32},
            "ConvNext has a shortest edge alone",
        ),
    ],
)
def test_processors_that_are_not_known_are_refused_by_name(tmp_path, tree, match):
    with pytest.raises(SourceError, match=rf"{match}.* - .*{FILE_NAME} - describe what the model reads"):
        ImageEncoder.from_folder(write_config(tmp_path, tree))


def test_folders_without_a_processor_are_refused(tmp_path):
    with pytest.raises(SourceError, match=rf"no image processor \(looked for {FILE_NAME}\) - .* - copy the file there"):
        ImageEncoder.from_folder(tmp_path)
    write_config(tmp_path, {"size": 3})
    with pytest.raises(SourceError, match="no image processor is named, and none is known of None - "):
        ImageEncoder.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SourceError, match="none is known of 'bert' - "):
        ImageEncoder.from_folder(tmp_path)
    for text, match in (("{", "not JSON"), ("[]", "not a JSON object")):
        (tmp_path / FILE_NAME).write_text(text)
        with pytest.raises(SourceError, match=rf"{match}.* - .*{FILE_NAME} - save the image processor again"):
            ImageEncoder.from_folder(tmp_path)


def test_images_are_encoded_as_the_input_of_a_model(tmp_path):
    (tmp_path / "a.png").write_bytes(png(40, 50))
    images = [png(), Image(tmp_path / "a.png")]
    inputs = ImageInputs(ImageEncoder((8, 9)), "pixels")
    batch = inputs.encode(images)
    assert (batch.num_rows, batch.length, batch.lengths_B.tolist()) == (2, 1, [1, 1])
    assert list(batch.arrays) == ["pixels"]
    np.testing.assert_array_equal(batch.arrays["pixels"], inputs.encoder.encode(images))
    assert inputs.encode(inputs.sample).arrays["pixels"].shape == (2, 3, 8, 9)
    assert list(inputs.lengths([b"nobody decodes this"] * 3)) == [1, 1, 1] and inputs.max_length == 1
    assert inputs.encoding_bytes(images) == inputs.encoder.decoding_bytes(images[1]) > 40 * 50 * 3
    assert inputs.encoding_bytes([]) == 0
    for ask in (inputs.encode, inputs.encoding_bytes):
        with pytest.raises(UsageError, match="takes images, not texts"):
            ask(["a text"])


def test_pillow_is_imported_when_an_image_is_decoded_and_named_if_missing(monkeypatch):
    code = "import offramp.tasks.pixels, sys; print({'PIL', 'transformers', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"Pillow is not installed - pip install 'offramp\[vision\]'"):
        ImageEncoder().encode([b""])


def test_pixels_that_a_model_does_not_take_are_refused_before_they_take_memory():
    """A processor may pad or enlarge a small image to any size."""
    png_bytes = png()
    for encoder in (ImageEncoder(crop=(2048, 1024)), ImageEncoder(1100), ImageEncoder((1024, 2048))):
        inputs = ImageInputs(encoder, "pixels", (16, 16))
        tracemalloc.start()
        with pytest.raises(UsageError, match="more than 1048576 pixels"):
            inputs.encode([png_bytes])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
    assert ImageInputs(ImageEncoder(crop=(30, 40)), "pixels", (16, 16)).encode([png_bytes]).num_rows == 1
    with pytest.raises(SourceError, match="size must be positive whole numbers"):
        ImageEncoder.from_json({**VIT, "size": 4096})


def test_the_limit_is_below_that_of_pillow():
    assert pixels.MAX_PIXELS < Pillow.MAX_IMAGE_PIXELS


@pytest.mark.skipif(not DATA.is_dir(), reason="the data set does not lie beside the checkout")
def test_cifar_beside_the_checkout_is_decoded():
    images = [Image(DATA / "cifar10_jpeg_test.zip", f"test/ship/{number:04d}.jpg") for number in range(100)]
    pixels_B3HW = ImageEncoder().encode(images)
    assert pixels_B3HW.shape == (100, 3, 32, 32)
    assert pixels_B3HW[:, 2].mean() > pixels_B3HW[:, 0].mean()  # the sea and the sky
