from __future__ import annotations

import math

import numpy as np
import pytest

from offramp.errors import UsageError
from offramp.policies import Confidence, Entropy, Evidence, Margin
from tests.policies.driver import MULTI, REGRESSION, SINGLE, exits_of

ALL = [Confidence(0.7), Margin(0.7), Entropy(0.7)]


def evidence_of(**scores):
    num_rows = len(next(iter(scores.values())))
    unread = dict.fromkeys(("confidence_B", "entropy_B", "margin_B"), np.full(num_rows, np.nan))
    known = {name: np.array(values) for name, values in scores.items()}
    return Evidence(SINGLE, np.zeros((num_rows, 1), np.int64), **{**unread, **known})


def leaves(policy, evidence):
    return policy.start(evidence.num_rows, 6).update(1, evidence).tolist()


def test_confidence_leaves_at_the_threshold_and_above():
    assert leaves(Confidence(0.5), evidence_of(confidence_B=[0.4, 0.5, 0.6])) == [False, True, True]


def test_margin_leaves_at_the_threshold_and_above():
    assert leaves(Margin(0.5), evidence_of(margin_B=[0.4, 0.5, 0.6])) == [False, True, True]


def test_entropy_leaves_at_the_threshold_and_below():
    assert leaves(Entropy(0.5), evidence_of(entropy_B=[0.4, 0.5, 0.6])) == [True, True, False]


@pytest.mark.parametrize("num_classes", [2, 100])
def test_one_entropy_threshold_means_the_same_for_any_number_of_classes(num_classes):
    # Without the division by log C, nothing of two classes exceeds 0.7 and all of a hundred undecided ones do.
    undecided, sure = np.zeros(num_classes), 30 * np.eye(num_classes)[0]
    assert exits_of(Entropy(0.7), np.array([[undecided, sure]] * 3)) == [3, 1]


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_each_row_leaves_when_it_is_sure(policy):
    sure, unsure = [0.0, 9.0], [0.0, 0.1]
    logits_KBC = np.array([[unsure, sure, unsure], [sure, unsure, unsure], [unsure, unsure, unsure]])
    assert exits_of(policy, logits_KBC) == [2, 1, 3]


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_a_threshold_reads_from_the_first_exit_and_may_reach_the_last(policy):
    assert (policy.first_evidence(6), policy.earliest_exit(6), policy.last_exit(6), policy.lookback) == (1, 1, 6, 0)


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_regression_is_refused_and_classification_is_not(policy):
    with pytest.raises(UsageError, match=f"{policy} needs probabilities.*use patience:P@TAU"):
        policy.check(6, REGRESSION)
    for problem in (SINGLE, MULTI, None):
        policy.check(6, problem)


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_evidence_of_a_regression_is_refused(policy):
    with pytest.raises(ValueError, match="evidence must be of a classification, got a regression"):
        leaves(policy, Evidence.from_logits(np.zeros((1, 1)), REGRESSION))


@pytest.mark.parametrize("policy", [Confidence, Margin])
@pytest.mark.parametrize("threshold", [0, -0.1, 1.001, math.nan, math.inf])
def test_a_probability_lies_above_zero_and_up_to_one(policy, threshold):
    with pytest.raises(ValueError, match="threshold out of range, expected 0 < T <= 1"):
        policy(threshold)
    assert policy(1).threshold == 1


@pytest.mark.parametrize("threshold", [-0.1, 1, 2, math.nan])
def test_an_entropy_threshold_lies_from_zero_to_below_one(threshold):
    with pytest.raises(ValueError, match="threshold out of range, expected 0 <= T < 1"):
        Entropy(threshold)
    assert Entropy(0).threshold == 0
