"""Tiny random classifiers of texts in folders with a tokenizer: of families that offramp knows nothing of, and, for
tests of all, of those whose tensors it knows by name.
"""

import torch
import transformers as hf

from tests.training.tiny import LABELS, NUM_LAYERS, VOCABULARY

SIZES = {
    "vocab_size": len(VOCABULARY), "hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 24, "initializer_range": 0.2, "pad_token_id": 0,
    "id2label": dict(enumerate(LABELS)), "label2id": {label: id for id, label in enumerate(LABELS)},
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 24}
MAKERS = {
    "albert": lambda: hf.AlbertForSequenceClassification(hf.AlbertConfig(embedding_size=16, **SIZES)),
    "mpnet": lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**SIZES)),
    "deberta-v2": lambda: hf.DebertaV2ForSequenceClassification(
        hf.DebertaV2Config(relative_attention=True, position_buckets=8, pos_att_type=["c2p", "p2c"], **SIZES)
    ),
    "gpt2": lambda: hf.GPT2ForSequenceClassification(
        hf.GPT2Config(**GPT, **{key: SIZES[key] for key in ("vocab_size", "pad_token_id", "id2label", "label2id")},
                      bos_token_id=2, eos_token_id=3)
    ),
}  # fmt: skip
FAMILIES = tuple(MAKERS)
_DISTIL = {"dim": 32, "n_layers": NUM_LAYERS, "n_heads": 4, "hidden_dim": 48}
_NAMES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
KNOWN = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(**_DISTIL, **{key: SIZES[key] for key in SIZES.keys() - _NAMES})
    ),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES)),
    "xlm-roberta": lambda: hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**SIZES)),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(embedding_size=16, **SIZES)),
}


def write_classifier(folder, family, bare=False, num_layers=NUM_LAYERS):
    """A folder of one; `bare`: without its head. Few layers: the time of a division by a run grows with them."""
    model = {**MAKERS, **KNOWN}[family]()
    model.config.num_hidden_layers = num_layers
    torch.manual_seed(0)
    model = type(model)(model.config)
    (model.base_model if bare else model).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    hf.BertTokenizerFast.from_pretrained(folder, model_max_length=20).save_pretrained(folder)
    (folder / "vocab.txt").unlink(missing_ok=True)
    return folder
