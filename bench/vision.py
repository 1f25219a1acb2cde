"""Exits on images: `python bench/vision.py --data VISION --out vision-out`.

Four nets on the CIFAR images at hand, which are lossy JPEG, so that no number here is a result on CIFAR-10: the
published weights of ResNet-20 with heads trained on alone, the same weights trained on with their exits, and a small
ResNet and a small ViT of transformers trained from nothing with theirs. For each: accuracy of every exit, the rule that
leaves earliest of those whose 95 % interval of the loss on tune and certify ends at half a point (the best of a hundred
on one split is not as good on the next), and what it costs and gains on the test images, measured by `offramp run` one
image at a time, interleaved with the whole model. Each net is one line of docs/results/vision.jsonl; what is there is
not done again.
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import cifar_resnet
import numpy as np
import torch
from processes import offramp, run
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
ROUNDS, NUM_IMAGES, THREADS = 5, 300, 1


def finish(command: list[str]) -> list[dict[str, Any]]:
    done = run(command, {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(done.errors)
    return [json.loads(line) for _, line in done.lines if line.startswith("{")]


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
    from offramp.tasks.images import load_images

    return load_images(data / "cifar10_jpeg_train.zip", data / "cifar10_jpeg_test.zip", cifar_resnet.LABELS)


def measure(net: str, data: Path, out: Path) -> dict[str, Any]:
    """Accuracy at every exit, the rule, and what it does and takes."""
    import offramp as library
    from offramp.experiments.choosing import ALLOWED_LOSS, candidates, try_policies
    from offramp.experiments.evaluation import answer_at
    from offramp.models.checkpoint import load_classifier
    from offramp.models.inputs import facts_of, rows_of
    from offramp.models.predict import predict
    from offramp.policies import parse, replay
    from offramp.tasks.metrics import answers, paired_interval, score_exits

    folder, splits = train(net, data, out), load(data)
    store = out / "stores" / net
    if not store.exists():
        library.divide(folder, store, say=lambda line: tell(net, line))
    model, facts = load_classifier(folder), facts_of(folder)
    found: dict[str, Any] = {
        "net": net,
        "exits": facts.num_exits,
        "train_rows": MAX_ROWS[net],
        "settings": RECIPES[net],
    }
    said = {}
    for split in ("tune", "certify", "dev"):
        rows = rows_of(folder, facts, splits.examples[split], 1, False, print)
        said[split] = predict(model, rows, 100), rows.labels_N
        scores = [each["accuracy"] for each in score_exits(splits.metrics, said[split][1], said[split][0])]
        found[split] = {"rows": len(rows), "accuracy": scores}
    problem = str(facts.problem)
    both_KNC = np.concatenate([said["tune"][0], said["certify"][0]], axis=1)
    both_N = np.concatenate([said["tune"][1], said["certify"][1]])
    tried = try_policies(candidates(len(both_KNC), problem), both_KNC, both_N, splits.metrics, problem)

    def gain_of(rule: str, logits_KNC: Any, truth_N: Any) -> tuple[Any, tuple[float, float, float]]:
        exit_N = replay(parse(rule), logits_KNC, problem)
        early_N = answer_at(logits_KNC, exit_N)
        return exit_N, paired_interval(splits.metrics, truth_N, early_N, answers(logits_KNC[-1]))

    earliest = sorted((each for each in tried if each.loss <= ALLOWED_LOSS), key=lambda each: each.mean_exit)
    rules = (each.policy for each in earliest if gain_of(each.policy, both_KNC, both_N)[1][1] >= -ALLOWED_LOSS)
    rule = found["rule"] = next(rules)  # confidence 0.995 loses next to nothing
    exit_N, (gain, low, high) = gain_of(rule, *said["dev"])
    found["dev"] |= {"gain": gain, "gain_low": low, "gain_high": high, "mean_exit": float(exit_N.mean())}
    found["latency"] = latency(store, images(splits.examples["dev"], out), rule)
    return found


def images(examples: Any, out: Path) -> Path:
    """Evenly spaced test images, as a zip."""
    from offramp.tasks.examples import spread

    path = out / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, example in enumerate(spread(examples, NUM_IMAGES)):
            archive.writestr(f"{number:04d}.jpg", example.text.read())
    return path


def latency(store: Path, path: Path, rule: str) -> dict[str, Any]:
    """Seconds an image, whole and with the rule, on both backends; rounds in which all are interleaved."""
    rounds = []
    for number in range(ROUNDS):
        ways = [(backend, exit) for backend in ("ort", "torch") for exit in ("none", rule)]
        found: dict[str, Any] = {}
        for backend, exit in ways[number % len(ways) :] + ways[: number % len(ways)]:
            words = ("--input", path, "--json", "--threads", THREADS, "--backend", backend, "--exit", exit)
            *results, last = finish(offramp("run", store, *words))
            record = last["record"]
            found[f"{backend} {'whole' if exit == 'none' else 'exits'}"] = {
                "seconds": record["latency_seconds_median"],
                "mean_seconds": record["seconds_total"] / record["num_inputs"],
                "peak_rss_bytes": record["peak_rss_bytes"],
                "mean_exit": float(np.mean([result["exit_stage"] for result in results])),
            }
        rounds.append(found)
    return {"images": NUM_IMAGES, "threads": THREADS, "rounds": rounds}


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
