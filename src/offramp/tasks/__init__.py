"""Inputs, labelled data and metrics: everything about the task that a model is used for.

Each public name is imported on first access, so that importing this room loads the standard library only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.tasks.data import DataSpec, load
    from offramp.tasks.encoders import open_encoder, read_inputs
    from offramp.tasks.examples import Splits
    from offramp.tasks.text import TextEncoder, token_batch
    from offramp.tasks.tokenizer import has_tokenizer

__all__ = ["DataSpec", "Splits", "TextEncoder", "has_tokenizer", "load", "open_encoder", "read_inputs", "token_batch"]

_HOMES = {
    "DataSpec": "data", "Splits": "examples", "TextEncoder": "text", "has_tokenizer": "tokenizer", "load": "data",
    "open_encoder": "encoders", "read_inputs": "encoders", "token_batch": "text",
}  # fmt: skip
"""Public name -> module of this room that defines it."""


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562)."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
