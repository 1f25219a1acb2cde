"""Exits on images: `python bench/vision.py --data VISION --out vision-out`.

Four nets on the CIFAR images at hand, which are lossy JPEG, so that no number here is a result on CIFAR-10: the
published weights of ResNet-20 with heads trained on alone, the same weights trained on with their exits, and a small
ResNet and a small ViT of transformers trained from nothing with theirs. For each: accuracy of every exit, the rule that
leaves earliest of those that keep the limit of `rules.py` on tune and certify, and what it costs and gains on the test
images. Each net is one line of docs/results/vision.jsonl; what is there is
not done again.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import cifar_resnet
import rules
import torch
from records import add_record, read_records

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "vision.jsonl"
NETS = ("resnet20", "resnet20-joint", "resnet-small", "vit-small")
MAX_ROWS = {"resnet20": 20_000, "resnet20-joint": 40_000, "resnet-small": 40_000, "vit-small": 40_000}
RECIPES: dict[str, dict[str, Any]] = {
    "resnet20": {"loss": "heads-only", "heads_epochs": 20},
    "resnet20-joint": {"epochs": 10, "batch_size": 128, "learning_rate": 1e-3, "heads_epochs": 10},
    "resnet-small": {"epochs": 15, "batch_size": 128, "learning_rate": 2e-3, "heads_epochs": 10},
    "vit-small": {"epochs": 20, "batch_size": 128, "learning_rate": 1e-3, "heads_epochs": 10},
}
NUM_IMAGES, THREADS = 300, 1


def base(net: str, data: Path, out: Path) -> Path:
    """Where training begins: a folder of transformers."""
    folder = out / "models" / net
    if folder.exists():
        return folder
    partial = folder.with_name(net + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if net.startswith("resnet20"):
        cifar_resnet.save_folder(next((data / "cifar10_resnet").glob("resnet20-*.th")), partial)
    else:
        _new(net).save_pretrained(partial)
        (partial / "preprocessor_config.json").write_text(json.dumps(cifar_resnet.PIXELS.to_json()))
    partial.rename(folder)
    return folder


def _new(net: str) -> Any:
    """A small net of transformers with random weights."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    if net == "resnet-small":
        return ResNetForImageClassification(
            ResNetConfig(embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic",
                         num_labels=10)
        )  # fmt: skip
    return ViTForImageClassification(
        ViTConfig(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256, image_size=32,
                  patch_size=4, num_labels=10, hidden_dropout_prob=0.0)
    )  # fmt: skip


def train(net: str, data: Path, out: Path) -> Path:
    """The run folder: the net and its exits."""
    from offramp.tasks.examples import spread
    from offramp.training import TrainSettings, train_exits

    splits = load(data)
    settings = TrainSettings(**{"batch_size": 64, "save_steps": 2000, **RECIPES[net]})
    rows = spread(splits.examples["train"], MAX_ROWS[net])
    folder = out / "runs" / net
    train_exits(
        base(net, data, out), rows, spread(splits.examples["tune"], 2000), folder, labels=splits.labels,
        metrics=splits.metrics, settings=settings, progress=lambda line: tell(net, line),
    )  # fmt: skip
    return folder


def tell(net: str, line: str) -> None:
    print(f"{net}: {line}", file=sys.stderr, flush=True)


def load(data: Path) -> Any:
    from offramp import tasks

    train, dev = (data / f"cifar10_jpeg_{part}.zip" for part in ("train", "test"))
    return tasks.load(tasks.DataSpec(train=train, dev=dev, labels=cifar_resnet.LABELS))


def measure(net: str, data: Path, out: Path) -> dict[str, Any]:
    """Accuracy at every exit, the rule, and what it does and takes."""
    import offramp

    folder, splits = train(net, data, out), load(data)
    store = out / "stores" / net
    if not store.exists():
        offramp.divide(folder, store, say=lambda line: tell(net, line))
    found = rules.measure(store, splits, images(splits.examples["dev"], out), NUM_IMAGES, THREADS)
    return {"net": net, "train_rows": MAX_ROWS[net], "settings": RECIPES[net], **found}


def images(examples: Any, out: Path) -> Path:
    """Evenly spaced test images, as a zip."""
    from offramp.tasks.examples import spread

    path = out / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, example in enumerate(spread(examples, NUM_IMAGES)):
            archive.writestr(f"{number:04d}.jpg", example.text.read())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("vision-out"))
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--train-only", action="store_true", help="needs no quiet machine")
    args = parser.parse_args()
    cifar_resnet.register()
    done = {record["net"] for record in read_records(RESULTS)}
    for net in args.nets.split(","):
        if args.train_only:
            train(net, args.data, args.out)
        elif net not in done:
            add_record(RESULTS, {"kind": "vision", **measure(net, args.data, args.out)})


if __name__ == "__main__":
    main()
