"""A transformers classifier with an exit after each layer, and the forward pass through all of them.

The last exit is the model's own head, so its answers are those of transformers. Every layer runs; no row stops early.

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

    `form` is a key of `program.heads.FORMS`. New heads are drawn from torch's generator. Raises SourceError for a model
    of a family that offramp does not divide.
    """

    def __init__(self, model: PreTrainedModel, form: str = DEFAULT_FORM) -> None:
        super().__init__()
        config = {**json.loads(model.config.to_json_string(use_diff=False)), "architectures": [type(model).__name__]}
        family = family_of(config)
        self.model, self.form, self.encoder = model, form, family.encoder(config)
        sizes = {
            "hidden_size": self.encoder.hidden_size,
            "num_labels": len(self.encoder.labels),
            "activation": self.encoder.head_activation,
        }
        self._form = FORMS[form]
        self.heads = nn.ModuleList(ExitHead(sizes, self._form) for _ in range(self.encoder.num_layers - 1))
        self._dropout = _dropout_of(model.config)
        _draw(self.heads, float(model.config.initializer_range))
        self._shared: nn.Module | None = None
        if self._form.shared:
            dense = family.names("head", family.base)["dense.weight"].removesuffix(".weight")
            self._share(model.get_submodule(dense))

    @property
    def backbone(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    @property
    def problem(self) -> str:
        """Kind of answer, as the config names it."""
        return str(self.model.config.problem_type)

    @property
    def pooled_size(self) -> int:
        """Width H of the values that heads read."""
        return self.encoder.hidden_size

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, last_only: bool = False, **inputs: Tensor
    ) -> list[Tensor]:
        """Return logits [B, C] of each exit, the first one first, or of the last alone; `inputs` go to the model."""
        # The mask stays 0 and 1: each model of transformers makes of it what its attention needs.
        every = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        if last_only:
            return [self.model(**every).logits]
        return self.with_hidden(**every)[0]

    def with_hidden(
        self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Return logits of each exit, and the hidden states [B, S, H] that they read."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **inputs)
        logits = [*self.classify(self._pool(output.hidden_states, attention_mask)), output.logits]
        return logits, output.hidden_states[1:]

    def pooled(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> list[Tensor]:
        """Return the pooled values [B, H] that the head of each exit but the last reads."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **inputs)
        return self._pool(output.hidden_states, attention_mask)

    def classify(self, pooled: list[Tensor]) -> list[Tensor]:
        """Return logits of each exit but the last from the result of `pooled`."""
        dropout = self._dropout if self.training else 0.0
        return [head.classify(pooled_BH, dropout) for head, pooled_BH in zip(self._each(), pooled, strict=True)]

    def exit_tensors(self) -> dict[str, Tensor]:
        """Return the content of `exits.safetensors` in float32."""
        found = {}
        for number, head in enumerate(self.heads, 1):
            state = head.state_dict()
            for role in state:
                found[self._form.tensor_name(role, number)] = state[role].to("cpu", torch.float32).contiguous()
        if self._shared is not None:
            for name, tensor in self._shared.state_dict().items():
                found[self._shared_name(name)] = tensor.to("cpu", torch.float32).contiguous()
        return found

    def load_exits(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the heads from the content of `exits.safetensors`. Raises ValueError unless they fit."""
        shapes = self._form.shapes(self.encoder.hidden_size, len(self.encoder.labels))
        numbers = range(1, self.encoder.num_layers)
        wanted = {self._form.tensor_name(role, n): shape for n in numbers for role, shape in shapes.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            raise ValueError(f"exits do not fit the model: expected {wanted}, got {found}")
        for number, head in enumerate(self.heads, 1):
            own = {role: tensors[self._form.tensor_name(role, number)] for role in head.state_dict()}
            head.load_state_dict(own)
        if self._shared is not None:
            self._shared.load_state_dict({name: tensors[self._shared_name(name)] for name in ("weight", "bias")})

    def _shared_name(self, name: str) -> str:
        return self._form.tensor_name(f"exit.dense.{name}", 0)  # the same for every exit

    def _each(self) -> list[ExitHead]:
        return cast("list[ExitHead]", list(self.heads))

    def _pool(self, hidden_states: Any, mask_BS: Tensor) -> list[Tensor]:
        keep_BS1 = mask_BS.unsqueeze(-1).to(hidden_states[0].dtype)
        between = hidden_states[1:-1]  # the embeddings and the last layer have no head here
        return [head.pool(hidden_BSH, keep_BS1) for head, hidden_BSH in zip(self._each(), between, strict=True)]

    def _share(self, dense: nn.Module) -> None:
        """Let every head use a module of the model without owning it, so that it is saved once."""
        object.__setattr__(self, "_shared", dense)
        for head in self._each():
            assert isinstance(head.exit, Head)
            del head.exit.dense
            object.__setattr__(head.exit, "dense", dense)


def _dropout_of(config: Any) -> float:
    """Return the dropout that transformers applies before the last layer of the model's own head."""
    if getattr(config, "seq_classif_dropout", None) is not None:  # DistilBERT
        return float(config.seq_classif_dropout)
    own = getattr(config, "classifier_dropout", None)
    return float(config.hidden_dropout_prob if own is None else own)


def _draw(heads: nn.ModuleList, spread: float) -> None:
    """Initialise heads as transformers initialises the model's own head."""
    for module in heads.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=spread)
            nn.init.zeros_(module.bias)
