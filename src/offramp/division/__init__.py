"""Dividing a checkpoint: what a model folder holds, what its tensors are called, and which shards and stages they make.

Nothing is written here. Torch is needed for `pytorch_model.bin` alone, huggingface_hub for ids of models alone.
"""

from __future__ import annotations

from offramp.division.hub import resolve
from offramp.division.names import FAMILIES, Family, family_of
from offramp.division.plan import Division, PlannedTensor, ShardPlan, plan_division
from offramp.division.source import Source, open_source

__all__ = [
    "FAMILIES",
    "Division",
    "Family",
    "PlannedTensor",
    "ShardPlan",
    "Source",
    "family_of",
    "open_source",
    "plan_division",
    "resolve",
]
