"""ELECTRA: BERT's layers; embeddings may be narrower, then projected; the head has GELU whatever the config says.

transformers: models/electra/modeling_electra.py.
"""

from __future__ import annotations

from dataclasses import replace

from offramp.checkpoints.families.bert import BERT, ENCODER, linear
from offramp.checkpoints.families.config import Key
from offramp.checkpoints.families.family import Family
from offramp.checkpoints.families.roberta import HEAD

ELECTRA = Family(
    model_type="electra",
    classes=("Electra",),
    base="electra.",
    keys=replace(
        BERT.keys,
        hidden_size=Key("hidden_size", 256),
        num_heads=Key("num_attention_heads", 4),
        intermediate_size=Key("intermediate_size", 1024),
        embedding_size=Key("embedding_size", 128),
    ),
    tables={
        **ENCODER,
        "embedding": {**ENCODER["embedding"], **linear("project", "{base}embeddings_project")},
        "head": HEAD,
    },
    head_activation="gelu",
    other=(
        "discriminator_predictions.",
        "generator_predictions.",
        "generator_lm_head.",
        "qa_outputs.",
        "sequence_summary.",
    ),
)
