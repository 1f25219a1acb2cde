import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.measure import median, percentile, wilson_interval

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(VALUES, st.floats(0, 100))
def test_percentile_is_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


@given(VALUES)
def test_median_is_numpys(values):
    assert median(values) == pytest.approx(float(np.median(values)), rel=1e-9, abs=1e-6)


def test_values_are_not_reordered():
    values = [3.0, 1.0, 2.0]
    assert median(values) == 2.0
    assert values == [3.0, 1.0, 2.0]


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="values must not be empty"):
        median([])


@pytest.mark.parametrize("percent", [-1, 100.5, float("nan")])
def test_a_percent_outside_its_range_is_refused(percent):
    with pytest.raises(ValueError, match="percent must lie in"):
        percentile([1.0], percent)


def test_wilson_interval_of_a_known_case():
    # 81 of 263: Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3
    assert wilson_interval(81, 263, z=1.959964) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20, z=1.959964) == pytest.approx((0.0, 0.1611), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(counts):
    successes, n = counts
    for bound in wilson_interval(successes, n):
        error = (successes / n - bound) ** 2 - 1.96**2 * bound * (1 - bound) / n
        assert error == pytest.approx(0, abs=1e-9)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_proportion(counts):
    successes, n = counts
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n + 1e-12
    assert successes / n - 1e-12 <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_counts_are_refused(successes, n):
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        wilson_interval(successes, n)
