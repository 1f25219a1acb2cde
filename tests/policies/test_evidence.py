from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.policies import Evidence
from tests.policies.driver import MULTI, REGRESSION, SINGLE, quick

rows = st.integers(1, 6).flatmap(
    lambda num: st.lists(st.lists(st.floats(-20, 20), min_size=num, max_size=num), max_size=4)
)


def scores(evidence, row=0):
    return evidence.confidence_B[row], evidence.entropy_B[row], evidence.margin_B[row]


def softmax_by_hand(logits):
    weights = [math.exp(logit) for logit in logits]
    return sorted((weight / math.fsum(weights) for weight in weights), reverse=True)


@quick
@given(rows.filter(len))
def test_single_label_scores_are_those_of_the_softmax(logits):
    evidence = Evidence.from_logits(np.array(logits), SINGLE)
    for row, values in enumerate(logits):
        probabilities = softmax_by_hand(values)
        surprise = math.fsum(-p * math.log(p) for p in probabilities if p > 0)
        entropy = surprise / math.log(len(values)) if len(values) > 1 else 0
        margin = probabilities[0] - probabilities[1] if len(values) > 1 else 1
        assert evidence.answer_BA[row].tolist() == [values.index(max(values))]
        assert scores(evidence, row) == pytest.approx((probabilities[0], entropy, margin), abs=1e-9)
        assert 0 <= evidence.entropy_B[row] <= 1


@quick
@given(rows.filter(len))
def test_multi_label_scores_are_those_of_the_least_sure_label(logits):
    evidence = Evidence.from_logits(np.array(logits), MULTI)
    for row, values in enumerate(logits):
        yes = [1 / (1 + math.exp(-value)) for value in values]
        entropies = [-sum(q * math.log2(q) for q in (p, 1 - p) if q > 0) for p in yes]
        expected = (min(max(p, 1 - p) for p in yes), max(entropies), min(abs(2 * p - 1) for p in yes))
        assert evidence.answer_BA[row].tolist() == [value > 0 for value in values]
        assert scores(evidence, row) == pytest.approx(expected, abs=1e-7)


def test_regression_has_an_answer_and_nothing_else():
    evidence = Evidence.from_logits(np.array([[1.5, -2.0]]), REGRESSION)
    assert evidence.answer_BA.dtype == np.float32 and evidence.answer_BA.tolist() == [[1.5, -2.0]]
    assert (evidence.confidence_B, evidence.entropy_B, evidence.margin_B) == (None, None, None)


@pytest.mark.parametrize(
    ("problem", "dtype", "width"), [(SINGLE, np.int64, 1), (MULTI, bool, 3), (REGRESSION, np.float32, 3)]
)
def test_an_empty_batch_keeps_its_shapes(problem, dtype, width):
    evidence = Evidence.from_logits(np.zeros((0, 3), np.float32), problem)
    assert evidence.num_rows == 0 and evidence.answer_BA.dtype == dtype and evidence.answer_BA.shape == (0, width)
    if problem != REGRESSION:
        assert evidence.confidence_B.shape == evidence.entropy_B.shape == evidence.margin_B.shape == (0,)


@pytest.mark.parametrize("size", [1e4, 3e38])
@pytest.mark.parametrize("problem", [SINGLE, MULTI])
def test_huge_logits_are_sure_and_without_a_warning(problem, size):
    evidence = Evidence.from_logits(np.array([[-size, size]], np.float32), problem)
    assert scores(evidence) == (1, 0, 1)


@pytest.mark.parametrize("num_classes", [2, 3, 5, 7, 8, 12, 100])
def test_equal_logits_have_entropy_one_for_any_number_of_classes(num_classes):
    evidence = Evidence.from_logits(np.full((1, num_classes), 1e4, np.float32), SINGLE)
    assert scores(evidence) == pytest.approx((1 / num_classes, 1, 0), abs=1e-12)
    assert evidence.entropy_B[0] <= 1


def test_rounding_does_not_lift_the_entropy_of_a_label_above_one():
    assert Evidence.from_logits(np.logspace(-12, -5, 1000)[:, np.newaxis], MULTI).entropy_B.max() <= 1


def test_one_class_is_always_sure():
    assert scores(Evidence.from_logits(np.array([[-7.0]]), SINGLE)) == (1, 0, 1)


def test_an_undecided_label_of_several_is_not_sure():
    assert scores(Evidence.from_logits(np.array([[9.0, 0.0, -9.0]]), MULTI)) == pytest.approx((0.5, 1, 0))


def test_equal_logits_give_the_first_class():
    assert Evidence.from_logits(np.array([[0.0, 1.0, 1.0]]), SINGLE).answer_BA.tolist() == [[1]]


def test_half_precision_logits_are_computed_in_double():
    evidence = Evidence.from_logits(np.array([[12.0, 0.0]], np.float16), SINGLE)
    assert evidence.entropy_B.dtype == np.float64
    assert 1 - evidence.confidence_B[0] == pytest.approx(1 / (1 + math.exp(12)), rel=1e-9)


@pytest.mark.parametrize("problem", [SINGLE, MULTI, REGRESSION])
def test_evidence_does_not_share_memory_with_the_logits(problem):
    logits = np.array([[1.0, -1.0]], np.float32)
    evidence = Evidence.from_logits(logits, problem)
    before = evidence.answer_BA.tolist()
    logits[:] = logits[:, ::-1].copy()
    assert evidence.answer_BA.tolist() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("problem", [SINGLE, MULTI, REGRESSION])
def test_logits_that_are_not_finite_are_refused(problem, bad):
    with pytest.raises(ValueError, match="finite"):
        Evidence.from_logits(np.array([[0.0, 1.0], [bad, 1.0]]), problem)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (2, 0)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[B, C\]"):
        Evidence.from_logits(np.zeros(shape), SINGLE)


def test_an_unknown_problem_is_refused():
    with pytest.raises(ValueError, match="'ranking'"):
        Evidence.from_logits(np.zeros((1, 2)), "ranking")
