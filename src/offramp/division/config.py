"""Options of the verb divide, and the identity of what it builds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offramp import __version__
from offramp.store.manifest import FORMAT

METHODS = ("auto", "names", "eager", "export")


@dataclass(frozen=True)
class DivisionConfig:
    """Options of `offramp.divide`."""

    method: str = "auto"
    """How stages are found.

    `names`: by the names of the tensors, without PyTorch, for text encoders of the BERT family.
    `eager`: by a run, for any model of transformers; `stream` then runs the model's own code.
    `export`: like `eager`, and the stages become graphs, which run without that code and can carry exits.
    `auto`: `names` where possible, else `eager`, with graphs if the model is a classifier and can be exported.
    """
    stage_bytes: int | None = None
    """Most bytes of weights that a stage should need, for a division by a run; None: as much as one of the model's
    blocks."""
    inputs: Mapping[str, Any] | None = None
    """Example inputs by name, for a folder that is divided by a run; None: made up from its config."""
    more_inputs: Sequence[Any] = ()
    """For a module, further examples to prove the division with; none given: the first with another batch size and
    length, where the module takes them."""
    exits: str | os.PathLike | None = None
    """For a module, the run folder that `training.train_exits` wrote; its stages become graphs then. A checkpoint
    folder has its own exits."""
    force: bool = False
    """Replace an existing store."""
    offline: bool = False
    """Take hub models from the cache only."""
    say: Callable[[str], None] = lambda message: None
    """Called with a line for each step, and with warnings (conversion to F32, missing graphs)."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, not {self.method!r}")


def identity(fingerprint: str) -> str:
    """Return what a store is made from and by which version: an interrupted build with the same identity is resumed."""
    return f"{fingerprint} offramp {__version__} format {FORMAT}"
