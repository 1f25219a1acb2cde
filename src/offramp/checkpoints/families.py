"""Tensor names of supported models, one file for each family. One table serves reading and writing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offramp.checkpoints.families.bert import BERT
from offramp.checkpoints.families.config import shown
from offramp.checkpoints.families.distilbert import DISTILBERT
from offramp.checkpoints.families.electra import ELECTRA
from offramp.checkpoints.families.family import Family, Place
from offramp.checkpoints.families.roberta import ROBERTA, XLM_ROBERTA
from offramp.errors import SourceError

__all__ = ["FAMILIES", "Family", "Place", "family_of", "shown"]

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (BERT, DISTILBERT, ROBERTA, XLM_ROBERTA, ELECTRA)
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that `config["model_type"]` names. Raises SourceError naming the known families."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        named = model_type or config.get("architectures") or "(config.json has no model_type)"
        raise SourceError(f"unknown architecture {shown(named)}", "config.json", f"known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
