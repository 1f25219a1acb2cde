from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.policies import Evidence, Patience
from tests.policies.driver import MULTI, REGRESSION, SINGLE, answers, exits_of, logits, quick

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
