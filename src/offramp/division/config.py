"""Options of the verb divide."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp import __version__
from offramp.runtime.memory_model import SMALL_SHARD_BYTES
from offramp.store import StoreWriter
from offramp.store.manifest import FORMAT, FP32, STORED

LEAST_BLOCK_BYTES = 2 * SMALL_SHARD_BYTES
"""Smallest block: the blocks of a product are larger than half of it, and shards that are smaller stay in memory."""
METHODS = ("auto", "names", "eager", "export")


@dataclass(frozen=True)
class DivisionConfig:
    """Options of `offramp.divide`."""

    method: str = "auto"
    """Method of finding the stages.

    `names`: by the names of the tensors, without PyTorch, for text encoders of the BERT family.
    `eager`: by a run, for any model of transformers; `stream` then runs the model's own code.
    `export`: like `eager`, and the stages become graphs, which run without that code and can carry exits.
    `auto`: `names` where possible, else `eager`, with graphs if the model is a classifier and can be exported.
    """
    stage_bytes: int | None = None
    """Most bytes of weights that a stage should need, for a division by a run; None: as much as one of the model's
    blocks."""
    block_bytes: int | None = None
    """Most bytes of weights that a step of a text encoder, divided by names, should need; larger products are cut into
    blocks of output rows, and transformers cannot load such a store. None: nothing is cut."""
    inputs: Mapping[str, Any] | None = None
    """Example inputs by name, for a folder that is divided by a run; None: made up from its config."""
    more_inputs: Sequence[Any] = ()
    """Further examples to prove the division of a module with; none given: the first one with another batch size and
    length, where the module takes them."""
    exits: str | os.PathLike | None = None
    """Run folder that `training.train_exits` wrote for a module, whose stages become graphs then. A checkpoint folder
    has its own exits."""
    dtype: str = FP32
    """Dtype that matrices of the layers are stored in.

    `fp16`: half the bytes, computed in F32; for text encoders that are divided by names. transformers loads such a
    store.
    `int8`: a quarter of the bytes, computed as products of integers; for all models whose stages become graphs.
    transformers does not load such a store."""
    force: bool = False
    """Replace an existing store."""
    offline: bool = False
    """Take hub models from the cache only."""
    say: Callable[[str], None] = lambda message: None
    """Called with a line for each step, and with warnings (conversion to F32, missing graphs)."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, not {self.method!r}")
        if self.dtype not in STORED:
            raise ValueError(f"dtype must be one of {STORED}, not {self.dtype!r}")
        if self.block_bytes is not None and self.block_bytes < LEAST_BLOCK_BYTES:
            raise ValueError(f"block_bytes must be at least {LEAST_BLOCK_BYTES}, not {self.block_bytes}")

    def writer(self, store: Path, fingerprint: str) -> StoreWriter:
        """Return the writer of a store. An interrupted build of the same source by the same version is resumed."""
        narrow = "" if self.dtype == FP32 else f" {self.dtype}"
        blocks = "" if self.block_bytes is None else f" blocks {self.block_bytes}"
        name = f"{fingerprint} offramp {__version__} format {FORMAT}{narrow}{blocks}"
        return StoreWriter(store, name, force=self.force)
