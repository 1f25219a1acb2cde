"""PyTorch modules of the golden stores. `offramp.stream` builds them by class, so their code must not change."""

import torch
from torch import nn
from torch.nn import functional

WIDTH, LABELS = 8, ("one", "two", "three")


class Block(nn.Module):
    """Residual block: layer norm, two linear layers, GELU."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden):
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))


class Tied(nn.Module):
    """Language model with a tied output matrix, a persistent buffer, a non-persistent buffer and a nested answer."""

    def __init__(self, num_words=20):
        super().__init__()
        self.words = nn.Embedding(num_words, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, num_words, bias=False)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.register_buffer("positions", torch.linspace(0, 1, 16)[:, None], persistent=False)

    def forward(self, ids):
        hidden = self.words(ids) * self.scale + self.shift + self.positions[: ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        return {"logits": self.head(hidden), "hidden": (hidden, None)}


class Sum(nn.Module):
    """Classifier of two named inputs: a vector, and a row number of an embedding table."""

    def __init__(self):
        super().__init__()
        self.table, self.stem = nn.Embedding(20, WIDTH), nn.Linear(4, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, len(LABELS))

    def forward(self, numbers, *, word):
        hidden = self.stem(numbers) + self.table(word)
        for layer in self.layers:
            hidden = layer(hidden)
        return {"answer": self.head(hidden)}
