"""RoBERTa and XLM-R: BERT's layers; positions are counted from the padding token on, and the head has no pooler.

transformers: models/roberta/modeling_roberta.py, models/xlm_roberta/modeling_xlm_roberta.py.
"""

from __future__ import annotations

from dataclasses import replace

from offramp.checkpoints.families.bert import BERT, ENCODER, linear
from offramp.checkpoints.families.config import Key
from offramp.checkpoints.families.family import Family

HEAD = {**linear("dense", "classifier.dense"), **linear("out", "classifier.out_proj")}

ROBERTA = Family(
    model_type="roberta",
    classes=("Roberta", "XLMRoberta"),
    base="roberta.",
    keys=replace(
        BERT.keys,
        vocab_size=Key("vocab_size", 50265),
        pad_token=Key("pad_token_id", 1),
        positions_after_padding=True,
    ),
    tables={**ENCODER, "head": HEAD},
    head_activation="tanh",
    other=("lm_head.", "qa_outputs.", "{base}pooler."),
)
XLM_ROBERTA = replace(
    ROBERTA,
    model_type="xlm-roberta",
    classes=("XLMRoberta", "Roberta"),
    keys=replace(ROBERTA.keys, vocab_size=Key("vocab_size", 30522)),
)
