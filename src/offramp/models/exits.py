"""A transformers classifier with an exit after each layer: mean-pooled linear heads, and the forward pass through all.

One shared pooler leaves the shallow exits of small models constant; the mean over tokens with a linear layer for each
exit does not. The last exit is the model's own head, so that what leaves there is what transformers would answer. It
runs every layer and decides nothing.

Shapes: B rows, S tokens, H hidden, C labels; K exits, one a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

FORM = "mean-linear"


class ModelWithExits(nn.Module):
    """A `...ForSequenceClassification` and a head for each layer but the last, whose exit is the model's own head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        config: Any = model.config
        self.model = model
        self.heads = nn.ModuleList(_new_head(config) for _ in range(config.num_hidden_layers - 1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> list[Tensor]:
        """Logits [B, C] of each exit, the shallowest first; `inputs` go to the model."""
        # The mask stays 0 and 1: each model of transformers makes of it what its attention needs.
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **inputs)
        hidden = output.hidden_states[1:-1]  # the embeddings and the last layer have no head here
        pairs = zip(self.heads, hidden, strict=True)
        return [*(head(mean_over_tokens(hidden_BSH, attention_mask)) for head, hidden_BSH in pairs), output.logits]

    def exit_tensors(self) -> dict[str, Tensor]:
        """`exit.K.weight` [C, H] and `exit.K.bias` [C] in float32, K from 1: the content of `exits.safetensors`."""
        return {
            f"exit.{number}.{name}": tensor.to("cpu", torch.float32).contiguous()
            for number, head in enumerate(self.heads, 1)
            for name, tensor in head.state_dict().items()
        }


def mean_over_tokens(hidden_BSH: Tensor, mask_BS: Tensor) -> Tensor:
    """Mean [B, H] over the tokens where the mask is 1."""
    keep_BS1 = mask_BS.unsqueeze(-1).to(hidden_BSH.dtype)
    return (hidden_BSH * keep_BS1).sum(1) / keep_BS1.sum(1)


def _new_head(config: Any) -> nn.Linear:
    """A linear layer that starts as transformers starts the model's own head."""
    head = nn.Linear(config.hidden_size, config.num_labels)
    nn.init.normal_(head.weight, std=config.initializer_range)
    nn.init.zeros_(head.bias)
    return head
