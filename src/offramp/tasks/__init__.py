"""Inputs, labelled data and metrics: everything about the task that a model is used for.

Importing this room loads no other library than the standard library. Each public name is imported on first access.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.tasks.data import DataSpec as DataSpec
    from offramp.tasks.data import load as load
    from offramp.tasks.encoders import open_encoder as open_encoder
    from offramp.tasks.examples import Example as Example
    from offramp.tasks.examples import Splits as Splits
    from offramp.tasks.inputs import read_inputs as read_inputs
    from offramp.tasks.text import TextEncoder as TextEncoder
    from offramp.tasks.text import has_tokenizer as has_tokenizer
    from offramp.tasks.text import token_batch as token_batch

__all__ = [
    "DataSpec",
    "Example",
    "Splits",
    "TextEncoder",
    "has_tokenizer",
    "load",
    "open_encoder",
    "read_inputs",
    "token_batch",
]

_HOMES = {
    "DataSpec": "offramp.tasks.data",
    "Example": "offramp.tasks.examples",
    "Splits": "offramp.tasks.examples",
    "TextEncoder": "offramp.tasks.text",
    "has_tokenizer": "offramp.tasks.text",
    "load": "offramp.tasks.data",
    "open_encoder": "offramp.tasks.encoders",
    "read_inputs": "offramp.tasks.inputs",
    "token_batch": "offramp.tasks.text",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
