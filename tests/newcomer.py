"""The files, models and variables that a reader of the README brings: tiny, and under the names that it uses."""

import csv
import json
import random
import re
import string
from pathlib import Path

import numpy as np
import torch
import transformers as hf

from tests import tiny_vision

TOPICS = ("business", "entertainment", "politics", "sports", "tech")
SPAM = ("you have won a prize, call now", "cheap pills for you, order now", "claim your free money", "win a free phone")
HAM = ("shall we meet at four?", "the report is ready", "see you at the office", "thank you for the cake")
_MARKS = string.ascii_lowercase + string.digits + string.punctuation
_WORDS = sorted({word.strip(",?") for line in SPAM + HAM for word in line.split()} - set(_MARKS))
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_MARKS, *(f"##{mark}" for mark in _MARKS), *_WORDS)
NUM_MAIL_ROWS = {"quick": 160, "whole": 1700}
"""Extent of the test -> rows; as many as `whole` are enough for a certificate of 2 points, by a tenth of them."""
REVISION = "0" * 40
"""Name of the only commit of every model in the cache of the hub."""

VARIABLES = {
    "my_arrays": """
import numpy as _numpy
_file = _numpy.load("data.npz")
my_arrays = list(zip(_file["0"], [("cat", "dog").index(label) for label in _file["label"]]))
""",
    "my_inputs": """
import torch as _torch
my_inputs = _torch.ones(2, 512)
""",
    "my_module": """
import torch as _torch
_torch.manual_seed(0)
my_module = _torch.nn.Sequential(*(_torch.nn.Linear(512, 512) for _ in range(4)), _torch.nn.Linear(512, 2)).eval()
""",
    "my_texts": """
my_texts = [line.rstrip().split("\t") for line in open("mail.tsv")][1:]
my_texts = [(text, ("ham", "spam").index(label)) for text, label in my_texts[:600]]
""",
}
"""Variable that a block of Python uses and does not define -> code that defines it."""


def write_hub(home):
    """Write the models that the README downloads, as the cache of the hub keeps them under `HF_HOME`."""
    for name, write in (("bert-base-uncased", _write_encoder), ("openai/whisper-tiny", _write_whisper)):
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(REVISION)
        write(repository / "snapshots" / REVISION)


def write_files(folder, num_mail_rows):
    """Write the reader's own models and data."""
    _write_topics(folder / "my-finetuned-bert")
    _write_encoder(folder / "my-encoder")
    tiny_vision.write_model(folder / "my-vit", "vit")
    tiny_vision.write_images(folder / "photos.zip", 60)
    (folder / "holiday").mkdir()
    for number in range(3):
        (folder / "holiday" / f"{number}.png").write_bytes(tiny_vision.png(number))
    mail = _mail(num_mail_rows)
    _write_table(folder / "mail.tsv", [("sentence", "label"), *mail])
    recipe = _shown("offramp.experiments").replace(
        "patience(1, 5)", "patience(1, 2)"
    )  # the reader's model has 3 layers
    (folder / "my_question.py").write_text(recipe)
    (folder / "my_policy.py").write_text(_shown("offramp.policies"))
    (folder / "mail.txt").write_text("".join(f"{text}\n" for text, _ in mail[:5]))
    reviews = ("a fine film", "the plot is thin", "we left early")
    (folder / "reviews.txt").write_text("".join(f"{text}\n" for text in reviews))
    (folder / "reviews.csv").write_text("".join(f"{text}\n" for text in ("text", *reviews)))
    _write_table(folder / "pairs.tsv", [("question", "answer"), ("is it raining?", "the street is wet.")] * 2)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1200, 512)).astype(np.float32)
    np.savez(folder / "data.npz", **{"0": x, "label": np.where(x[:, 0] > 0, "dog", "cat")})


def _shown(module):
    """The first block of the README that begins with an import from a module: a recipe, or a policy."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    return re.search(rf"```python\n(from {module} .*?)```", text, re.DOTALL)[1]


def _write_table(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)


def _mail(num_rows):
    """Texts that all differ, and their labels; the first two are those that the README shows."""
    rng = random.Random(0)
    rows = [("You have won a prize, call now", "spam"), ("Shall we meet at four?", "ham")]
    for number in range(num_rows - len(rows)):
        lines, label = ((SPAM, "spam"), (HAM, "ham"))[number % 2]
        rows.append((f"{rng.choice(lines)} {number}", label))
    return rows


def _bert(**changes):
    sizes = {
        "vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 64, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    return hf.BertConfig(**sizes, **changes)


def _write_tokenizer(folder):
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    hf.BertTokenizerFast.from_pretrained(folder, model_max_length=512).save_pretrained(folder)


def _write_encoder(folder):
    hf.BertModel(_bert()).save_pretrained(folder)
    _write_tokenizer(folder)


def _write_topics(folder):
    """Write a classifier that finds the first topic in every text."""
    labels = {"id2label": dict(enumerate(TOPICS)), "label2id": {label: id for id, label in enumerate(TOPICS)}}
    model = hf.BertForSequenceClassification(_bert(**labels))
    with torch.no_grad():
        model.classifier.weight.mul_(0.1)
        model.classifier.bias.copy_(torch.tensor([3.0, 0, 0, 0, 0]))
    model.save_pretrained(folder)
    _write_tokenizer(folder)


def _write_whisper(folder):
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "decoder_start_token_id": 2}
    sizes = {
        "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_target_positions": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **tokens)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"feature_extractor_type": "WhisperFeatureExtractor"}))
