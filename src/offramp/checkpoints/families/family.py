"""One family of models: its tensor names as a reversible table.

In a template, `{base}` stands for the name of the backbone, which is empty for a bare model, and `{i}` for the layer.
Tables are in order of use.
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
    """Meaning of a tensor: its kernel, its role as a weight of that kernel, and its layer if it is in one."""

    kernel: str
    role: str
    layer: int | None


@dataclass(frozen=True)
class Family:
    """Models that share one naming of tensors. Methods raise SourceError for a config that offramp cannot run."""

    model_type: str
    classes: tuple[str, ...]
    """Prefixes of class names; the first is that of the family's own classes."""
    base: str
    """Prefix of the backbone's names in a whole model."""
    keys: Keys
    tables: Mapping[str, Table]
    """Kernel -> role -> template of the tensor name."""
    head_activation: str
    other: tuple[str, ...]
    """Prefixes of tensors that belong to other tasks."""

    def architecture(self, config: Mapping[str, Any]) -> str:
        """Return the class that the weights were saved from; the bare model if the config names none."""
        named = config.get("architectures") or [self.classes[0] + "Model"]
        if not isinstance(named, list) or named[0] not in [name + task for name in self.classes for task in TASKS]:
            known = ", ".join(self.classes[0] + task for task in TASKS)
            raise bad_value("architectures", named, f"known for {self.model_type} are {known}")
        return named[0]

    def has_head(self, config: Mapping[str, Any]) -> bool:
        """Return whether the model ends in a classification head."""
        return self.architecture(config).endswith("ForSequenceClassification")

    def encoder(self, config: Mapping[str, Any]) -> Encoder:
        """Return the sizes and settings of the model."""
        return read_encoder(config, self.keys, self.head_activation if self.has_head(config) else None)

    def names(self, kernel: str, base: str, layer: int | None = None) -> dict[str, str]:
        """Return role -> tensor name of one kernel, in order of use. `base` is `self.base`, or "" for a bare model."""
        return {role: template.format(base=base, i=layer) for role, template in self.tables[kernel].items()}

    def place(self, name: str, base: str) -> Place | None:
        """Return the place of a tensor name (the inverse of `names`), or None for a name in none of the tables."""
        found = _LAYER.search(name)
        layer = int(found[1]) if found else None
        for kernel in self.tables:
            if (kernel in LAYER_KERNELS) == (layer is not None):
                for role, known in self.names(kernel, base, layer).items():
                    if known == name:
                        return Place(kernel, role, layer)
        return None

    def passed_through(self, base: str, has_head: bool) -> tuple[str, ...]:
        """Return the prefixes of tensors that are kept but never read: heads of other tasks."""
        unused = () if has_head else tuple(_module(template) for template in self.tables["head"].values())
        return tuple(template.format(base=base) for template in (*self.other, *unused))


def _module(template: str) -> str:
    """Return the outermost module of a head's template: `{base}pooler.dense.weight` -> `{base}pooler.`"""
    return template[: template.index(".") + 1]
