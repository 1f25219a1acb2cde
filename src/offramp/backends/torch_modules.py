"""Modules of the encoder kernels. Names of their parameters are the inputs of the kernels.

The operations, their order and the layout of their operands are those of transformers' BERT, DistilBERT, RoBERTa, XLM-R
and ELECTRA in evaluation: equal weights, shapes, threads and attention give equal bits. `sizes` are the attributes of a
kernel.

Shapes: B rows, S tokens of the longest row, H hidden, I intermediate, E embedding width, C labels.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.backends.torch_narrow import NarrowLinear, quantise
from offramp.program.heads import HeadForm
from offramp.program.narrow import EXACT, option

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""Function (query, key, value, mask, scale) -> context."""


class Linear(NamedTuple):
    """A kind of linear layers."""

    layer: Callable[[int, int, int], nn.Module]
    """Makes a layer: (inputs, outputs, exact inputs)."""
    prepare: Callable[[Tensor, Mapping], Any]
    """Function of activations and the attributes of a kernel that gives what any number of the layers take."""


FLOAT = Linear(lambda inputs, outputs, exact: nn.Linear(inputs, outputs), lambda x, sizes: x)
NARROW = Linear(NarrowLinear, quantise)


class Embedding(nn.Module):
    """Gathered rows [B, S, E] of each table to hidden [B, S, H]."""

    def __init__(self, sizes: Mapping) -> None:
        super().__init__()
        width, hidden = sizes["embedding_size"], sizes["hidden_size"]
        self.norm = nn.LayerNorm(width, sizes["norm_epsilon"])
        self.project = nn.Linear(width, hidden) if width != hidden else nn.Identity()

    def forward(self, word: Tensor, position: Tensor, type: Tensor | None = None) -> Tensor:
        """Sum (token types before positions), normalise, project."""
        total = word if type is None else word + type
        return self.project(self.norm(total + position))


class Attention(nn.Module):
    """Hidden [B, S, H] and a mask of `make_mask` to hidden."""

    def __init__(self, sizes: Mapping, attend: Attend, linear: Linear = FLOAT) -> None:
        super().__init__()
        size = sizes["hidden_size"]
        self.q, self.k, self.v, self.o = (linear.layer(size, size, 0) for _ in range(4))
        self._prepare, self._sizes = linear.prepare, sizes
        self.norm = nn.LayerNorm(size, sizes["norm_epsilon"])
        self._head_size, self._attend = size // sizes["num_heads"], attend

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Attend, project, add, normalise."""
        prepared = self._prepare(hidden, self._sizes)
        query, key, value = (self._heads(linear(prepared)) for linear in (self.q, self.k, self.v))
        context = self._attend(query, key, value, mask, self._head_size**-0.5)
        return self.norm(self.o(self._prepare(context.transpose(1, 2).reshape(hidden.shape), {})) + hidden)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self._head_size).transpose(1, 2)


class Up(nn.Module):
    """Hidden [B, S, H] to inner [B, S, I]."""

    def __init__(self, sizes: Mapping, linear: Linear = FLOAT) -> None:
        super().__init__()
        self.up = linear.layer(sizes["hidden_size"], sizes["intermediate_size"], 0)
        self._prepare, self._sizes = linear.prepare, sizes
        self._activation = ACTIVATIONS[sizes["activation"]]

    def forward(self, hidden: Tensor) -> Tensor:
        """Widen, activate."""
        return self._activation(self.up(self._prepare(hidden, self._sizes)))


class Down(nn.Module):
    """Inner [B, S, I] and hidden [B, S, H] to hidden."""

    def __init__(self, sizes: Mapping, linear: Linear = FLOAT) -> None:
        super().__init__()
        self.down = linear.layer(sizes["intermediate_size"], sizes["hidden_size"], option(sizes, EXACT))
        self._prepare, self._sizes = linear.prepare, sizes
        self.norm = nn.LayerNorm(sizes["hidden_size"], sizes["norm_epsilon"])

    def forward(self, inner: Tensor, hidden: Tensor) -> Tensor:
        """Narrow, add, normalise."""
        return self.norm(self.down(self._prepare(inner, self._sizes)) + hidden)


class Head(nn.Module):
    """Hidden [B, S, H] to logits [B, C], by the first token."""

    def __init__(self, sizes: Mapping) -> None:
        super().__init__()
        self.dense = nn.Linear(sizes["hidden_size"], sizes["hidden_size"])
        self.out = nn.Linear(sizes["hidden_size"], sizes["num_labels"])
        self._activation = ACTIVATIONS[sizes["activation"]]

    def forward(self, hidden: Tensor) -> Tensor:
        """Two linear layers of the first token, with an activation between them."""
        return self.out(self.activate(hidden[:, 0]))

    def activate(self, first: Tensor) -> Tensor:
        """Return the first layer and its activation, [B, H] to [B, H]."""
        return self._activation(self.dense(first))


class ExitHead(nn.Module):
    """Hidden [B, S, H] and keep [B, S, 1] (1 = token) to logits [B, C], in one of the forms of `program.heads`.

    It is `classify(pool(hidden, keep))`: a head sees of a layer only its pooled values. `sizes` are those of `Head`.
    """

    def __init__(self, sizes: Mapping, form: HeadForm) -> None:
        super().__init__()
        self._pools_mean = form.pool == "mean"
        self.exit = Head(sizes) if form.depth == 2 else nn.Linear(sizes["hidden_size"], sizes["num_labels"])

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Pool, classify."""
        return self.classify(self.pool(hidden, keep))

    def pool(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """Return the mean over tokens, or the first token, [B, H]."""
        return pool(hidden, keep) if self._pools_mean else hidden[:, 0]

    def classify(self, pooled: Tensor, dropout: float = 0.0) -> Tensor:
        """Return logits [B, C]. `dropout` is applied before the last layer, as in transformers' own heads."""
        if isinstance(self.exit, Head):
            return self.exit.out(functional.dropout(self.exit.activate(pooled), dropout, dropout > 0))
        return self.exit(functional.dropout(pooled, dropout, dropout > 0))


def pool(hidden: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return [B, H]: the mean over tokens [B, S, H], or over places of a feature map [B, H, ...].

    With `keep` [B, S, 1], the mean is over the tokens where it is 1, not over padding, where it is 0.
    """
    if keep is not None:
        return (hidden * keep).sum(1) / keep.sum(1)
    if hidden.dim() == 3:
        return hidden.mean(1)
    return hidden.flatten(2).mean(2) if hidden.dim() > 3 else hidden


def make_mask(keep_BS: Tensor, attention: str) -> Tensor | None:
    """Return the mask [B, 1, 1, S] of attention from booleans that are true for tokens.

    It is None where there is no padding, as in transformers: attention is faster without a mask.
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


def _gelu_new(x: Tensor) -> Tensor:
    """Return `gelu_pytorch_tanh` computed with the operations of its first publication: the last bits differ."""
    scale = math.sqrt(2.0 / math.pi)
    return 0.5 * x * (1.0 + torch.tanh(scale * (x + 0.044715 * torch.pow(x, 3.0))))


ATTENTIONS: dict[str, Attend] = {"sdpa": _sdpa, "eager": _eager}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
