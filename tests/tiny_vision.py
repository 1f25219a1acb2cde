"""Tiny classifiers of images with their image processor, and images to train and to ask them on."""

import io
import json
import zipfile

import numpy as np
import torch
import transformers
from PIL import Image

from offramp.checkpoints.exits import ModuleWithExits, points_of
from offramp.program.heads import DEFAULT_FORM
from offramp.store.exits import describe_exits

SIDE = 16
"""Height and width of an image."""
NAMES = ("vit", "resnet")
LABELS = ("bird", "cat", "dog")
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


def config_of(name):
    """Of four blocks, so that there are places for three exits."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: id for id, label in enumerate(LABELS)}}
    if name == "vit":
        return transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=SIDE,
            patch_size=8, **labels,
        )  # fmt: skip
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", **labels
    )


def make_model(name):
    """A random classifier, in evaluation, whose answers differ from image to image."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageClassification.from_config(config_of(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write_model(folder, name, **changes):
    """Its folder, as transformers leaves one."""
    model = make_model(name)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **changes}))
    return model


def with_exits(model):
    """The model with random heads wherever an exit can stand."""
    torch.manual_seed(1)
    made = ModuleWithExits(model, points_of(model, {"pixel_values": torch.from_numpy(pixels(2))})).eval()
    with torch.no_grad():
        for head in made.heads:
            torch.nn.init.normal_(head.get_parameter("weight"), std=1.0)
    return made


def write_exits(folder, model):
    """Beside the model, as training leaves them."""
    from safetensors.torch import save_file

    save_file(model.exit_tensors(), folder / "exits.safetensors")
    points = [(call.module, call.number, width) for call, width in model.points]
    (folder / "exits.json").write_bytes(describe_exits(DEFAULT_FORM, len(points) + 1, points))


def pixels(num_rows, seed=0):
    """Random inputs, float32 [B, 3, SIDE, SIDE]."""
    return np.random.default_rng(seed).standard_normal((num_rows, 3, SIDE, SIDE)).astype(np.float32)


def png(seed, shade=128):
    """A noisy image around a shade, as a file."""
    noise = np.random.default_rng(seed).normal(shade, 40, (SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def write_images(path, num_each, first=0, labels=LABELS):
    """A zip with a folder for each label; the classes differ in their shades."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, label in enumerate(labels):
            for index in range(first, first + num_each):
                archive.writestr(f"{label}/{index}.png", png(1000 * number + index, 60 + 60 * number))
    return path
