"""A transformers classifier with an exit after each layer, and the forward pass through all of them.

The last exit is the model's own head, so that what leaves there is what transformers would answer. It runs every layer
and decides nothing.

Shapes: B rows, S tokens, H hidden, C labels; K exits, one a layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offramp.backends.torch_modules import ExitHead, Head
from offramp.checkpoints.families import family_of
from offramp.program.heads import DEFAULT_FORM, FORMS


class ModelWithExits(nn.Module):
    """A `...ForSequenceClassification` and a head for each layer but the last, whose exit is the model's own head.

    `form` is a key of `program.heads.FORMS`. New heads are drawn from torch's generator. Raises SourceError for a model of
    a family that offramp does not divide.
    """

    def __init__(self, model: PreTrainedModel, form: str = DEFAULT_FORM) -> None:
        super().__init__()
        config = {**json.loads(model.config.to_json_string(use_diff=False)), "architectures": [type(model).__name__]}
        family = family_of(config)
        self.model, self.form, self.encoder = model, form, family.encoder(config)
        hidden, labels = self.encoder.hidden_size, self.encoder.labels
        sizes = {"hidden_size": hidden, "num_labels": len(labels), "activation": self.encoder.head_activation}
        heads = (ExitHead(sizes, FORMS[form]) for _ in range(self.encoder.num_layers - 1))
        self.heads = nn.ModuleList(heads)
        self._dropout = _dropout_of(model.config)
        _draw(self.heads, float(model.config.initializer_range))
        self._shared: nn.Module | None = None
        if form == "own-shared":
            dense = family.names("head", family.base)["dense.weight"].removesuffix(".weight")
            self._share(model.get_submodule(dense))

    @property
    def backbone(self) -> nn.Module:
        """The encoder."""
        return self.model.base_model

    @property
    def problem(self) -> str:
        """As in the config."""
        return str(self.model.config.problem_type)

    @property
    def pooled_size(self) -> int:
        """H."""
        return self.encoder.hidden_size

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, last_only: bool = False, **inputs: Tensor
    ) -> list[Tensor]:
        """Logits [B, C] of each exit, the shallowest first, or of the last alone; `inputs` go to the model."""
        # The mask stays 0 and 1: each model of transformers makes of it what its attention needs.
        every = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        if last_only:
            return [self.model(**every).logits]
        return self.with_hidden(**every)[0]

    def with_hidden(
        self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Logits of each exit, and the hidden states [B, S, H] that they stand on."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **inputs)
        logits = [*self.classify(self._pool(output.hidden_states, attention_mask)), output.logits]
        return logits, output.hidden_states[1:]

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> list[Tensor]:
        """All that the heads see: [B, H] for each exit but the last."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **inputs)
        return self._pool(output.hidden_states, attention_mask)

    def classify(self, pooled: list[Tensor]) -> list[Tensor]:
        """Logits of each exit but the last, of what `pooled` gives."""
        dropout = self._dropout if self.training else 0.0
        return [head.classify(pooled_BH, dropout) for head, pooled_BH in zip(self._each(), pooled, strict=True)]

    def exit_tensors(self) -> dict[str, Tensor]:
        """Return the content of `exits.safetensors`, in float32."""
        found = {}
        for number, head in enumerate(self.heads, 1):
            state = head.state_dict()
            for role in state:
                found[FORMS[self.form].tensor_name(role, number)] = state[role].to("cpu", torch.float32).contiguous()
        if self._shared is not None:
            for name, tensor in self._shared.state_dict().items():
                found[self._shared_name(name)] = tensor.to("cpu", torch.float32).contiguous()
        return found

    def load_exits(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the heads from the content of an `exits.safetensors`. Raises ValueError unless they fit."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self.exit_tensors().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            raise ValueError(f"exits do not fit the model: expected {wanted}, got {found}")
        for number, head in enumerate(self.heads, 1):
            names = {role: FORMS[self.form].tensor_name(role, number) for role in head.state_dict()}
            head.load_state_dict({role: tensors[name] for role, name in names.items()})
        if self._shared is not None:
            self._shared.load_state_dict({name: tensors[self._shared_name(name)] for name in ("weight", "bias")})

    def _shared_name(self, name: str) -> str:
        return FORMS[self.form].tensor_name(f"exit.dense.{name}", 0)  # the same for every exit

    def _each(self) -> list[ExitHead]:
        return cast("list[ExitHead]", list(self.heads))

    def _pool(self, hidden_states: Any, mask_BS: Tensor) -> list[Tensor]:
        keep_BS1 = mask_BS.unsqueeze(-1).to(hidden_states[0].dtype)
        between = hidden_states[1:-1]  # the embeddings and the last layer have no head here
        return [head.pool(hidden_BSH, keep_BS1) for head, hidden_BSH in zip(self._each(), between, strict=True)]

    def _share(self, dense: nn.Module) -> None:
        """Every head uses this module without owning it: it is the model's, and is saved once."""
        object.__setattr__(self, "_shared", dense)
        for head in self._each():
            assert isinstance(head.exit, Head)
            del head.exit.dense
            object.__setattr__(head.exit, "dense", dense)


def _dropout_of(config: Any) -> float:
    """What transformers puts before the last layer of the model's own head."""
    if getattr(config, "seq_classif_dropout", None) is not None:  # DistilBERT
        return float(config.seq_classif_dropout)
    own = getattr(config, "classifier_dropout", None)
    return float(config.hidden_dropout_prob if own is None else own)


def _draw(heads: nn.ModuleList, spread: float) -> None:
    """As transformers starts the model's own head."""
    for module in heads.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=spread)
            nn.init.zeros_(module.bias)
