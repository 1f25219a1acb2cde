"""One family of models: its tensor names as a reversible table.

A template holds `{base}` where a whole model has the name of its backbone and a bare one has nothing, and `{i}` for the
layer. Tables are in order of use. It opens no file, and knows nothing of the order or the size of shards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from offramp.checkpoints.families.config import Keys, bad_value, read_encoder
from offramp.program.encoder import LAYER_KERNELS, Encoder

TASKS = (
    "Model",
    "ForSequenceClassification",
    "ForMaskedLM",
    "ForPreTraining",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForCausalLM",
    "LMHeadModel",
)
_LAYER = re.compile(r"\.(0|[1-9][0-9]{0,3})\.")

Table = Mapping[str, str]


class Place(NamedTuple):
    """What a tensor is: its kind, its role there, and its layer where there are layers."""

    kind: str
    role: str
    layer: int | None


@dataclass(frozen=True)
class Family:
    """Models that share one naming. The methods raise SourceError for a config that offramp cannot run."""

    model_type: str
    classes: tuple[str, ...]
    """What its class names begin with; the first is the family's own."""
    base: str
    """Prefix of the backbone's names in a whole model."""
    keys: Keys
    tables: Mapping[str, Table]
    """For each kind, role -> template."""
    head_activation: str
    other: tuple[str, ...]
    """How the tensors begin that belong to other tasks."""

    def architecture(self, config: Mapping[str, Any]) -> str:
        """The class that the weights were saved from; the bare model if the config does not say."""
        named = config.get("architectures") or [self.classes[0] + "Model"]
        if not isinstance(named, list) or named[0] not in [name + task for name in self.classes for task in TASKS]:
            known = ", ".join(self.classes[0] + task for task in TASKS)
            raise bad_value("architectures", named, f"known for {self.model_type} are {known}")
        return named[0]

    def has_head(self, config: Mapping[str, Any]) -> bool:
        """Whether the model ends in a classification head."""
        return self.architecture(config).endswith("ForSequenceClassification")

    def encoder(self, config: Mapping[str, Any]) -> Encoder:
        """What the model computes with."""
        return read_encoder(config, self.keys, self.head_activation if self.has_head(config) else None)

    def names(self, kind: str, base: str, layer: int | None = None) -> dict[str, str]:
        """role -> tensor name of one kind, in order of use. `base` is `self.base`, or "" for a bare model."""
        return {role: template.format(base=base, i=layer) for role, template in self.tables[kind].items()}

    def place(self, name: str, base: str) -> Place | None:
        """The inverse of `names`; None for a name that is in none of the tables."""
        found = _LAYER.search(name)
        layer = int(found[1]) if found else None
        for kind in self.tables:
            if (kind in LAYER_KERNELS) == (layer is not None):
                for role, known in self.names(kind, base, layer).items():
                    if known == name:
                        return Place(kind, role, layer)
        return None

    def passed_through(self, base: str, has_head: bool) -> tuple[str, ...]:
        """How the names of tensors begin that are kept but never read: heads of other tasks."""
        unused = () if has_head else tuple(_module(template) for template in self.tables["head"].values())
        return tuple(template.format(base=base) for template in (*self.other, *unused))


def _module(template: str) -> str:
    """The outermost module of a head's template: `{base}pooler.dense.weight` -> `{base}pooler.`"""
    return template[: template.index(".") + 1]
