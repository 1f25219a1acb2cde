"""DistilBERT: no token types, its own names and config keys, a norm epsilon that no config changes.

transformers: models/distilbert/modeling_distilbert.py.
"""

from __future__ import annotations

from offramp.checkpoints.families.bert import ROWS, linear
from offramp.checkpoints.families.config import Key, Keys
from offramp.checkpoints.families.family import Family

DISTILBERT = Family(
    model_type="distilbert",
    classes=("DistilBert",),
    base="distilbert.",
    keys=Keys(
        hidden_size=Key("dim", 768, alias="hidden_size"),
        num_layers=Key("n_layers", 6, alias="num_hidden_layers"),
        num_heads=Key("n_heads", 12, alias="num_attention_heads"),
        intermediate_size=Key("hidden_dim", 3072),
        activation=Key("activation", "gelu"),
        vocab_size=Key("vocab_size", 30522),
        pad_token=Key("pad_token_id", 0),
        token_types=None,
        norm_epsilon=None,
    ),
    tables={
        "embedding-rows": {role: ROWS[role] for role in ("word", "position")},
        "embedding": linear("norm", "{base}embeddings.LayerNorm"),
        "attention": {
            **linear("q", "{base}transformer.layer.{i}.attention.q_lin"),
            **linear("k", "{base}transformer.layer.{i}.attention.k_lin"),
            **linear("v", "{base}transformer.layer.{i}.attention.v_lin"),
            **linear("o", "{base}transformer.layer.{i}.attention.out_lin"),
            **linear("norm", "{base}transformer.layer.{i}.sa_layer_norm"),
        },
        "up": linear("up", "{base}transformer.layer.{i}.ffn.lin1"),
        "down": {
            **linear("down", "{base}transformer.layer.{i}.ffn.lin2"),
            **linear("norm", "{base}transformer.layer.{i}.output_layer_norm"),
        },
        "head": {**linear("dense", "pre_classifier"), **linear("out", "classifier")},
    },
    head_activation="relu",
    other=("vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "qa_outputs."),
)
