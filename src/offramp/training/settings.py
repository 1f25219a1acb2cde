"""How exits are trained, and what came of it. Plain data, without torch.

Shapes: K exits, N examples, C outputs of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.store.exits import DEFAULT_FORM, FORMS

LOSSES = ("pabee", "mixed", "distill", "heads-only", "last")
"""`pabee`: the weighted sum over exits (Zhou et al., NeurIPS 2020). `mixed`: the last exit alone for the first half of
the steps, then all (Kubaty et al., ICML 2025). `distill`: all, the shallower ones also after the last (Phuong and
Lampert, ICCV 2019). `last`: plain fine-tuning; leaves no exits. After each of them but `last` the heads are trained on
alone, on the cached hidden states of a model that stays as it is (the second stage of DeeBERT, Xin et al., ACL 2020).
`heads-only`: this alone, for a model that was fine-tuned before."""
PRECISIONS = ("float32", "bfloat16", "float16")
Weights = Callable[[int], Sequence[float]]
WEIGHTS: dict[str, Weights] = {
    "linear": lambda num_exits: range(1, num_exits + 1),
    "equal": lambda num_exits: [1] * num_exits,
}
"""How much each of the losses of K exits counts; they are divided by their sum. `linear` is PABEE's."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to fine-tune: AdamW, a linear warm-up, then a linear decay to zero.

    The defaults are for some thousands of texts. Where a minute on two threads must do, one epoch at 2e-4 (heads: 3e-3)
    brings MiniLM-L6 from 960 articles of BBC News to 0.97 at the last exit and 0.90 at the first.
    """

    loss: str = "pabee"
    """One of LOSSES."""
    heads: str = DEFAULT_FORM
    """One of `store.exits.FORMS`."""
    exit_weights: str | Weights = "linear"
    """A name in WEIGHTS, or a function from the number of exits to the weight of each, the shallowest first."""
    epochs: int = 3
    """Of the whole model; `heads-only` has none of them."""
    heads_epochs: int = 20
    """Of the heads alone, which takes seconds for each thousand of rows; `last` has none of them."""
    learning_rate: float = 5e-5
    """Of the encoder."""
    head_learning_rate: float = 1e-3
    """Of the exits and of the model's own head, which start from random numbers."""
    batch_size: int = 16
    """Rows of a batch on one device."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    max_length: int = 128
    """Tokens; longer texts lose their end."""
    warmup: float = 0.1
    """Share of the steps."""
    weight_decay: float = 0.01
    """Of matrices; biases and norms have none."""
    precision: str = "float32"
    """One of PRECISIONS, for the multiplications (autocast): bfloat16 is twice as fast where the processor has it,
    slower where it has not; float16 needs a GPU."""
    save_steps: int | None = None
    """Steps between checkpoints, from which an interrupted training goes on; None: a fifth of all, at most 500."""
    report_to: str = "none"
    """An integration of transformers, like `tensorboard`."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "learning_rate", "head_learning_rate", "batch_size", "accumulate", "max_length"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, not {getattr(self, name)}")
        if self.heads_epochs < (self.loss == "heads-only"):
            raise ValueError(f"heads_epochs must be at least {int(self.loss == 'heads-only')}, not {self.heads_epochs}")
        if self.save_steps is not None and self.save_steps < 1:
            raise ValueError(f"save_steps must be at least 1, not {self.save_steps}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be from 0 to below 1, not {self.warmup}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, not {self.weight_decay}")
        _require("loss", self.loss, LOSSES)
        _require("heads", self.heads, FORMS)
        _require("precision", self.precision, PRECISIONS)
        if isinstance(self.exit_weights, str):
            _require("exit_weights", self.exit_weights, tuple(WEIGHTS))

    def weights(self, num_exits: int) -> list[float]:
        """The share of each exit in the loss, summing to 1. Raises ValueError for a function that gives others."""
        function = WEIGHTS[self.exit_weights] if isinstance(self.exit_weights, str) else self.exit_weights
        given = [float(weight) for weight in function(num_exits)]
        if len(given) != num_exits or not all(0 <= weight < float("inf") for weight in given) or not sum(given):
            raise ValueError(f"exit_weights must give {num_exits} numbers of at least 0, not all 0; got {given}")
        return [weight / sum(given) for weight in given]


@dataclass(frozen=True, eq=False)
class ExitMetrics:
    """How good each exit is on the examples that were not trained on, the shallowest first; the last is the model."""

    scores: tuple[dict[str, float], ...]
    """Each metric of each exit in percent, and `score`, their mean."""
    logits_KNC: np.ndarray
    """What each exit says of each example, float32: policies are chosen on it. One exit if the others have no heads."""


def _require(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
