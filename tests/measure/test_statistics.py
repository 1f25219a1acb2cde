"""Statistics of rounds: against scipy, by simulation, and the law that a verdict never turns over."""

import numpy as np
import pytest

from offramp.measure import statistics
from offramp.measure.statistics import (
    INCONCLUSIVE,
    MET,
    MISSED,
    Comparison,
    holm,
    median_interval,
    paired_ratio,
    table_verdicts,
    verdict,
)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30])
def test_students_distribution_is_that_of_scipy(freedom):
    from scipy import stats

    for value in (-40.0, -2.776, -0.3, 0.0, 1.5, 12.0):
        assert statistics._student(value, freedom) == pytest.approx(stats.t.cdf(value, freedom), abs=1e-9)
    assert statistics._student_quantile(0.025, freedom) == pytest.approx(stats.t.ppf(0.025, freedom), rel=1e-6)


def test_levels_are_expanded_for_few_samples():
    assert statistics._expanded(0.025, 5) == pytest.approx(0.00095, rel=0.01)
    assert statistics._expanded(0.025, 10_000) == pytest.approx(0.025, rel=0.01)


def test_a_ratio_is_paired_so_that_what_both_share_cancels():
    shared = np.array([[1.0], [5.0], [2.0], [3.0], [9.0]])
    found = paired_ratio(shared, 2 * shared)
    assert found.value == found.low == found.high == pytest.approx(2)
    assert found.p < 0.05 and found.detectable == pytest.approx(0)
    texts = shared * np.linspace(1, 2, 20)
    assert paired_ratio(texts, texts / 4).value == pytest.approx(0.25)


@pytest.mark.parametrize("num_rounds", [1, 4])
def test_few_rounds_have_no_interval_and_no_verdict(num_rounds):
    found = paired_ratio(np.ones((num_rounds, 8)), np.full((num_rounds, 8), 3.0))
    assert found == Comparison(3.0, None, None, None, None)
    assert verdict(found.low, found.high, 1.5) == INCONCLUSIVE


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_values_that_are_no_durations_are_refused(wrong):
    with pytest.raises(ValueError, match="positive finite"):
        paired_ratio(np.array([[1.0], [wrong]]), np.ones((2, 1)))
    with pytest.raises(ValueError, match="one shape"):
        paired_ratio(np.ones((2, 1)), np.ones((3, 1)))


@pytest.mark.parametrize("num_rounds", [5, 10])
def test_equal_sides_are_rarely_called_different(num_rounds):
    """In 100 comparisons without a difference: 5 % by definition."""
    generator = np.random.default_rng(1)
    sides = generator.lognormal(0, 0.05, (100, 2, num_rounds, 1))
    found = [_compared(*pair, 100) for pair in sides]
    assert np.mean([not each.low <= 1 <= each.high for each in found]) <= 0.08
    assert np.mean([each.p < 0.05 for each in found]) <= 0.08


def test_holm_corrects_as_in_the_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_verdicts():
    assert verdict(0.8, 0.9, 1.0) == MET and verdict(1.1, 1.2, 1.0) == MISSED
    assert verdict(0.9, 1.1, 1.0) == INCONCLUSIVE == verdict(None, None, 1.0) == verdict(np.nan, 1.0, 1.0)
    assert verdict(1.0, 1.0, 1.0) == MET, "exactly the target"


@pytest.mark.parametrize("num_rounds", [5, 7, 20])
def test_tables_whose_rows_are_all_at_the_target_are_rarely_decided_anywhere(num_rounds):
    """30 tables of 20 rows; by the interval of each row, 8 tables and more had a row that was met or missed."""
    generator = np.random.default_rng(num_rounds)
    tables = 1.15 * generator.lognormal(0, 0.04, (30, 20, num_rounds))
    decided = [[each for each, _ in _table(rows, 1.15) if each != INCONCLUSIVE] for rows in tables]
    assert sum(map(bool, decided)) <= 0.05 * len(tables)


def test_rows_far_from_the_target_are_decided_in_a_table():
    ratios = np.random.default_rng(0).lognormal(0, 0.02, (20, 7)) * np.array([[0.8], [1.0], [1.25], [1.0]] * 5)
    found = _table(ratios, 1.0)
    assert [each for each, _ in found] == [MET, INCONCLUSIVE, MISSED, INCONCLUSIVE] * 5
    assert all((p <= 0.05) == (each != INCONCLUSIVE) for each, p in found)


def test_rows_that_do_not_vary_or_have_no_interval_correct_nothing():
    """The bytes of each round are equal: exactly the target is met, whatever else is in the table."""
    rows = [[1.0] * 7, [1.001] * 7, [1.0] * 3, [0.9, 0.91, 0.92, 0.89, 0.9, 0.88, 0.9]]
    assert _table(rows, 1.0)[:3] == [(MET, 0.0), (MISSED, 0.0), (INCONCLUSIVE, 1.0)]
    assert table_verdicts([], 1.0) == []


@pytest.mark.parametrize(("num_rounds", "freedom"), [(5, 4), (13, 12), (20, 12)])
def test_the_p_value_of_a_median_has_few_degrees_of_freedom(num_rounds, freedom):
    from scipy import stats

    found = paired_ratio(np.ones((num_rounds, 1)), np.random.default_rng(0).normal(1.1, 0.1, (num_rounds, 1)))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.value - 1) / found.error, freedom), abs=1e-9)
    assert found.p_of(found.value) == 1 > found.p_of(1.0) == found.p


def _table(ratios, at_most):
    return table_verdicts([median_interval(rounds) for rounds in ratios], at_most)


def test_five_repeats_of_a_table_never_turn_a_verdict_over():
    """Rows from clearly met through the target itself to clearly missed; 5 tables of 5 repeats."""
    generator, truths = np.random.default_rng(0), (0.8, 0.93, 0.98, 1.0, 1.02, 1.07, 1.3)
    for _ in range(5):
        for truth in truths:
            verdicts = set()
            for _ in range(5):
                base = generator.lognormal(0, 0.03, (5, 1)) * generator.lognormal(0, 0.2, (5, 1))
                other = truth * base * generator.lognormal(0, 0.03, (5, 1))
                found = _compared(base, other, 150)
                verdicts.add(verdict(found.low, found.high, 1.0))
            assert not {MET, MISSED} <= verdicts, truth


def _compared(base_RU, other_RU, num_draws):
    num_rounds = len(base_RU)
    value, draws = statistics.bootstrap(
        lambda rounds: float(np.median(other_RU[rounds] / base_RU[rounds])), [num_rounds], num_draws
    )
    return statistics.judged(value, np.array(draws), num_rounds, 1.0)


def test_resamples_of_many_rows_are_those_of_few_memory(monkeypatch):
    whole = statistics.resamples(1000, 50)
    monkeypatch.setattr(statistics, "_MOST_INDICES", 7000)
    parts = list(statistics.resampled(1000, 50))
    assert len(parts) == 8 and (np.concatenate(parts) == whole).all()


def test_many_units_are_resampled_with_their_neighbours(monkeypatch):
    """The value is the same, and the interval as wide as that of units one by one."""
    generator = np.random.default_rng(0)
    base_RU, other_RU = generator.gamma(9, size=(2, 7, 1000))
    one_by_one = statistics.paired_ratio(base_RU, other_RU)
    monkeypatch.setattr(statistics, "MOST_UNITS", 150)
    together = statistics.paired_ratio(base_RU, other_RU)
    assert together.value == one_by_one.value
    assert (together.high - together.low) / (one_by_one.high - one_by_one.low) == pytest.approx(1, abs=0.1)
