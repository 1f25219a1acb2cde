"""The loss of a model with exits, as PABEE has it (Zhou et al., "BERT Loses Patience", NeurIPS 2020, section 3.3).

Shapes: B rows, C labels; K exits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from offramp.errors import NonFiniteError


def exit_losses(logits: Sequence[Tensor], labels: Tensor, problem: str) -> list[Tensor]:
    """The mean loss of each exit over a batch.

    Args:
        logits: [B, C] for each exit.
        labels: ids [B] for `single_label_classification` (cross-entropy); 0 and 1 [B, C] for
            `multi_label_classification` (binary cross-entropy); numbers [B] for `regression` (squared error, C = 1).
        problem: as in the model's config.
    """
    if problem == "single_label_classification":
        return [functional.cross_entropy(logits_BC, labels) for logits_BC in logits]
    if problem == "multi_label_classification":
        targets_BC = labels.to(logits[0].dtype)
        return [functional.binary_cross_entropy_with_logits(logits_BC, targets_BC) for logits_BC in logits]
    if problem == "regression":
        targets_B1 = labels.to(logits[0].dtype).reshape(-1, 1)  # [B] against [B, 1] would broadcast to [B, B]
        return [functional.mse_loss(logits_BC, targets_B1) for logits_BC in logits]
    raise ValueError(
        f"problem must be single_label_classification, multi_label_classification or regression: {problem}"
    )


def pabee_loss(losses: Sequence[Tensor]) -> Tensor:
    """`sum k * loss_k / sum k` over exits k = 1..K: deeper exits weigh more, and the last one most."""
    weights_K = torch.arange(1, len(losses) + 1, dtype=losses[0].dtype, device=losses[0].device)
    return (weights_K * torch.stack(list(losses))).sum() / weights_K.sum()


def require_finite(values: Sequence[Tensor], what: str, where: str) -> None:
    """Raise NonFiniteError naming the first exit whose values are not all finite."""
    for number, value in enumerate(values, 1):
        if not torch.isfinite(value).all():
            raise NonFiniteError(f"{what} of exit {number} is not finite", where, "lower the learning rate")
