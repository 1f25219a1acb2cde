"""Experiments that vary a setting: benches, tuning, sweeps, evaluations, the demo. Recipes import `Grid`, `patience`.

Each public name is imported on first access: `offramp profile` uses this room on Python 3.8.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offramp.experiments.grid import Grid, Search, patience
    from offramp.experiments.specification import Experiment, experiment

__all__ = ["Experiment", "Grid", "Search", "experiment", "patience"]

_HOMES = {
    "Experiment": "specification", "Grid": "grid", "Search": "grid", "experiment": "specification", "patience": "grid",
}  # fmt: skip
"""Public name -> module of this room that defines it."""


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562)."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
