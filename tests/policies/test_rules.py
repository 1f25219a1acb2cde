from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.policies import Confidence, Entropy, Evidence, FullDepth, Margin, Patience, StopAt, Votes, parse
from tests.policies.driver import MULTI, REGRESSION, SINGLE, answers, exits_of, logits, quick


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


patiences = st.integers(1, 9) | st.just(math.inf)


def pabee(outputs, patience, problem, tau=None):
    """The exit at which one sample leaves, as the paper tells it; `outputs` is a list of lists, one for each exit."""
    agreements, before = 0, None
    for exit_index, output in enumerate(outputs, start=1):
        if problem == REGRESSION:
            answer = output
            same = before is not None and all(abs(answer[i] - before[i]) < tau for i in range(len(answer)))
        else:
            answer = output.index(max(output)) if problem == SINGLE else [value > 0 for value in output]
            same = answer == before
        agreements = agreements + 1 if same else 0
        if agreements == patience:
            return exit_index
        before = answer
    return len(outputs)


def pabee_of_rows(logits_KBC, *arguments):
    return [pabee(logits_KBC[:, row].tolist(), *arguments) for row in range(logits_KBC.shape[1])]


@quick
@given(logits(), patiences, st.sampled_from([SINGLE, MULTI]))
def test_a_batch_leaves_where_each_row_would_leave_alone(logits_KBC, patience, problem):
    assert exits_of(Patience(patience), logits_KBC, problem) == pabee_of_rows(logits_KBC, patience, problem)


@quick
@given(logits(step=0.25), patiences, st.sampled_from([0.25, 0.3, 0.5]))
def test_a_batch_of_regressions_leaves_where_each_row_would_leave_alone(logits_KBC, patience, tau):
    expected = pabee_of_rows(logits_KBC, patience, REGRESSION, tau)
    assert exits_of(Patience(patience, tau), logits_KBC, REGRESSION) == expected


def test_no_row_waits_for_the_slowest_of_its_batch():
    labels_KB = [[0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 1, 0]]
    assert exits_of(Patience(1), answers(labels_KB)) == [2, 3, 4]


def test_a_disagreement_resets_the_counter():
    labels_KB = [[0], [0], [1], [1], [1], [1]]
    assert exits_of(Patience(2), answers(labels_KB)) == [5]


def test_counters_follow_their_rows_when_others_leave():
    # Row 0 leaves at exit 2; row 1 then has to keep its own answer and its own count of 0.
    labels_KB = [[0, 1], [0, 0], [0, 1], [0, 1]]
    assert exits_of(Patience(1), answers(labels_KB)) == [2, 4]


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_the_earliest_exit_is_one_after_the_patience(patience):
    assert exits_of(Patience(patience), answers([[0]] * 6)) == [patience + 1] == [Patience(patience).earliest_exit(6)]


def test_infinite_patience_never_leaves_early_and_needs_no_early_head():
    policy = Patience(math.inf)
    assert exits_of(policy, answers([[0, 1]] * 6), first=1) == [6, 6]
    decider = policy.start(1, 6)
    assert not any(decider.update(k, Evidence.from_logits(np.eye(2)[:1], SINGLE)).any() for k in range(1, 7))
    assert (policy.first_evidence(6), policy.earliest_exit(6), policy.last_exit(6)) == (6, 6, 6)


def test_every_label_has_to_agree():
    almost = np.array([[[1.0, 1.0]], [[1.0, -1.0]], [[1.0, -1.0]]])
    assert exits_of(Patience(1), almost, MULTI) == [3]


def test_every_value_has_to_agree_and_a_distance_of_tau_is_too_far():
    values = np.array([[[0.0, 0.0]], [[0.0, 0.5]], [[0.25, 0.25]]])
    assert exits_of(Patience(1, 0.5), values, REGRESSION) == [3]


@pytest.mark.parametrize(("step", "exit_index"), [(0.09, 2), (-0.09, 2), (0.11, 3), (-0.11, 3)])
def test_tau_is_a_tenth_unless_given(step, exit_index):
    values = np.array([[[1.0]], [[1.0 + step]], [[9.0]]])
    assert exits_of(Patience(1), values, REGRESSION) == [exit_index]


def test_evidence_of_rows_that_were_not_dropped_is_refused():
    decider = Patience(1).start(3, 6)
    decider.update(1, Evidence.from_logits(np.zeros((3, 2)), SINGLE))
    decider.keep(np.array([True, False, False]))
    with pytest.raises(ValueError, match="evidence must have 1 rows, got 3"):
        decider.update(2, Evidence.from_logits(np.zeros((3, 2)), SINGLE))


@pytest.mark.parametrize("problem", [SINGLE, MULTI, REGRESSION, None])
def test_patience_that_can_fire_passes(problem):
    Patience(5).check(6, problem)
    Patience(math.inf).check(6, problem)


@pytest.mark.parametrize("patience", [6, 12])
def test_patience_that_can_never_fire_is_refused(patience):
    with pytest.raises(
        UsageError, match=f"patience:{patience} can never fire with 6 exits - use at most 5, or patience:inf"
    ):
        Patience(patience).check(6, SINGLE)


def test_one_exit_leaves_only_infinite_patience():
    with pytest.raises(UsageError, match="patience:1 can never fire with 1 exit - use patience:inf"):
        Patience(1).check(1, SINGLE)


@pytest.mark.parametrize("problem", [SINGLE, MULTI])
def test_tau_is_refused_where_answers_are_labels(problem):
    with pytest.raises(UsageError, match=r"patience:3@0\.2: @TAU applies to regression only"):
        Patience(3, 0.2).check(6, problem)
    Patience(3, 0.2).check(6, REGRESSION)
    Patience(3, 0.2).check(6, None)


def test_patience_zero_is_refused_with_what_to_use():
    with pytest.raises(ValueError, match=r"use stage:1 .* or none"):
        Patience(0)


@pytest.mark.parametrize("patience", [-1, -math.inf, 10.5, math.nan])
def test_a_patience_that_does_not_count_is_refused(patience):
    with pytest.raises(ValueError, match="P must be an integer >= 1, or inf"):
        Patience(patience)


@pytest.mark.parametrize("tau", [0, -0.1, math.inf, math.nan])
def test_a_tau_that_is_no_distance_is_refused(tau):
    with pytest.raises(ValueError, match="TAU must be finite and > 0"):
        Patience(3, tau)


def test_votes_need_not_be_in_a_row():
    labels_KB = [[0, 0, 0, 0], [1, 0, 1, 1], [0, 1, 2, 1], [1, 0, 0, 0], [1, 0, 1, 1]]
    assert exits_of(Votes(2), answers(labels_KB, 3)) == [3, 2, 4, 3]
    assert exits_of(Votes(3), answers(labels_KB, 3)) == [5, 4, 5, 5]


def test_from_does_not_lose_the_first_votes():
    labels_KB = [[0], [0], [1], [0], [1]]
    assert exits_of(parse("from:4>votes:3"), answers(labels_KB)) == [4]


def test_impossible_votes_are_refused():
    with pytest.raises(ValueError, match="votes:1: V must be an integer >= 2"):
        Votes(1)
    with pytest.raises(UsageError, match="votes:7 can never fire with 6 exits - use at most 6"):
        Votes(7).check(6, SINGLE)
    with pytest.raises(UsageError, match="which a regression does not have"):
        Votes(2).check(6, REGRESSION)
