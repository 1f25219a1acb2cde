from __future__ import annotations

import numpy as np
import pytest

from offramp.errors import UsageError
from offramp.policies import Evidence, FullDepth, StopAt
from tests.policies.driver import REGRESSION, SINGLE, answers, exits_of


def test_none_never_lets_a_row_leave():
    decider = FullDepth().start(2, 4)
    evidence = Evidence.from_logits(np.array([[99.0, 0.0], [0.0, 99.0]]), SINGLE)
    assert not any(decider.update(exit_index, evidence).any() for exit_index in range(1, 5))


def test_none_needs_the_last_head_only():
    policy = FullDepth()
    assert (policy.first_evidence(6), policy.earliest_exit(6), policy.last_exit(6)) == (6, 6, 6)


@pytest.mark.parametrize("exit_index", [1, 2, 4])
def test_stage_lets_every_row_leave_there(exit_index):
    policy = StopAt(exit_index)
    assert (
        exits_of(policy, answers([[0, 1, 0]] * 4))
        == exits_of(policy, answers([[0, 1, 0]] * 4), first=1)
        == [exit_index] * 3
    )


def test_stage_needs_one_head_and_nothing_deeper():
    policy = StopAt(3)
    assert (policy.first_evidence(6), policy.earliest_exit(6), policy.last_exit(6)) == (3, 3, 3)


@pytest.mark.parametrize("problem", [SINGLE, REGRESSION, None])
def test_fixed_depths_fit_every_problem(problem):
    FullDepth().check(1, problem)
    StopAt(6).check(6, problem)


@pytest.mark.parametrize(("num_exits", "text"), [(6, "6 exits"), (1, "1 exit")])
def test_a_stage_that_is_not_there_is_refused(num_exits, text):
    with pytest.raises(UsageError, match=f"stage:7 can never fire with {text} - use at most {num_exits}"):
        StopAt(7).check(num_exits, SINGLE)


@pytest.mark.parametrize("exit_index", [0, -1, 2.5])
def test_exits_count_from_one(exit_index):
    with pytest.raises(ValueError, match="exits count from 1"):
        StopAt(exit_index)
