"""BERT, and what shares its names: MiniLM and other distillates.

transformers: models/bert/modeling_bert.py.
"""

from __future__ import annotations

from offramp.checkpoints.families.config import Key, Keys
from offramp.checkpoints.families.family import Family


def linear(role: str, module: str) -> dict[str, str]:
    """Weight and bias of one module; norms have the same two."""
    return {f"{role}.weight": f"{module}.weight", f"{role}.bias": f"{module}.bias"}


ROWS = {
    "word": "{base}embeddings.word_embeddings.weight",
    "position": "{base}embeddings.position_embeddings.weight",
    "type": "{base}embeddings.token_type_embeddings.weight",
}
ENCODER = {
    "embedding-rows": ROWS,
    "embedding": linear("norm", "{base}embeddings.LayerNorm"),
    "attention": {
        **linear("q", "{base}encoder.layer.{i}.attention.self.query"),
        **linear("k", "{base}encoder.layer.{i}.attention.self.key"),
        **linear("v", "{base}encoder.layer.{i}.attention.self.value"),
        **linear("o", "{base}encoder.layer.{i}.attention.output.dense"),
        **linear("norm", "{base}encoder.layer.{i}.attention.output.LayerNorm"),
    },
    "up": linear("up", "{base}encoder.layer.{i}.intermediate.dense"),
    "down": {
        **linear("down", "{base}encoder.layer.{i}.output.dense"),
        **linear("norm", "{base}encoder.layer.{i}.output.LayerNorm"),
    },
}

BERT = Family(
    model_type="bert",
    classes=("Bert",),
    base="bert.",
    keys=Keys(
        hidden_size=Key("hidden_size", 768),
        num_layers=Key("num_hidden_layers", 12),
        num_heads=Key("num_attention_heads", 12),
        intermediate_size=Key("intermediate_size", 3072),
        activation=Key("hidden_act", "gelu"),
        vocab_size=Key("vocab_size", 30522),
        pad_token=Key("pad_token_id", 0),
    ),
    tables={**ENCODER, "head": {**linear("dense", "{base}pooler.dense"), **linear("out", "classifier")}},
    head_activation="tanh",
    other=("cls.", "qa_outputs."),
)
