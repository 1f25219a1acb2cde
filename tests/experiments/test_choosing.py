import numpy as np
import pytest

from offramp.experiments.choosing import Candidate, candidates, choose, try_policies
from offramp.policies import parse
from offramp.policies.evidence import REGRESSION, SINGLE_LABEL


def logits_of(answers_KN, sureness):
    return (sureness * np.eye(2)[np.array(answers_KN)]).astype(np.float32)


@pytest.mark.parametrize("problem", [SINGLE_LABEL, REGRESSION])
@pytest.mark.parametrize("num_exits", [2, 3, 6, 12])
def test_every_candidate_is_possible_and_named_once(problem, num_exits):
    found = candidates(num_exits, problem)
    assert len(set(found)) == len(found)
    for policy in found:
        parse(policy).check(num_exits, problem)
        assert parse(policy).earliest_exit(num_exits) < num_exits, policy


def test_a_policy_is_tried_on_what_the_exits_say():
    truth_N = np.array([0, 0, 1, 1])
    logits_KNC = logits_of([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]], 9.0)
    (first, patient) = try_policies(["stage:1", "patience:1"], logits_KNC, truth_N, ("accuracy",), SINGLE_LABEL)
    assert first == Candidate("stage:1", 75.0, 0.0, 1.0)
    assert patient == Candidate("patience:1", 100.0, -25.0, 2.25), "the second row waits, the fourth leaves in time"


def test_the_earliest_that_loses_little_is_chosen_and_the_better_of_two():
    tried = [
        Candidate("late", 90.0, 0.0, 3.0),
        Candidate("early", 89.6, 0.4, 2.0),
        Candidate("as early", 89.8, 0.2, 2.0),
        Candidate("too bad", 89.4, 0.6, 1.0),
    ]
    assert choose(tried).policy == "as early"
    assert choose(tried, allowed_loss=0.1).policy == "late"
    assert choose(tried, allowed_loss=0.6).policy == "too bad", "0.6 points are 0.6 points"
    assert choose(tried[3:]) is None
    assert choose([]) is None
