"""The planner against brute force: every set of residents with every number of slots."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import BudgetError
from offramp.runtime.ledger import Limit
from offramp.runtime.planner import (
    MAX_SLOTS,
    Item,
    Memory,
    Strategy,
    layers_of,
    make_plan,
    page_rounded,
    pass_seconds,
    too_small,
)
from tests.selection import examples

quick = settings(deadline=None, max_examples=examples(50), database=None)
BASE = Memory(base_bytes=1000 * 4096, activation_bytes=10 * 4096)
costs = st.floats(0.05, 2.0)


@st.composite
def problems(draw, max_shards=7, equal=False):
    """Items of unequal (or equal) size with any costs; no shard is used twice."""
    count = draw(st.integers(2, max_shards))
    sizes = (
        [draw(st.integers(4000, 120_000))] * count
        if equal
        else draw(st.lists(st.integers(4000, 120_000), min_size=count, max_size=count))
    )
    if equal:
        pairs = [(draw(costs), draw(costs))] * count
    else:
        pairs = draw(st.lists(st.tuples(costs, costs), min_size=count, max_size=count))
    return [
        Item(f"s{place:02}", place, size, *pair) for place, (size, pair) in enumerate(zip(sizes, pairs, strict=True))
    ]


def equal_items(count, compute_seconds, read_seconds):
    return [Item(f"s{place:02}", place, 40 * 4096, compute_seconds, read_seconds) for place in range(count)]


def budget_for(items, num_slots, num_residents):
    """What so many slots and residents of equal items take."""
    return BASE.base_bytes + BASE.activation_bytes + (num_slots + num_residents) * page_rounded(items[0].num_bytes)


def sizes_of(items):
    return {item.shard: page_rounded(item.num_bytes) for item in items}


def peak_by_hand(items, memory, residents, num_slots):
    sizes = sizes_of(items)
    slot_bytes = max((size for shard, size in sizes.items() if shard not in residents), default=0)
    return (
        memory.base_bytes + memory.activation_bytes + num_slots * slot_bytes + sum(sizes[shard] for shard in residents)
    )


def every_plan(items, memory):
    """(residents, slots) of every plan there is."""
    names = set(sizes_of(items)) - memory.always_resident
    yield memory.always_resident | names, 0
    for count in range(len(names)):
        for kept in combinations(sorted(names), count):
            for num_slots in range(memory.min_slots, MAX_SLOTS + 1):
                yield memory.always_resident | set(kept), num_slots


def budgets(items):
    """From impossible to more than everything."""
    return st.integers(BASE.base_bytes, BASE.base_bytes + 10 * 4096 + sum(sizes_of(items).values()) + 4096)


@settings(quick, max_examples=examples(150))
@given(st.data(), problems(), st.integers(1, 2))
def test_no_set_of_residents_is_faster(data, items, min_slots):
    memory = replace(
        BASE, always_resident=frozenset(["s01"]) if data.draw(st.booleans()) else frozenset(), min_slots=min_slots
    )
    budget_bytes = data.draw(budgets(items))
    plan = make_plan(items, memory, budget_bytes)
    fitting = [pair for pair in every_plan(items, memory) if peak_by_hand(items, memory, *pair) <= budget_bytes]
    assert plan.feasible == bool(fitting)
    if fitting:
        assert plan.predicted_seconds <= min(pass_seconds(items, *pair) for pair in fitting) * 1.03


@quick
@given(st.data(), problems(12))
def test_a_plan_is_what_it_says(data, items):
    plan = make_plan(items, BASE, data.draw(budgets(items)))
    assert plan.predicted_peak_bytes == peak_by_hand(items, BASE, plan.residents, plan.num_slots)
    assert (
        plan.predicted_peak_bytes
        == BASE.base_bytes + BASE.activation_bytes + plan.num_slots * plan.slot_bytes + plan.resident_bytes
    )
    assert plan.feasible == (plan.predicted_peak_bytes <= plan.budget_bytes)
    assert (plan.num_slots == 0) == (plan.residents == set(sizes_of(items)))
    assert all(size <= plan.slot_bytes for shard, size in sizes_of(items).items() if shard not in plan.residents)


@quick
@given(st.data(), problems())
def test_the_smallest_budget_would_do_and_a_byte_less_would_not(data, items):
    smallest = make_plan(items, BASE, data.draw(budgets(items))).smallest_budget_bytes
    assert make_plan(items, BASE, smallest).feasible
    assert not make_plan(items, BASE, smallest - 1).feasible
    assert smallest == min(peak_by_hand(items, BASE, *pair) for pair in every_plan(items, BASE))


@quick
@given(st.data(), problems(12), problems(12, equal=True))
def test_more_memory_never_gives_a_slower_plan(data, unequal, equal):
    for items in (unequal, equal):
        less, more = sorted(data.draw(st.tuples(budgets(items), budgets(items))))
        before, after = make_plan(items, BASE, less), make_plan(items, BASE, more)
        assert not before.feasible or after.predicted_seconds <= before.predicted_seconds


def test_everything_stays_where_everything_fits():
    items = equal_items(36, 1.0, 1.0)
    plan = make_plan(items, BASE, budget_for(items, 0, 36))
    assert (plan.num_slots, plan.slot_bytes, len(plan.residents)) == (0, 0, 36)
    assert plan.predicted_seconds == pytest.approx(36.0)


@pytest.mark.parametrize(("compute", "read"), [(1.0, 0.1), (0.1, 1.0)])
def test_the_recurrence_by_hand(compute, read):
    items = equal_items(4, compute, read)
    # One slot: read and compute alternate. Two: the longer of both hides the shorter, but for what is read in its way.
    assert pass_seconds(items, frozenset(), 1) == pytest.approx(4 * (compute + read) + 4 * read * 0.15)
    assert pass_seconds(items, frozenset(), 2) == pytest.approx(4 * max(compute, read) + 4 * read * 0.15)
    assert pass_seconds(items, frozenset(item.shard for item in items), 0) == pytest.approx(4 * compute)


def test_with_one_slot_residents_are_spread_evenly():
    """The compute-bound case of the notes: 6 of 12 layers in a row cost 1509 ms, every other layer 1104."""
    items = equal_items(12, 92.0, 81.0)
    plan = make_plan(items, BASE, budget_for(items, 1, 6))
    assert plan.num_slots == 1
    streamed = [item.stage for item in items if item.shard not in plan.residents]
    assert all(later - earlier >= 2 for earlier, later in pairwise(streamed))
    in_a_row = frozenset(item.shard for item in items[:6])
    assert plan.predicted_seconds < 0.8 * pass_seconds(items, in_a_row, 1)


def test_early_exits_pull_residents_to_early_layers():
    items = equal_items(12, 10.0, 81.0)
    leaving = [replace(item, survival=0.7**place) for place, item in enumerate(items)]
    budget_bytes = budget_for(items, 1, 4)

    def mean_place(plan):
        return sum(int(shard[1:]) for shard in plan.residents) / len(plan.residents)

    assert mean_place(make_plan(leaving, BASE, budget_bytes)) < mean_place(make_plan(items, BASE, budget_bytes)) - 1


def test_a_large_shard_is_kept_where_small_slots_save_more():
    items = [Item("large", 1, 100 * 4096, 1.0, 1.0), *(Item(f"s{place}", 2, 4096, 1.0, 1.0) for place in range(12))]
    plan = make_plan(items, Memory(0, 0), 103 * 4096)
    assert (plan.slot_bytes, "large" in plan.residents) == (4096, True)


def test_what_cannot_be_undone_counts():
    items = equal_items(4, 1.0, 1.0)
    late = replace(BASE, start_bytes=budget_for(items, 3, 0))
    assert make_plan(items, late, budget_for(items, 3, 0)).feasible
    plan = make_plan(items, late, budget_for(items, 3, 0) - 1)
    assert not plan.feasible and plan.smallest_budget_bytes == budget_for(items, 3, 0)


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_would_do():
    items = equal_items(4, 1.0, 1.0)
    plan = make_plan(items, BASE, 1 << 20)
    with pytest.raises(
        BudgetError,
        match=r"^budget of 1.00 MiB is too small - process 3.91 MiB \+ activations 40.0 KiB"
        r" \+ one slot for s00 160.0 KiB"
        " - the smallest budget that works is --budget 6MiB$",
    ):
        plan.require_feasible(items)
    assert make_plan(items, BASE, 5 << 20).feasible
    assert not make_plan(items, BASE, 4 << 20).feasible
    make_plan(items, BASE, 5 << 20).require_feasible(items)


@pytest.mark.parametrize(
    ("reserved", "remedy"), [(3 << 20, "close the other engine first"), (1 << 20, "--budget 7MiB")]
)
def test_closing_another_engine_is_advised_where_that_is_enough(reserved, remedy):
    error = too_small(Limit(4 << 20, reserved_bytes=reserved), [("process", 1 << 20)], 6 << 20, option="--budget ")
    assert str(error).endswith(remedy)


def test_many_shards_of_many_sizes_are_planned_all_the_same():
    items = [Item(f"s{place:03}", place, 40_000 + 4096 * (place * 7 % 31), 1.0, 1.0) for place in range(120)]
    total = sum(sizes_of(items).values())
    seconds = [make_plan(items, Memory(0, 0), total * tenths // 10).predicted_seconds for tenths in (1, 5, 9)]
    assert seconds == sorted(seconds, reverse=True) and len(set(seconds)) == 3


@pytest.mark.parametrize(("num_bytes", "rounded"), [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)])
def test_sizes_are_whole_pages(num_bytes, rounded):
    assert page_rounded(num_bytes) == rounded


@pytest.mark.parametrize("residency", ["planned", "prefix", "even"])
@pytest.mark.parametrize("slots", [None, 1, 2, 3, 5])
@settings(quick, max_examples=10)
@given(data=st.data())
def test_a_strategy_restricts_the_plan_and_is_never_faster(residency, slots, data):
    items = data.draw(problems())
    budget_bytes = data.draw(budgets(items))
    plan = make_plan(items, BASE, budget_bytes, Strategy(residency, slots))
    names = list(dict.fromkeys(item.shard for item in items))
    assert plan.num_slots == 0 or slots in (None, plan.num_slots)
    assert (plan.num_slots == 0) == (plan.residents == frozenset(names))
    if residency == "prefix":
        assert plan.residents == frozenset(names[: len(plan.residents)])
    free = make_plan(items, BASE, budget_bytes)
    assert plan.smallest_budget_bytes >= free.smallest_budget_bytes
    assert plan.feasible == (plan.smallest_budget_bytes <= budget_bytes)
    if plan.feasible and slots in (None, 1, 2, 3) and len(names) <= 8:
        assert free.predicted_seconds <= plan.predicted_seconds * (1 + 1e-9)


@pytest.mark.parametrize("residency", ["planned", "prefix", "even"])
@pytest.mark.parametrize("layers", [1, 2, 5])
@settings(quick, max_examples=10)
@given(data=st.data())
def test_layers_bound_the_weights_where_any_plan_can(residency, layers, data):
    items = data.draw(problems())
    plan = make_plan(items, BASE, 1 << 40, Strategy(residency, layers=layers))
    stages = {item.stage: {} for item in items}
    for item in items:
        stages[item.stage][item.shard] = page_rounded(item.num_bytes)
    most = layers * max(sum(sizes.values()) for sizes in stages.values())
    smallest = make_plan(items, BASE, 0, Strategy(residency, layers=layers))
    weights = [each.num_slots * each.slot_bytes + each.resident_bytes for each in (plan, smallest)]
    assert weights[0] <= max(most, weights[1])


@pytest.mark.parametrize("residency", ["fifo", "lru", "mru"])
def test_a_list_has_a_slot_for_each_of_its_layers(residency):
    items = [Item(f"s{number}", 1 + number // 2, 5000 + number, 1e-3, 1e-3) for number in range(8)]
    outside = frozenset(["head"])
    items.append(Item("head", 5, 100, 1e-3, 1e-3))
    merged = layers_of(items, outside)
    assert [(each.shard, each.num_bytes) for each in merged] == [
        ("head", 100),
        *((f"layer {n}", 16384) for n in range(1, 5)),
    ]
    for layers, num_slots in ((None, 1), (3, 3), (9, 4)):
        plan = make_plan(merged, Memory(0, 0, outside), 1 << 40, Strategy(residency, layers=layers))
        assert (plan.num_slots, plan.slot_bytes, plan.residents) == (num_slots, 16384, outside)
        assert plan.predicted_peak_bytes == num_slots * 16384 + 4096 and plan.feasible
