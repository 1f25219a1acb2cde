"""Exits on models that offramp knows nothing of: `python bench/anywhere.py --glue GLUE --mnist MNIST --out OUT`.

Two of them. `mpnet`: an MPNet filled from MiniLM-L6 (the same function of a single
sentence: its relative positions weigh nothing), of a family whose names offramp does not know, trained on 6,000 rows
of SST-2; `minilm`: MiniLM-L6 itself, of a family that it does know, trained alike, for comparison. `own`: a module of
one's own, residual blocks on patches of MNIST's test images, which are cut into splits; so its accuracy is no result
on MNIST. For each: accuracy of every exit, the rule that leaves earliest of those that keep the limit of `rules.py` on
tune and certify, and what it costs and gains on dev. Each is one line of docs/results/anywhere.jsonl; what is there is
not done again.
"""

import argparse
import gzip
import sys
from pathlib import Path
from typing import Any

import glue
import numpy as np
import rules
import torch
from records import add_record, read_records
from torch import nn

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "anywhere.jsonl"
MODELS = ("own", "mpnet", "minilm")
MAX_ROWS, NUM_INPUTS = 6_000, 300


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Mixed(nn.Module):
    """A block over patches, then one over channels."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.patches, self.channels = Block(patches), Block(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.channels(self.patches(x.transpose(1, 2)).transpose(1, 2))


class Net(nn.Module):
    """An MLP-Mixer (Tolstikhin et al., 2021) for images of 28 x 28, patches of 4 x 4."""

    def __init__(self, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 4, 4)
        self.layers = nn.ModuleList(Mixed(49, width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixels).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def mnist(folder: Path, out: Path) -> Path:
    """The test images with their labels as an .npz."""
    path = out / "mnist.npz"
    if not path.exists():
        with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
            pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(), np.uint8, offset=8)
        np.savez(path, pixels=pixels.astype(np.float32) / 255 - 0.5, label=labels)
    return path


def own(args: argparse.Namespace) -> tuple[Path, Any, dict[str, Any]]:
    """The store of a module of one's own, and its splits."""
    import offramp
    from offramp.tasks import DataSpec, load
    from offramp.training import TrainSettings, train_exits

    splits = load(DataSpec(train=mnist(args.mnist, args.out)))
    chosen: dict[str, Any] = {"epochs": 30, "batch_size": 64, "learning_rate": 1e-3, "heads_epochs": 10}
    torch.manual_seed(0)
    model, run, store = Net(), args.out / "runs" / "own", args.out / "stores" / "own"
    run.parent.mkdir(parents=True, exist_ok=True)
    train_exits(
        model, splits.examples["train"], splits.examples["tune"], run, labels=splits.labels,
        settings=TrainSettings(**chosen), progress=tell,
    )  # fmt: skip
    if not store.exists():
        offramp.divide(model, {"pixels": torch.randn(2, 1, 28, 28)}, store, exits=run, say=tell)
    return store, splits, chosen


def text(name: str, args: argparse.Namespace) -> tuple[Path, Any, dict[str, Any]]:
    """The store of a model of texts, and its splits."""
    import offramp
    from offramp.tasks import DataSpec, load
    from offramp.tasks.examples import spread
    from offramp.training import TrainSettings, train_exits

    splits = load(DataSpec(task="sst2", data=args.glue))
    chosen: dict[str, Any] = {"epochs": 2, "batch_size": 32, "learning_rate": 5e-5, "max_length": 64}
    source = Path(glue.minilm()) if name == "minilm" else mpnet(args.out)
    run, store = args.out / "runs" / name, args.out / "stores" / name
    run.parent.mkdir(parents=True, exist_ok=True)
    train_exits(
        source, spread(splits.examples["train"], MAX_ROWS), splits.examples["tune"], run, labels=splits.labels,
        settings=TrainSettings(**chosen), progress=tell,
    )  # fmt: skip
    if not store.exists():
        offramp.divide(run, store, say=tell)
    return store, splits, chosen


def mpnet(out: Path) -> Path:
    """An MPNet that computes what MiniLM-L6 does of a single sentence."""
    folder = out / "mpnet"
    if folder.exists():
        return folder
    from transformers import AutoTokenizer, BertModel, MPNetConfig, MPNetModel

    bert = BertModel.from_pretrained(glue.minilm()).eval()
    old, config = bert.state_dict(), bert.config
    behind = 2  # rows of the position table before the first token's
    new = MPNetModel(
        MPNetConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads, intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings + behind, pad_token_id=config.pad_token_id,
        )
    ).eval()  # fmt: skip
    parts = {
        "attention.attn.q": "attention.self.query", "attention.attn.k": "attention.self.key",
        "attention.attn.v": "attention.self.value", "attention.attn.o": "attention.output.dense",
        "attention.LayerNorm": "attention.output.LayerNorm", "intermediate.dense": "intermediate.dense",
        "output.dense": "output.dense", "output.LayerNorm": "output.LayerNorm",
    }  # fmt: skip
    state = new.state_dict()
    for name in state:
        of_bert = name
        for ours, theirs in parts.items():
            of_bert = of_bert.replace(f".{ours}.", f".{theirs}.") if name.startswith("encoder.layer.") else of_bert
        if name == "encoder.relative_attention_bias.weight":
            state[name].zero_()
        elif name == "embeddings.position_embeddings.weight":
            state[name].zero_()
            state[name][behind:] = old[name] + old["embeddings.token_type_embeddings.weight"][0]
        elif of_bert in old and state[name].shape == old[of_bert].shape:
            state[name].copy_(old[of_bert])
        elif not name.endswith("position_ids"):
            raise SystemExit(f"{name} has no like in MiniLM")
    new.load_state_dict(state)
    ids = torch.tensor([[101, 2023, 2003, 102]])
    with torch.no_grad():
        torch.testing.assert_close(new(ids)[0], bert(ids)[0], atol=1e-4, rtol=0)
    partial = folder.with_suffix(".partial")
    new.save_pretrained(partial)
    AutoTokenizer.from_pretrained(glue.minilm()).save_pretrained(partial)
    partial.rename(folder)
    return folder


def inputs_of(name: str, splits: Any, out: Path) -> Path:
    """Evenly spaced inputs of dev, as `offramp run` takes them."""
    from offramp.tasks.examples import spread

    rows = [example.text for example in spread(splits.examples["dev"], NUM_INPUTS)]
    if name == "own":
        path = out / "inputs.npz"
        np.savez(path, pixels=np.stack([row.arrays["pixels"] for row in rows]))
        return path
    path = out / "inputs.txt"
    path.write_text("".join(row + "\n" for row in rows))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("anywhere-out"))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--train-only", action="store_true", help="needs no quiet machine")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    done = {record["model"] for record in read_records(RESULTS)}
    for name in args.models.split(","):
        if name in done:
            continue
        store, splits, settings = own(args) if name == "own" else text(name, args)
        if args.train_only:
            continue
        found = rules.measure(store, splits, inputs_of(name, splits, args.out), NUM_INPUTS, threads=1)
        num_rows = min(MAX_ROWS, len(splits.examples["train"]))
        add_record(RESULTS, {"kind": "anywhere", "model": name, "train_rows": num_rows, "settings": settings, **found})


if __name__ == "__main__":
    main()
