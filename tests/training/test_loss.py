import math

import pytest
import torch

from offramp.errors import NonFiniteError
from offramp.training.loss import exit_losses, pabee_loss, require_finite


def test_deeper_exits_weigh_more():
    loss = pabee_loss([torch.tensor(5.0), torch.tensor(2.0), torch.tensor(3.0)])
    assert loss.item() == pytest.approx((1 * 5 + 2 * 2 + 3 * 3) / 6)


def test_one_exit_is_its_own_loss():
    assert pabee_loss([torch.tensor(0.25)]).item() == 0.25


def test_single_label_is_cross_entropy():
    logits = [torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]]), torch.zeros(2, 2)]
    losses = exit_losses(logits, torch.tensor([1, 1]), "single_label_classification")
    by_hand = (-math.log(3 / 4) - math.log(1 / 5)) / 2
    assert [loss.item() for loss in losses] == pytest.approx([by_hand, math.log(2)])
    assert pabee_loss(losses).item() == pytest.approx((by_hand + 2 * math.log(2)) / 3)


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
