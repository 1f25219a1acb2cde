"""Small random models for same_answers.py, in folders: one of each family, images, arrays, and modules for `stream`.

Layers have about 1 MiB of weights each: shards of less than 256 KiB always stay in memory, and budgets would make no
difference. Exits are trained for a moment by `offramp train`, so that this file knows nothing of the inside of offramp.
"""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

WIDTH, NUM_LAYERS, SIDE = 192, 4, 32
LABELS = ("red", "green", "blue")
WORDS = ("red", "green", "blue", "the", "sky", "is", "grass", "of", "a", "rose", "##s", "##ish")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
COMMON: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "pad_token_id": 0, "id2label": dict(enumerate(LABELS)),
    "label2id": {label: index for index, label in enumerate(LABELS)},
}  # fmt: skip
ENCODER = {
    "hidden_size": WIDTH, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH,
    "max_position_embeddings": 40,
}  # fmt: skip
DISTIL = {"dim": WIDTH, "n_layers": NUM_LAYERS, "n_heads": 4, "hidden_dim": 4 * WIDTH, "max_position_embeddings": 40}
GPT = {"n_embd": WIDTH, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 40}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One model of transformers; `heads` is the form of its exits, "" for none."""

    name: str
    kind: str
    """`text` or `image`."""
    config: type
    shape: dict[str, Any] = field(default_factory=dict)
    heads: str = ""


def models() -> tuple[Model, ...]:
    """Return the models that are divided from a folder."""
    deberta = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["c2p", "p2c"]}
    vit = {**ENCODER, "image_size": SIDE, "patch_size": 8}
    resnet = {"embedding_size": 32, "hidden_sizes": [64, 96, 128, 192], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    fairseq = {"type_vocab_size": 1, "pad_token_id": 1}
    return (
        Model("bert", "text", hf.BertConfig, ENCODER, "mean-linear"),
        Model("bert-own", "text", hf.BertConfig, {**ENCODER, "hidden_act": "relu"}, "own"),
        Model("bert-regression", "text", hf.BertConfig, {**ENCODER, "problem_type": "regression", "num_labels": 1}),
        Model("distilbert", "text", hf.DistilBertConfig, DISTIL, "cls-linear"),
        Model(
            "distilbert-multi", "text", hf.DistilBertConfig, {**DISTIL, "problem_type": "multi_label_classification"}
        ),
        Model("roberta", "text", hf.RobertaConfig, {**ENCODER, **fairseq}, "own-shared"),
        Model("xlm-roberta", "text", hf.XLMRobertaConfig, {**ENCODER, **fairseq, "hidden_act": "gelu_new"}),
        Model(
            "electra", "text", hf.ElectraConfig, {**ENCODER, "embedding_size": 64, "hidden_act": "silu"}, "mean-linear"
        ),
        Model("albert", "text", hf.AlbertConfig, {**ENCODER, "embedding_size": 64}, "mean-linear"),
        Model("mpnet", "text", hf.MPNetConfig, ENCODER, "mean-linear"),
        Model("deberta-v2", "text", hf.DebertaV2Config, {**ENCODER, **deberta}),
        Model("gpt2", "text", hf.GPT2Config, {**GPT, "bos_token_id": 2, "eos_token_id": 3}, "mean-linear"),
        Model("vit", "image", hf.ViTConfig, vit, "mean-linear"),
        Model("resnet", "image", hf.ResNetConfig, resnet, "mean-linear"),
    )


class Block(nn.Module):
    """Residual block of two linear layers."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden):
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))


class Sum(nn.Module):
    """Classifier of a vector and a row number of an embedding table."""

    def __init__(self):
        super().__init__()
        self.table, self.stem = nn.Embedding(2000, WIDTH), nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(NUM_LAYERS)])
        self.head = nn.Linear(WIDTH, len(LABELS))

    def forward(self, numbers, *, word):
        hidden = self.stem(numbers) + self.table(word)
        for layer in self.layers:
            hidden = layer(hidden)
        return {"answer": self.head(hidden)}


class Tied(nn.Module):
    """Language model with a tied output matrix and buffers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(500, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(NUM_LAYERS)])
        self.head = nn.Linear(WIDTH, 500, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.register_buffer("positions", torch.linspace(0, 1, 32)[:, None], persistent=False)

    def forward(self, input_ids):
        hidden = self.words(input_ids) + self.shift + self.positions[: input_ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return {"logits": self.head(hidden)}


def streamed_models() -> dict[str, tuple[type, Any]]:
    """Return name -> (class, configuration) of the models of transformers for `stream`."""
    ids = {"vocab_size": 500, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    mixtral = {
        **ids, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 40,
    }  # fmt: skip
    return {
        "gpt2-lm": (hf.GPT2LMHeadModel, hf.GPT2Config(**GPT, **ids)),
        "mixtral-lm": (hf.MixtralForCausalLM, hf.MixtralConfig(**mixtral)),
    }


def scrambled(make: Callable[[], Any], seed: int = 0) -> Any:
    """Return a model in evaluation mode, with noise on all its weights."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.add_(torch.randn_like(parameter) * fan_in**-0.5)
    return model.eval()


def write_folder(folder: Path, model: Model) -> None:
    """Write a classifier with random weights and its tokenizer or image processor."""
    images = {key: value for key, value in COMMON.items() if "label" in key}
    common = images if model.kind == "image" else COMMON
    if model.shape.get("num_labels") == 1:
        common = {key: value for key, value in common.items() if "label" not in key}
    config = model.config(**{**common, **model.shape})
    auto = hf.AutoModelForImageClassification if model.kind == "image" else hf.AutoModelForSequenceClassification
    scrambled(lambda: auto.from_config(config)).save_pretrained(folder)
    if model.kind == "image":
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        return
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    hf.BertTokenizerFast.from_pretrained(folder, model_max_length=32).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")


def write_texts(path: Path, num: int = 60) -> None:
    """Write a table of texts with the colour in them as label."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(num):
        words = [*rng.choice(WORDS[3:10], rng.integers(1, 8)), LABELS[index % 3]]
        rows.append(f"{' '.join(rng.permutation(words))} {index}\t{LABELS[index % 3]}\n")
    path.write_text("sentence\tlabel\n" + "".join(rows))


def png(seed: int, shade: int) -> bytes:
    """Return a noisy image around a shade as a PNG file."""
    from PIL import Image

    pixels = np.random.default_rng(seed).normal(shade, 40, (SIDE, SIDE + 6, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_images(path: Path, num_each: int = 20) -> None:
    """Write a zip with a folder of images for each label."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, label in enumerate(LABELS):
            for index in range(num_each):
                archive.writestr(f"{label}/{index}.png", png(1000 * number + index, 60 + 60 * number))


def inputs_of(kind: str) -> list[Any]:
    """Return inputs for `predict`: texts and pairs of unequal lengths, image files, or arrays."""
    rng = np.random.default_rng(7)
    if kind == "image":
        return [png(seed, shade) for seed, shade in enumerate((40, 80, 120, 160, 200, 240, 128))]
    if kind == "arrays":
        vectors = rng.standard_normal((9, 8)).astype(np.float32)
        return [{"numbers": row, "word": np.int64(211 * index)} for index, row in enumerate(vectors)]
    lengths = (1, 3, 25, 8, 2, 14, 30, 5, 11)
    texts = [" ".join(rng.choice(WORDS[:10], length)) for length in lengths]
    return [*texts, (texts[1], texts[3]), (texts[5], texts[0]), (texts[7], texts[8])]
