"""One module a kind, without weights: its parameters lie on the meta device, under the roles that a store gives them.

The operations, their order and the layout of their operands are those of transformers' BERT, DistilBERT, RoBERTa, XLM-R
and ELECTRA in evaluation: equal weights, shapes, threads and attention give equal bits. Nothing here knows where
weights come from.

Shapes: B rows, S tokens of the longest row, H hidden, I intermediate, E embedding width, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.store import Encoder


class Embedding(nn.Module):
    """Gathered rows, role -> [B, S, E], to hidden [B, S, H]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        width = encoder.embedding_size
        self.norm = nn.LayerNorm(width, encoder.norm_epsilon)
        self.project = nn.Linear(width, encoder.hidden_size) if width != encoder.hidden_size else nn.Identity()

    def forward(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Sum (token types before positions), normalise, project."""
        total = rows["word"] + rows["type"] if "type" in rows else rows["word"]
        return self.project(self.norm(total + rows["position"]))


class Attention(nn.Module):
    """Hidden [B, S, H] and a mask of `make_mask` to hidden."""

    def __init__(self, encoder: Encoder, attend: Attend) -> None:
        super().__init__()
        size = encoder.hidden_size
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        self.norm = nn.LayerNorm(size, encoder.norm_epsilon)
        self._head_size, self._attend = size // encoder.num_heads, attend

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Attend, project, add, normalise."""
        query, key, value = (self._heads(linear(hidden)) for linear in (self.q, self.k, self.v))
        context = self._attend(query, key, value, mask, self._head_size**-0.5)
        return self.norm(self.o(context.transpose(1, 2).reshape(hidden.shape)) + hidden)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self._head_size).transpose(1, 2)


class Up(nn.Module):
    """Hidden [B, S, H] to inner [B, S, I]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.up = nn.Linear(encoder.hidden_size, encoder.intermediate_size)
        self._activation = ACTIVATIONS[encoder.activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """Widen, activate."""
        return self._activation(self.up(hidden))


class Down(nn.Module):
    """Inner [B, S, I] and hidden [B, S, H] to hidden."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.down = nn.Linear(encoder.intermediate_size, encoder.hidden_size)
        self.norm = nn.LayerNorm(encoder.hidden_size, encoder.norm_epsilon)

    def forward(self, inner: Tensor, hidden: Tensor) -> Tensor:
        """Narrow, add, normalise."""
        return self.norm(self.down(inner) + hidden)


class Head(nn.Module):
    """Hidden [B, S, H] to logits [B, C], by the first token."""

    def __init__(self, encoder: Encoder, activation: str) -> None:
        super().__init__()
        self.dense = nn.Linear(encoder.hidden_size, encoder.hidden_size)
        self.out = nn.Linear(encoder.hidden_size, len(encoder.labels))
        self._activation = ACTIVATIONS[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """Two layers and what is between them."""
        return self.out(self.widen(hidden[:, 0]))

    def widen(self, first: Tensor) -> Tensor:
        """The first of the two layers, [B, H] to [B, H]."""
        return self._activation(self.dense(first))


class ExitHead(nn.Module):
    """Hidden [B, S, H] and keep [B, S, 1] (1 = token) to logits [B, C], in a form of `store.exits.FORMS`.

    It is `classify(pool(hidden, keep))`: what is pooled is all that a head ever sees of a layer.
    """

    def __init__(self, encoder: Encoder, form: str) -> None:
        super().__init__()
        self._means = form.startswith("mean")
        if form.endswith("linear"):
            self.exit: nn.Linear | Head = nn.Linear(encoder.hidden_size, len(encoder.labels))
        else:
            assert encoder.head_activation is not None
            self.exit = Head(encoder, encoder.head_activation)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Pool, classify."""
        return self.classify(self.pool(hidden, keep))

    def pool(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """[B, H]: the mean over tokens, or the first of them."""
        return (hidden * keep).sum(1) / keep.sum(1) if self._means else hidden[:, 0]

    def classify(self, pooled: Tensor, dropout: float = 0.0) -> Tensor:
        """[B, C]. `dropout` is that before the last layer, as transformers has it before a model's own."""
        if isinstance(self.exit, Head):
            return self.exit.out(functional.dropout(self.exit.widen(pooled), dropout, dropout > 0))
        return self.exit(functional.dropout(pooled, dropout, dropout > 0))


def build_skeletons(encoder: Encoder, attention: str, exit_form: str | None) -> dict[str, nn.Module]:
    """kind -> skeleton, for every kind that a store of this encoder needs. `attention` is a key of ATTENTIONS."""
    with torch.device("meta"):
        kinds = {
            "embedding": Embedding(encoder),
            "attention": Attention(encoder, ATTENTIONS[attention]),
            "up": Up(encoder),
            "down": Down(encoder),
        }
        if encoder.head_activation is not None:
            kinds["head"] = Head(encoder, encoder.head_activation)
        if exit_form is not None:
            kinds["exit"] = ExitHead(encoder, exit_form)
    return kinds


def make_mask(keep_BS: Tensor, attention: str) -> Tensor | None:
    """What attention is told of padding, from booleans that are true for tokens: [B, 1, 1, S].

    None where there is no padding, as in transformers: attention is faster without a mask.
    """
    if keep_BS.all():
        return None
    keep = keep_BS[:, None, None, :]
    return keep if attention == "sdpa" else torch.where(keep, 0.0, torch.finfo(torch.float32).min)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    if mask is not None:
        mask = mask.expand(-1, -1, query.shape[2], -1)
    return functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)


def _eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if mask is not None:
        scores = scores + mask
    return torch.matmul(functional.softmax(scores, -1), value)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _gelu_new(x: Tensor) -> Tensor:
    """The same function as `_gelu_tanh`, spelt out as its first users did: the last bits differ."""
    scale = math.sqrt(2.0 / math.pi)
    return 0.5 * x * (1.0 + torch.tanh(scale * (x + 0.044715 * torch.pow(x, 3.0))))


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
ATTENTIONS: dict[str, Attend] = {"sdpa": _sdpa, "eager": _eager}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
