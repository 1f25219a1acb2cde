"""Tiny random models of transformers with a vocabulary of a few words, and a task that they can learn."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

WORDS = ("red", "green", "blue", "the", "sky", "is", "grass", "of", "a", "rose")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
LABELS = ("red", "green", "blue")
NUM_LAYERS = 3

_SHAPE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "num_labels": len(LABELS),
}
_CLASSES = {
    "bert": (BertConfig, BertForSequenceClassification),
    "distilbert": (DistilBertConfig, DistilBertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
    "electra": (ElectraConfig, ElectraForSequenceClassification),
}
MODEL_TYPES = tuple(_CLASSES)


def make_model(model_type, seed=0, **changes):
    """A classifier with weights larger than usual, so that what should change an answer does."""
    config_class, model_class = _CLASSES[model_type]
    torch.manual_seed(seed)
    shape = {
        ("hidden_dim" if model_type == "distilbert" and k == "intermediate_size" else k): v for k, v in _SHAPE.items()
    }
    return model_class(config_class(**{"initializer_range": 0.2, **shape, **changes}))


def write_checkpoint(folder, model):
    """Save a model with its vocabulary."""
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def examples(num, seed=0):
    """Texts of 2 to 4 words with exactly one colour in them, which is the label."""
    generator = torch.Generator().manual_seed(seed)

    def draw(end):
        return int(torch.randint(end, (), generator=generator))

    found = []
    for index in range(num):
        words = [WORDS[3 + draw(len(WORDS) - 3)] for _ in range(1 + draw(3))]
        words.insert(draw(len(words) + 1), LABELS[index % 3])
        found.append((" ".join(words), index % 3))
    return found
