"""Losses of a model with exits.

Shapes: B rows, C labels; K exits.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from offramp.errors import NonFiniteError
from offramp.policies.evidence import MULTI_LABEL, REGRESSION, SINGLE_LABEL

TEMPERATURE = 2.0
"""Softmax temperature of the two distributions that distillation compares."""
TEACHER_SHARE = 0.5
"""Weight of the teacher term in the loss of a distilled exit; the labels have the remaining weight."""


def exit_losses(logits: Sequence[Tensor], labels: Tensor, problem: str) -> list[Tensor]:
    """Return the mean loss of each exit over a batch.

    Args:
        logits: [B, C] for each exit.
        labels: ids [B] for `single_label_classification` (cross-entropy); 0 and 1 [B, C] for
            `multi_label_classification` (binary cross-entropy); numbers [B] for `regression` (squared error, C = 1).
        problem: problem type, as in the config of the model.
    """
    if problem == SINGLE_LABEL:
        return [functional.cross_entropy(logits_BC, labels) for logits_BC in logits]
    targets = labels.to(logits[0].dtype)
    if problem == MULTI_LABEL:
        return [functional.binary_cross_entropy_with_logits(logits_BC, targets) for logits_BC in logits]
    if problem == REGRESSION:  # [B] against [B, 1] would broadcast to [B, B]
        return [functional.mse_loss(logits_BC, targets.reshape(-1, 1)) for logits_BC in logits]
    raise ValueError(f"problem must be {SINGLE_LABEL}, {MULTI_LABEL} or {REGRESSION}, got {problem}")


def weighted_loss(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return `sum w_k * loss_k` over exits k = 1..K.

    The weights k / (1 + ... + K) give the loss of PABEE, where deeper exits have larger weights (Zhou et al., "BERT
    Loses Patience", NeurIPS 2020, section 3.3).
    """
    weights_K = torch.tensor(weights, dtype=losses[0].dtype, device=losses[0].device)
    return (weights_K * torch.stack(list(losses))).sum()


def distillation_losses(losses: Sequence[Tensor], logits: Sequence[Tensor], problem: str) -> list[Tensor]:
    """Return the losses of all exits with a distillation term from the last exit.

    The teacher receives no gradient from it.

    Single label: Kullback-Leibler divergence at TEMPERATURE times its square, which preserves the scale of gradients
    (Hinton et al., 2015). Multi label: cross-entropy to the probabilities of the last exit. Regression: squared
    distance.
    """
    teacher_BC = logits[-1].detach()
    distilled = []
    for loss, logits_BC in zip(losses[:-1], logits[:-1], strict=True):
        distance = _divergence(logits_BC, teacher_BC, problem)
        distilled.append((1 - TEACHER_SHARE) * loss + TEACHER_SHARE * distance)
    return [*distilled, losses[-1]]


def _divergence(logits_BC: Tensor, teacher_BC: Tensor, problem: str) -> Tensor:
    if problem == REGRESSION:
        return functional.mse_loss(logits_BC, teacher_BC)
    if problem == MULTI_LABEL:
        return functional.binary_cross_entropy_with_logits(logits_BC, teacher_BC.sigmoid())
    student, teacher = (torch.log_softmax(x / TEMPERATURE, -1) for x in (logits_BC, teacher_BC))
    return TEMPERATURE**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


def require_finite(
    values: Sequence[Tensor], what: str, where: str, first_exit: int = 1, inputs: Mapping[str, Tensor] | None = None
) -> None:
    """Raise NonFiniteError if values are not finite: it names an input that is not, or else the first such exit.

    `values[0]` belongs to `first_exit`; `inputs` are those of the model.
    """
    for number, value in enumerate(values, first_exit):
        if not torch.isfinite(value).all():
            for name, tensor in (inputs or {}).items():
                if not torch.isfinite(tensor).all():
                    remedy = "replace these numbers in the data, or drop their rows"
                    raise NonFiniteError(f"input {name!r} has NaN or infinite numbers", where, remedy)
            raise NonFiniteError(f"{what} of exit {number} is not finite", where, "lower the learning rate")
