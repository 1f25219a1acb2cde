"""Small modules of all the kinds that dividing must cope with, and inputs that they take. All weights are random."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

WIDTH = 16


class Block(nn.Module):
    """A residual block of two linear layers."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden):
        return hidden + self.down(functional.gelu(self.up(self.norm(hidden))))


class Chain(nn.Module):
    """Blocks that follow one another."""

    def __init__(self, num_blocks=4, width=WIDTH):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(num_blocks)])
        self.head = nn.Linear(width, 3)

    def forward(self, hidden):
        hidden = self.first(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Tied(nn.Module):
    """An embedding whose weight is also that of the head; saved and unsaved buffers; a weight without extents."""

    def __init__(self, num_words=50, width=WIDTH):
        super().__init__()
        self.words = nn.Embedding(num_words, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(3)])
        self.head = nn.Linear(width, num_words, bias=False)
        self.head.weight = self.words.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.randn(width))
        self.register_buffer("positions", torch.linspace(0, 1, 32)[:, None], persistent=False)

    def forward(self, ids):
        hidden = self.words(ids) * self.scale + self.shift + self.positions[: ids.shape[1]].to(self.shift.dtype)
        for block in self.blocks:
            hidden = block(hidden)
        return {"logits": self.head(hidden), "hidden": (hidden, None)}


class Shared(nn.Module):
    """One block that is called again and again."""

    def __init__(self, times=3):
        super().__init__()
        self.first, self.block, self.times = nn.Linear(WIDTH, WIDTH), Block(), times

    def forward(self, hidden):
        hidden = self.first(hidden)
        for _ in range(self.times):
            hidden = self.block(hidden)
        return hidden


class Odd(nn.Module):
    """Weights whose bytes fill no whole cache line: what comes behind them in a file begins anywhere."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(13) for _ in range(3)])
        self.empty, self.scalar = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.tensor(0.5))

    def forward(self, hidden):
        for block in self.blocks:
            hidden = block(hidden) * self.scalar + self.empty.sum()
        return hidden


class Routed(nn.Module):
    """Goes another way for inputs whose sum is negative, and may skip a block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.other = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden):
        is_negative = bool(hidden.sum() < 0)
        hidden = self.first(hidden)
        for block in [self.blocks[2], self.blocks[0]] if is_negative else self.blocks:
            hidden = block(hidden)
        return self.other(hidden) if is_negative else hidden


class Keeping(nn.Module):
    """Keeps a view of a weight of an early block and reads it at the end; `only_negative`: not for all inputs."""

    def __init__(self, only_negative=False):
        super().__init__()
        self.blocks, self.only_negative = nn.ModuleList([Block() for _ in range(4)]), only_negative

    def forward(self, hidden):
        is_kept, kept = not self.only_negative or bool(hidden.sum() < 0), None
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if index == 0 and is_kept:
                kept = block.up.weight[:WIDTH]
        return hidden if kept is None else hidden @ kept


class Wide(nn.Module):
    """A layer that is much larger than all others."""

    def __init__(self, num_outputs=400):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, num_outputs)

    def forward(self, hidden):
        return self.last(self.first(hidden))


class Recurrent(nn.Module):
    """Weights that PyTorch's own layers read from a list."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, hidden):
        return self.head(self.gru(self.lstm(hidden)[0])[0])


class Failing(Chain):
    """Raises `self.error` in its third block, if there is one."""

    error = None

    def forward(self, hidden):
        hidden = self.first(hidden)
        for index, block in enumerate(self.blocks):
            weight = block.up.weight  # in the traceback
            hidden = block(hidden)
            if index == 2 and self.error is not None and weight is not None:
                raise self.error
        return self.head(hidden)


class Counting(nn.Module):
    """Counts its calls in a buffer, and adds the count to its answer if `adds`."""

    def __init__(self, adds=False):
        super().__init__()
        self.inner, self.adds = nn.Linear(WIDTH, WIDTH), adds
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)

    def forward(self, hidden):
        self.calls += 1
        self.unsaved += 1
        return self.inner(hidden) + (self.calls if self.adds else 0)


def fast():
    """Layers that PyTorch has a faster way for, if nobody watches."""
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True), 3)


def made(cls, *args, seed=0, **options):
    """One in evaluation mode."""
    torch.manual_seed(seed)
    return cls(*args, **options).eval()


def on_meta(cls):
    """One in evaluation mode, without data.

    PyTorch lists what takes a device where a device is first set. That may be in `from_pretrained` of transformers,
    which replaces `torch.linspace` meanwhile: the list lacks it then, and its tensors have data ever after.
    """
    with torch.device("meta"):
        module = cls().eval()
    for part in module.modules():
        part._buffers.update({name: buffer.to("meta") for name, buffer in part._buffers.items()})
    return module


def vectors(num_rows=2, seed=0, width=WIDTH):
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


def ids(num_rows=2, length=6, seed=0):
    return torch.randint(0, 50, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def rows():
    """[2, 5, WIDTH]"""
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


CASES = {
    "chain": (Chain, vectors()),
    "tied": (Tied, ids()),
    "shared": (Shared, vectors()),
    "odd": (Odd, vectors(width=13)),
    "keeping": (Keeping, vectors()),
    "wide": (Wide, vectors()),
    "recurrent": (Recurrent, rows()),
    "fast": (fast, rows()),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)),
        torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)),
    ),
}
