"""What a plan may take: the least of several limits, and what open engines have reserved."""

from __future__ import annotations

import gc
import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.measure import Memory
from offramp.measure import resident_bytes as resident_of
from offramp.runtime import ledger as ledger_module
from offramp.runtime.ledger import (
    ADDRESS_SPACE,
    BUDGET,
    CONTAINER,
    MEMORY,
    OTHER_BUDGET,
    STACK_BYTES,
    Ledger,
    Limit,
    Share,
    group_bytes,
    group_margin_bytes,
    least_limit,
)

RSS = 50 << 20
SIZES = st.integers(RSS, 1 << 40)


class Owner:
    """An engine and its feed in one."""

    in_memory = 10

    def resident_bytes(self):
        return self.in_memory


@given(budget=st.none() | SIZES, available=SIZES, container=st.none() | SIZES, mappable=st.none() | SIZES)
def test_the_least_limit_decides_and_is_named(budget, available, container, mappable):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "read_memory", lambda: Memory(RSS, RSS, None, None))
        patch.setattr(ledger_module, "available_bytes", lambda: available)
        patch.setattr(ledger_module, "container_bytes", lambda: container)
        patch.setattr(ledger_module, "address_space_bytes", lambda: mappable)
        found = least_limit(budget)
    limits = {BUDGET: budget, MEMORY: available + RSS}
    limits[CONTAINER] = None if container is None else container - group_margin_bytes(container)
    limits[ADDRESS_SPACE] = None if mappable is None else RSS + max(mappable - STACK_BYTES, 0)
    known = {name: size for name, size in limits.items() if size is not None}
    assert found.num_bytes == min(known.values()) == known[found.source]
    assert found.reserved_bytes == 0
    assert found.margin_bytes == (group_margin_bytes(container) if found.source == CONTAINER else 0)


@given(needed=st.integers(1, 1 << 42))
def test_a_container_that_is_named_leaves_what_is_needed_and_no_more(needed):
    least = group_bytes(needed)
    assert least - group_margin_bytes(least) >= needed > least - 1 - group_margin_bytes(least - 1)


SHARES = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.none() | st.integers(1, 5000), st.booleans()), max_size=4
)


@given(shares=SHARES, limit=st.integers(1, 5000), in_memory=st.integers(0, 1000))
def test_what_others_reserve_counts_whether_it_is_in_memory_or_not(shares, limit, in_memory):
    ledger, owners = Ledger(), []
    for weights, activations, budget, measured_later in shares:
        owners.append(Owner())
        owners[-1].in_memory = in_memory
        share = Share(weights, activations, budget, owners[-1].resident_bytes, 2 if measured_later else 0)
        ledger.reserve(owners[-1], share)
    left = ledger.left(Limit(limit), 1)
    assert left.num_bytes == min([limit, *(share[2] for share in shares if share[2] is not None)])
    assert left.source == (BUDGET if left.num_bytes == limit else OTHER_BUDGET)
    assert left.reserved_bytes == sum(weights + activations * later for weights, activations, _, later in shares)
    assert ledger.resident_bytes() == in_memory * len(shares)
    for owner in owners:
        ledger.release(owner)
    assert ledger.left(Limit(limit), 1) == Limit(limit)


def test_an_engine_that_is_gone_reserves_nothing():
    ledger, owner = Ledger(), Owner()
    owner.itself = owner
    ledger.reserve(owner, Share(10, 10, 10, owner.resident_bytes, 0))
    del owner
    gc.collect()
    assert ledger.left(Limit(20), 0) == Limit(20)


def test_a_feed_that_is_gone_before_its_engine_has_nothing_in_memory():
    ledger, owner, feed = Ledger(), Owner(), Owner()
    ledger.reserve(owner, Share(10, 10, 10, feed.resident_bytes, 0))
    assert ledger.resident_bytes() == 10
    del feed
    assert ledger.resident_bytes() == 0


def test_moments_are_in_order():
    ledger = Ledger()
    assert ledger.moment() < ledger.moment() < ledger.moment()


@pytest.mark.parametrize("num_pages", [0, 1, 5])
def test_of_a_mapping_only_touched_pages_are_in_memory(num_pages):
    with mmap.mmap(-1, 8 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
        for page in range(num_pages):
            mapping[page * mmap.PAGESIZE] = 1
        assert resident_of(mapping) == num_pages * mmap.PAGESIZE
