"""The CIFAR-10 nets of He et al. (CVPR 2016, section 4.2) in plain torch, with the weights of pytorch_resnet_cifar10
(akamaster, BSD): `python bench/cifar_resnet.py --data FOLDER` prints how many images of the test zip they get right.

The images at hand are JPEG, and lossy: 81.0 % for ResNet-20 against 91.8 % on the official pixels. Compare such numbers
with each other alone, and quote none as a result on CIFAR-10.

Shapes: B images, P channels, H rows, W columns, C = 10 classes.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from offramp.tasks import DataSpec, load
from offramp.tasks.examples import Example
from offramp.tasks.pixels import ImageEncoder

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PIXELS = ImageEncoder((32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
PLANES = (16, 32, 64)
BATCH = 250


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut without weights; where the shape changes, of every second pixel with zeros."""

    def __init__(self, num_inputs: int, planes: int) -> None:
        super().__init__()
        self.stride = planes // num_inputs
        self.conv1 = nn.Conv2d(num_inputs, planes, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, inputs_BPHW: Tensor) -> Tensor:
        hidden_BPHW = functional.relu(self.bn1(self.conv1(inputs_BPHW)))
        return functional.relu(self.bn2(self.conv2(hidden_BPHW)) + self.shortcut(inputs_BPHW))

    def shortcut(self, inputs_BPHW: Tensor) -> Tensor:
        if self.stride == 1:
            return inputs_BPHW
        margin = inputs_BPHW.shape[1] // 2  # of each side: the channels double
        return functional.pad(inputs_BPHW[:, :, ::2, ::2], (0, 0, 0, 0, margin, margin))


class CifarResNet(nn.Module):
    """`n` blocks of each of three widths: a net of 6 n + 2 layers."""

    def __init__(self, n: int, num_classes: int = len(LABELS)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, PLANES[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(PLANES[0])
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(BasicBlock(planes if number else num_inputs, planes) for number in range(n)))
            for num_inputs, planes in zip((PLANES[0], *PLANES), PLANES, strict=False)
        )
        self.linear = nn.Linear(PLANES[-1], num_classes)

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        hidden_BPHW = functional.relu(self.bn1(self.conv1(pixels_B3HW)))
        hidden_BPHW = self.layer3(self.layer2(self.layer1(hidden_BPHW)))
        return self.linear(hidden_BPHW.mean((2, 3)))


class CifarResNetConfig(PretrainedConfig):
    """Blocks of each width; 10 classes."""

    model_type = "cifar-resnet"

    def __init__(self, num_blocks: int = 3, **options: Any) -> None:
        self.num_blocks = num_blocks
        super().__init__(**options)


class CifarResNetForImageClassification(PreTrainedModel):
    """The same net as transformers has its classifiers, so that a folder of it trains and divides as theirs do."""

    config_class = CifarResNetConfig
    main_input_name = "pixel_values"
    base_model_prefix = "net"

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        self.net = CifarResNet(config.num_blocks, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.net(pixel_values))


def register() -> None:
    """Make the net known to transformers in this process."""
    AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
    AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)


def save_folder(weights: Path, folder: Path) -> None:
    """A `.th` file as a folder of transformers, with its image processor."""
    net = load_cifar_resnet(weights)
    labels = dict(enumerate(LABELS))
    config = CifarResNetConfig(len(net.layer1), id2label=labels, label2id={v: k for k, v in labels.items()})
    model = CifarResNetForImageClassification(config)
    model.net.load_state_dict(net.state_dict())
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS.to_json()))


def load_cifar_resnet(path: Path) -> CifarResNet:
    """The net of a `.th` file, in evaluation mode; the names of its weights tell its depth."""
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    net = CifarResNet(sum(re.fullmatch(r"layer1\.\d+\.conv1\.weight", name) is not None for name in weights))
    net.load_state_dict(weights)
    return net.eval()


@torch.inference_mode()
def accuracy(net: CifarResNet, examples: list[Example]) -> float:
    """In percent."""
    num_right = 0
    for start in range(0, len(examples), BATCH):
        images, labels = zip(*examples[start : start + BATCH], strict=True)
        answers_B = net(torch.from_numpy(PIXELS.encode(images))).argmax(1)
        num_right += int((answers_B == torch.tensor(labels)).sum())
    return 100 * num_right / len(examples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of cifar10_jpeg_test.zip, cifar10_resnet/")
    data = parser.parse_args().data
    examples = load(DataSpec(dev=data / "cifar10_jpeg_test.zip", labels=LABELS)).examples["dev"]
    for path in sorted((data / "cifar10_resnet").glob("*.th")):
        print(f"{path.stem}: {accuracy(load_cifar_resnet(path), examples):.2f} % of {len(examples)} images", flush=True)


if __name__ == "__main__":
    main()
