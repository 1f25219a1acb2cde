"""What stays and what streams: random stages of random shards, and every limit near the smallest one."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import BudgetError
from offramp.runtime.weight_plan import plan_weights, reading_order, slice_bytes, smallest_bytes
from offramp.units import named_size
from tests.selection import examples

NAMES = "abcdefgh"
names = st.sampled_from(NAMES)
stages = st.lists(st.lists(names, unique=True, max_size=4), min_size=1, max_size=7)
sizes = st.fixed_dictionaries({name: st.integers(1, 40) for name in NAMES})
some = st.frozensets(names, max_size=3)
extra = st.integers(0, 200)


def total(shards, of):
    return sum(of[shard] for shard in set(shards))


def two_stages(stages, of, plan):
    """The most that two stages that follow one another stream together, the first behind the last."""
    return max(
        total({*one, *other} - plan.residents - plan.sliced, of)
        for one, other in zip(stages, [*stages[1:], stages[0]], strict=True)
    )


@settings(max_examples=examples(300), deadline=None)
@given(stages, sizes, some, some, extra)
def test_what_stays_and_what_the_largest_stage_streams_fit_in_the_limit(stages, sizes, pinned, sliceable, extra):
    limit = smallest_bytes(stages, sizes, pinned, sliceable) + extra
    plan = plan_weights(stages, sizes, pinned, limit, sliceable)
    assert plan.residents >= pinned
    assert plan.resident_bytes == total(plan.residents, sizes)
    assert plan.resident_bytes + plan.pool_bytes + plan.slice_bytes == limit
    assert all(total(set(shards) - plan.residents - plan.sliced, sizes) <= plan.pool_bytes for shards in stages)
    assert plan.slice_bytes == slice_bytes(plan.sliced, sizes)


@settings(max_examples=examples(300), deadline=None)
@given(stages, sizes, some, extra)
def test_nothing_is_kept_at_the_cost_of_reading_ahead(stages, sizes, pinned, extra):
    """Beyond what must stay, a shard stays where two stages still fit, or where all do."""
    plan = plan_weights(stages, sizes, pinned, smallest_bytes(stages, sizes, pinned) + extra)
    assert plan.residents <= pinned or two_stages(stages, sizes, plan) <= plan.pool_bytes


@settings(max_examples=examples(300), deadline=None)
@given(stages, sizes, some, extra)
def test_no_other_shard_could_stay_as_well(stages, sizes, pinned, extra):
    plan = plan_weights(stages, sizes, pinned, smallest_bytes(stages, sizes, pinned) + extra)
    for shard in {shard for shards in stages for shard in shards} - plan.residents:
        pairs = zip(stages, [*stages[1:], stages[0]], strict=True)
        streamed = max(total({*one, *other} - plan.residents - {shard}, sizes) for one, other in pairs)
        assert plan.resident_bytes + sizes[shard] + streamed > plan.resident_bytes + plan.pool_bytes


@settings(max_examples=examples(200), deadline=None)
@given(stages, sizes, some, some)
def test_the_number_in_a_budget_error_is_the_smallest_limit_that_works(stages, sizes, pinned, sliceable):
    smallest = smallest_bytes(stages, sizes, pinned, sliceable)
    plan_weights(stages, sizes, pinned, smallest, sliceable)
    for limit in {smallest - 1, smallest // 2, 0, -5} - {smallest}:
        with pytest.raises(BudgetError, match=rf"- the smallest weight budget that works is {named_size(smallest)}"):
            plan_weights(stages, sizes, pinned, limit, sliceable)


def test_a_budget_error_names_the_stage_that_needs_most():
    with pytest.raises(BudgetError) as caught:
        plan_weights(["a", "bc", "a"], {"a": 1 << 20, "b": 1 << 20, "c": 2 << 20}, (), 2 << 20)
    assert re.match(
        r"a weight budget of 2\.00 MiB is too small for stage 1 - it needs 3\.00 MiB at once - ", str(caught.value)
    )


def test_a_budget_error_names_what_a_stage_needs_beside_its_own_weights():
    """Else a budget of what the stage needs is too small, and the stage needs just that."""
    with pytest.raises(
        BudgetError, match=r"needs 2\.00 MiB at once, beside 1\.00 MiB of weights that stay in memory or"
    ):
        plan_weights(["a", "b"], {"a": 1 << 20, "b": 2 << 20}, "a", 2 << 20)


@settings(max_examples=examples(200), deadline=None)
@given(stages, st.integers(1, 40), some, extra, extra)
def test_of_equal_shards_more_memory_never_keeps_fewer(stages, size, pinned, extra, more):
    sizes = dict.fromkeys(NAMES, size)
    smallest = smallest_bytes(stages, sizes, pinned)
    less = plan_weights(stages, sizes, pinned, smallest + extra)
    assert plan_weights(stages, sizes, pinned, smallest + extra + more).resident_bytes >= less.resident_bytes


@settings(max_examples=examples(200), deadline=None)
@given(stages, sizes, some, some, extra)
def test_nothing_is_sliced_where_the_whole_fits_and_only_what_may_be(stages, sizes, pinned, sliceable, extra):
    limit = smallest_bytes(stages, sizes, pinned, sliceable) + extra
    plan = plan_weights(stages, sizes, pinned, limit, sliceable)
    assert plan.sliced <= sliceable - pinned
    assert not plan.sliced or smallest_bytes(stages, sizes, pinned) > limit


def test_slices_that_would_cost_more_than_they_save_are_not_made():
    """Sliced, `a` would take a quarter of itself beside `b`, which needs as much as `a` does as a whole."""
    stages, sizes = ["a", "b"], {"a": 100, "b": 100}
    assert smallest_bytes(stages, sizes, (), "a") == 100
    assert plan_weights(stages, sizes, (), 100, "a").sliced == frozenset()


def test_the_largest_is_sliced_first():
    stages, sizes = ["abc"], {"a": 10, "b": 100, "c": 30}
    assert plan_weights(stages, sizes, (), 139, "abc").sliced == {"b"}
    assert plan_weights(stages, sizes, (), 64, "abc").sliced == {"b", "c"}


def test_all_stays_where_all_fits_even_if_two_stages_would_not_stream_beside_it():
    plan = plan_weights(["ab", "bc"], {"a": 5, "b": 5, "c": 5}, (), 15)
    assert plan.residents == {"a", "b", "c"}
    assert plan.pool_bytes == 0


def test_equal_shards_that_stay_lie_evenly_between_those_that_are_read():
    kept = plan_weights(NAMES, dict.fromkeys(NAMES, 10), (), 50).residents
    assert len(kept) == 4
    assert not any({one, other} <= kept for one, other in pairwise(NAMES))


@given(stages)
def test_a_stage_reads_what_the_stage_before_has_not_left_there(stages):
    there = []
    for shards, read in zip(stages, reading_order(stages), strict=True):
        assert set(read) | (set(there) & set(shards)) == set(shards)
        assert not set(read) & set(there)
        there = shards


@settings(max_examples=examples(100), deadline=None)
@given(st.permutations(NAMES), stages, sizes, some, extra)
def test_the_plan_does_not_hang_on_the_order_of_a_set(order, stages, sizes, pinned, extra):
    limit = smallest_bytes(stages, sizes, pinned, NAMES) + extra
    plans = [plan_weights(stages, sizes, pinned, limit, sliceable) for sliceable in (NAMES, order)]
    assert plans[0] == plans[1]
