import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from offramp.policies import FullDepth, Patience, parse, replay
from tests.policies.driver import REGRESSION, SINGLE, answers, exits_of, logits, policies, quick


def test_who_leaves_where():
    labels_KN = [[0, 0, 0, 1], [0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]]
    assert replay(Patience(1), answers(labels_KN), SINGLE).tolist() == [2, 3, 2, 4]
    assert replay(parse("from:3>patience:1"), answers(labels_KN), SINGLE).tolist() == [3, 3, 4, 4]
    assert replay(FullDepth(), answers(labels_KN), SINGLE).tolist() == [4, 4, 4, 4]
    assert replay(parse("stage:2"), answers(labels_KN), SINGLE).tolist() == [2, 2, 2, 2]


def test_nobody_may_be_there():
    assert replay(Patience(1), np.empty((3, 0, 2), np.float32), SINGLE).tolist() == []


def test_regression_agrees_within_tau():
    values_KN1 = np.float32([[1.0, 1.0], [1.05, 1.5], [1.04, 1.55]])[:, :, None]
    assert replay(parse("patience:1@0.1"), values_KN1, REGRESSION).tolist() == [2, 3]


@quick
@given(st.data(), logits(num_exits=4))
def test_a_batch_leaves_where_its_rows_would_leave_alone(data, logits_KNC):
    policy = data.draw(policies(4))
    together = replay(policy, logits_KNC, SINGLE)
    assert together.tolist() == exits_of(policy, logits_KNC)
    alone = [replay(policy, logits_KNC[:, [row]], SINGLE)[0] for row in range(logits_KNC.shape[1])]
    assert together.tolist() == alone
