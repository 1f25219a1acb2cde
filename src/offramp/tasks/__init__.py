"""Inputs, labelled data and metrics: everything about the task that a model is used for.

Each public name is imported on first access, so that importing this room loads the standard library only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.tasks.data import DataSpec, load
    from offramp.tasks.encoders import open_encoder
    from offramp.tasks.examples import Splits
    from offramp.tasks.inputs import read_inputs
    from offramp.tasks.text import TextEncoder, token_batch
    from offramp.tasks.tokenizer import has_tokenizer

__all__ = ["DataSpec", "Splits", "TextEncoder", "has_tokenizer", "load", "open_encoder", "read_inputs", "token_batch"]

_HOMES = {
    "data": ("DataSpec", "load"),
    "encoders": ("open_encoder",),
    "examples": ("Splits",),
    "inputs": ("read_inputs",),
    "text": ("TextEncoder", "token_batch"),
    "tokenizer": ("has_tokenizer",),
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562)."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
