import math

import pytest
import torch

from offramp.errors import NonFiniteError
from offramp.training.loss import distillation_losses, exit_losses, require_finite, weighted_loss
from offramp.training.settings import TrainSettings


def test_deeper_exits_weigh_more():
    loss = weighted_loss([torch.tensor(5.0), torch.tensor(2.0), torch.tensor(3.0)], TrainSettings().weights(3))
    assert loss.item() == pytest.approx((1 * 5 + 2 * 2 + 3 * 3) / 6)


def test_one_exit_is_its_own_loss():
    assert weighted_loss([torch.tensor(0.25)], TrainSettings().weights(1)).item() == 0.25


def test_a_distilled_exit_learns_half_of_what_the_last_says():
    logits = [
        torch.tensor([[0.0, 0.0]], requires_grad=True),
        torch.tensor([[2 * math.log(3), 0.0]], requires_grad=True),
    ]
    losses = exit_losses(logits, torch.tensor([1]), "single_label_classification")
    shallow, last = distillation_losses(losses, logits, "single_label_classification")
    divergence = 3 / 4 * math.log(3 / 4 * 2) + 1 / 4 * math.log(1 / 4 * 2)  # at temperature 2 the last says 3 : 1
    assert shallow.item() == pytest.approx(0.5 * math.log(2) + 0.5 * 4 * divergence)
    assert last is losses[-1]
    shallow.backward()
    assert logits[0].grad.abs().max() > 0
    assert logits[1].grad is None, "the last exit does not learn from the others"


@pytest.mark.parametrize(
    ("problem", "labels", "far"),
    [
        ("regression", torch.tensor([2.0]), (0.0 - 1.0) ** 2),
        ("multi_label_classification", torch.tensor([[1.0]]), math.log(2)),
    ],
)
def test_distilling_other_problems(problem, labels, far):
    logits = [torch.tensor([[0.0]]), torch.tensor([[1.0]])]
    losses = exit_losses(logits, labels, problem)
    shallow, _ = distillation_losses(losses, logits, problem)
    assert shallow.item() == pytest.approx(0.5 * losses[0].item() + 0.5 * far)


def test_single_label_is_cross_entropy():
    logits = [torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]]), torch.zeros(2, 2)]
    losses = exit_losses(logits, torch.tensor([1, 1]), "single_label_classification")
    by_hand = (-math.log(3 / 4) - math.log(1 / 5)) / 2
    assert [loss.item() for loss in losses] == pytest.approx([by_hand, math.log(2)])


def test_multi_label_is_binary_cross_entropy():
    logits = [torch.tensor([[math.log(3), 0.0]])]
    (loss,) = exit_losses(logits, torch.tensor([[1, 0]]), "multi_label_classification")
    assert loss.item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 2)) / 2)


def test_regression_is_squared_error_row_by_row():
    logits = [torch.tensor([[1.0], [5.0]])]
    (loss,) = exit_losses(logits, torch.tensor([2.0, 5.0]), "regression")
    assert loss.item() == pytest.approx(0.5)


def test_unknown_problem_is_named():
    with pytest.raises(ValueError, match="ranking"):
        exit_losses([torch.zeros(1, 2)], torch.tensor([0]), "ranking")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_first_exit_that_is_not_finite_is_named(bad):
    with pytest.raises(NonFiniteError, match="loss of exit 2 is not finite - step 7"):
        require_finite([torch.tensor(1.0), torch.tensor(bad), torch.tensor(bad)], "loss", "step 7")


def test_the_number_of_the_first_exit_can_be_given():
    with pytest.raises(NonFiniteError, match="loss of exit 6 is not finite"):
        require_finite([torch.tensor(math.nan)], "loss", "step 7", first_exit=6)
