"""Labelled texts to rows of token ids, with the tokenizer of transformers, and rows to padded batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from offramp.tasks.text import Text

Example = tuple[Text, int]
"""A text or a pair of texts, and the id of its label."""
Row = dict[str, Any]
"""`input_ids`, `attention_mask` and, if the model takes them, `token_type_ids`: lists of equal length; `labels`."""
Collator = Callable[[list[Row]], dict[str, Any]]


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int
) -> list[Row]:
    """One row an example, in order; texts longer than `max_length` tokens lose their end."""
    has_types = "token_type_ids" in inspect.signature(model.forward).parameters  # DistilBERT takes none
    rows = []
    for text, label in examples:
        first, second = (text, None) if isinstance(text, str) else text
        encoded = tokenizer(first, second, truncation=True, max_length=max_length, return_token_type_ids=has_types)
        rows.append({**encoded, "labels": label})
    return rows


def make_collator(tokenizer: PreTrainedTokenizerBase) -> Collator:
    """A function that pads rows to the longest of them."""
    return DataCollatorWithPadding(tokenizer)
