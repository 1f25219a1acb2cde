"""Settings, options and results of a training. Plain data, without torch.

Shapes: K exits, N examples, C outputs of a head.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.program.heads import DEFAULT_FORM, FORMS

Examples = Sequence[tuple[Any, int | float]]
"""Texts, pairs of texts, images or records of arrays, each with its label."""
LOSSES = ("pabee", "mixed", "distill", "heads-only", "last")
"""Training objectives.

- `pabee`: weighted sum over exits (Zhou et al., NeurIPS 2020).
- `mixed`: the last exit alone for the first half of the steps, then all exits (Kubaty et al., ICML 2025).
- `distill`: all exits, with a distillation term from the last (Phuong and Lampert, ICCV 2019).
- `last`: plain fine-tuning; no exits are saved.
- `heads-only`: heads alone on the frozen model, for a model that was fine-tuned before.

After `pabee`, `mixed` and `distill`, the heads are trained further on cached hidden states of the frozen model (second
stage of DeeBERT, Xin et al., ACL 2020)."""
PRECISIONS = ("float32", "bfloat16", "float16")
"""Autocast types of matrix multiplications."""
Weights = Callable[[int], Sequence[float]]
"""Function from the number of exits to the weight of each, the shallowest first."""
WEIGHTS: dict[str, Weights] = {
    "linear": lambda num_exits: range(1, num_exits + 1),
    "equal": lambda num_exits: [1] * num_exits,
}
"""Weights of the losses of K exits, normalised to sum to 1. `linear` is the scheme of PABEE."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Fine-tuning settings: AdamW, linear warm-up, then linear decay to zero.

    The defaults suit thousands of texts. For a training of one minute on two threads, one epoch at 2e-4 (heads: 3e-3)
    brings MiniLM-L6 on 960 articles of BBC News to an accuracy of 0.97 at the last exit and 0.90 at the first.
    """

    loss: str = "pabee"
    """Training objective, one of LOSSES."""
    heads: str = DEFAULT_FORM
    """Form of the heads, a key of `program.heads.FORMS`."""
    exit_weights: str | Weights = "linear"
    """A name in WEIGHTS, or a function from the number of exits to the weight of each, the shallowest first."""
    epochs: int = 3
    """Epochs of training the whole model; unused by `heads-only`."""
    heads_epochs: int = 20
    """Epochs of training heads on the frozen model, which takes seconds per thousand rows; unused by `last`."""
    learning_rate: float = 5e-5
    """Learning rate of the encoder."""
    head_learning_rate: float = 1e-3
    """Learning rate of the exits and of a new head of the model, which start from random weights."""
    batch_size: int = 16
    """Rows per batch and device."""
    accumulate: int = 1
    """Batches whose gradients are accumulated for one step."""
    max_length: int = 128
    """Maximum length in tokens; longer texts are truncated."""
    warmup: float = 0.1
    """Fraction of the steps with increasing learning rate."""
    weight_decay: float = 0.01
    """Weight decay of matrices; biases and norms have none."""
    precision: str = "float32"
    """One of PRECISIONS, used by autocast for matrix multiplications. bfloat16 is faster only with hardware support;
    float16 needs a GPU."""
    save_steps: int | None = None
    """Steps between checkpoints for resuming; None: a fifth of all steps, at most 500."""
    report_to: str = "none"
    """A reporting integration of transformers, such as `tensorboard`."""
    seed: int = 0
    """Seed of initialisation, dropout and batch order."""

    def __post_init__(self) -> None:
        fewest_heads_epochs, largest_seed = int(self.loss == "heads-only"), 2**32 - 1
        known = {"loss": LOSSES, "heads": tuple(FORMS), "precision": PRECISIONS}
        if isinstance(self.exit_weights, str):
            known["exit_weights"] = tuple(WEIGHTS)
        positive = ("epochs", "learning_rate", "head_learning_rate", "batch_size", "accumulate", "max_length")
        checks = {
            **{name: (getattr(self, name) > 0, "greater than 0") for name in positive},
            "heads_epochs": (self.heads_epochs >= fewest_heads_epochs, f"at least {fewest_heads_epochs}"),
            "save_steps": (self.save_steps is None or self.save_steps >= 1, "at least 1"),
            "seed": (0 <= self.seed <= largest_seed, f"from 0 to {largest_seed}"),
            "warmup": (0 <= self.warmup < 1, "from 0 to below 1"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            **{name: (getattr(self, name) in names, f"one of {', '.join(names)}") for name, names in known.items()},
        }
        for name, (is_possible, expected) in checks.items():
            if not is_possible:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

    def weights(self, num_exits: int) -> list[float]:
        """Return the weight of each exit in the loss, normalised to sum to 1.

        Raises ValueError if a custom function returns invalid weights.
        """
        function = WEIGHTS[self.exit_weights] if isinstance(self.exit_weights, str) else self.exit_weights
        given = [float(weight) for weight in function(num_exits)]
        if len(given) != num_exits or not all(0 <= weight < float("inf") for weight in given) or not sum(given):
            raise ValueError(f"exit_weights must return {num_exits} numbers >= 0 with a positive sum, got {given}")
        return [weight / sum(given) for weight in given]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `train_exits`."""

    settings: TrainSettings | None = None
    """Training settings; None for the defaults of `TrainSettings`."""
    metrics: Sequence[str] = ()
    """Keys of `tasks.metrics.METRICS`. Default: accuracy, or Pearson and Spearman."""
    data: Mapping[str, Any] | None = None
    """Description of the examples in JSON, kept in `train.json` and part of the configuration."""
    progress: Callable[[str], None] = lambda line: None
    """Called with about twenty lines of text."""


@dataclass(frozen=True, eq=False)
class ExitMetrics:
    """Scores of each exit on the examples that were not used for training, the shallowest first.

    The last is the model.
    """

    scores: tuple[dict[str, float], ...]
    """Metrics of each exit in percent, and `score`, their mean."""
    logits_KNC: np.ndarray
    """Logits of each exit on each example, float32, for choosing policies. A single exit if there are no heads."""


def is_first_process() -> bool:
    """Return whether this process writes and prints: the only one, or the first of those started by torchrun."""
    return os.environ.get("RANK", "0") == "0"
