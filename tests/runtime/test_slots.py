from __future__ import annotations

import mmap
import resource
import weakref
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.measure import read_memory
from offramp.runtime.slots import AHEAD, Arena, EqualSlots, Slot, assign_offsets, huge_slot, max_buffer_bytes, new_pages
from offramp.store.pages import HUGE_BYTES
from tests.selection import examples

PAGE = 4096


@pytest.mark.parametrize("num_bytes", [4096, 5000, 1 << 20])
def test_a_slot_begins_on_a_page_and_both_views_are_the_same_memory(num_bytes):
    slot = Slot(num_bytes)
    assert slot.array.ctypes.data % 4096 == 0
    assert len(slot.view) == len(slot.array) == slot.num_bytes == num_bytes
    slot.view[1] = 7
    assert slot.array[1] == 7
    slot.array[2] = 9
    assert slot.view[2] == 9


def test_pages_are_taken_when_they_are_touched_and_given_back_with_the_slot():
    before = read_memory().rss_bytes
    slot = Slot(64 << 20)
    assert read_memory().rss_bytes - before < 4 << 20
    slot.array[:] = 1
    assert read_memory().rss_bytes - before > 60 << 20
    del slot
    assert read_memory().rss_bytes - before < 4 << 20


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
@pytest.mark.parametrize("num_bytes", [PAGE, HUGE_BYTES - PAGE, HUGE_BYTES, 2 * HUGE_BYTES + 3 * PAGE])
def test_huge_pages_take_no_more_than_the_slot_has(num_bytes):
    """The end of a slot that fills no huge page is in small ones, and nothing around it can be used."""
    slot = huge_slot(num_bytes)
    assert (slot.num_bytes, len(slot.view)) == (num_bytes, num_bytes)
    is_small = num_bytes < HUGE_BYTES
    assert len(slot.pages) == num_bytes if is_small else slot.address % HUGE_BYTES == 0  # no address space to align it
    slot.view[:] = bytes([7]) * num_bytes
    assert slot.array[-1] == 7
    advised = [(start, end) for start, end, flags in mappings() if "hg" in flags and start <= slot.address < end]
    whole = num_bytes // HUGE_BYTES * HUGE_BYTES
    assert advised in ([], [(slot.address, slot.address + whole)] if whole else [])
    assert bool(advised) is (whole > 0 and Path("/sys/kernel/mm/transparent_hugepage").exists())
    slot.drop_pages()
    assert slot.array[-1] == 0


def test_a_slot_is_made_where_the_kernel_has_no_huge_pages(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)
    assert huge_slot(HUGE_BYTES).num_bytes == HUGE_BYTES


def mappings():
    """Yield (start, end, flags) of the mappings of this process."""
    start = end = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if words[0] == "VmFlags:":
            yield start, end, words[1:]
        elif "-" in words[0]:
            start, end = (int(part, 16) for part in words[0].split("-"))


def test_equal_slots_hand_out_each_slot_once():
    slots = [Slot(PAGE), Slot(PAGE)]
    pool = EqualSlots(slots)
    taken = [pool.acquire("a"), pool.acquire("b")]
    assert {id(slot) for slot in taken} == {id(slot) for slot in slots}
    assert not pool.fits("c")
    pool.release(taken[0])
    assert pool.fits("c") and pool.acquire("c") is taken[0]


def test_a_lost_equal_slot_is_replaced_and_never_handed_out_again():
    pool = EqualSlots([Slot(PAGE)])
    lost = pool.acquire("a")
    pool.discard(lost)
    new = pool.acquire("a")
    assert new is not lost and new.num_bytes == lost.num_bytes
    pool.clear(None)
    assert pool.acquire("a") is new and not pool.fits("b")


def test_equal_slots_are_all_free_after_clear_but_the_one_that_is_being_filled():
    pool = EqualSlots([Slot(PAGE) for _ in range(3)])
    filling, *_ = [pool.acquire(name) for name in "abc"]
    pool.clear(filling)
    again = [pool.acquire(name) for name in "ab"]
    assert filling not in again and not pool.fits("c")
    pool.release(filling)
    assert pool.acquire("c") is filling


def test_slots_on_the_same_pages_lie_where_they_were_put():
    pages = new_pages(4 * PAGE)
    first, second = Slot(PAGE, pages, PAGE), Slot(2 * PAGE, pages, 2 * PAGE)
    assert second.array.ctypes.data - first.array.ctypes.data == PAGE
    first.array[:], second.array[:] = 1, 2
    assert pages[PAGE - 1 : 2 * PAGE + 1] == b"\0" + b"\1" * PAGE + b"\2"
    first.drop_pages()
    assert not first.array.any() and second.array.all()


STAGES = [["a"], ["b", "c"], ["d"], ["b", "e"]]
SIZES = {"a": PAGE, "b": PAGE, "c": 2 * PAGE, "d": 3 * PAGE, "e": 3 * PAGE}
COUNTED = {"a": 10, "b": 10, "c": 15, "d": 20, "e": 25}
"""`d` and `e` are of one size and count differently."""


def arena(limit_bytes, stages=STAGES, sizes=SIZES, counted=COUNTED):
    return Arena(stages, sizes, counted, limit_bytes)


def equal(num_stages, size=PAGE):
    names = [f"s{number}" for number in range(num_stages)]
    return [[name] for name in names], dict.fromkeys(names, size)


def places(pool, slots):
    """(first byte, end) of each."""
    return [(slot.array.ctypes.data, slot.array.ctypes.data + slot.num_bytes) for slot in slots]


def overlap(one, other):
    return one[0] < other[1] and other[0] < one[1]


def test_a_shard_has_one_place_for_good():
    pool = arena(100)
    first = pool.acquire("a")
    pool.release(first)
    assert pool.acquire("a") is first


def test_equal_stages_take_turns_in_two_places():
    stages, sizes = equal(12)
    starts = assign_offsets(stages, sizes, 2 * PAGE)
    order = [starts[name] for name in sizes]
    assert set(order) == {0, PAGE}
    assert all(one != next_one for one, next_one in zip(order, [*order[1:], order[0]], strict=True))


def test_a_small_stage_among_large_ones_costs_no_read_ahead():
    """As of an encoder: embeddings, layers, a pooler, in pool for two layers."""
    names = ["embeddings", *(f"layer{number}" for number in range(6)), "pooler"]
    sizes = dict.fromkeys(names, 28 * PAGE) | {"embeddings": 2 * PAGE, "pooler": 3 * PAGE}
    starts = assign_offsets([[name] for name in names], sizes, 56 * PAGE)
    for one, other in zip(names, [*names[1:], names[0]], strict=True):
        assert not overlap((starts[one], starts[one] + sizes[one]), (starts[other], starts[other] + sizes[other]))


def test_no_page_is_new_after_the_first_pass():
    stages, sizes = equal(6, 256 * PAGE)
    pool = arena(2 * 256 * PAGE, stages, sizes, sizes)
    found = []
    for _ in range(3):
        for name in sizes:
            slot = pool.acquire(name)
            slot.array[:] = 1
            pool.release(slot)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert found[2] - found[1] < 256


def test_what_is_left_of_others_counts_and_is_dropped_where_it_would_be_too_much():
    """Many small shards count little and take a page each; in as many pages lies more of the others."""
    sizes = {"small0": PAGE, "small1": PAGE, "small2": PAGE, "large": PAGE, "next": PAGE}
    counted = {"small0": 1, "small1": 1, "small2": 1, "large": 8, "next": 8}
    pool = arena(8, [[name] for name in sizes], sizes, counted)
    large = pool.acquire("large")
    large.array[:] = 3
    pool.release(large)
    assert (pool.used_bytes, pool.held_bytes) == (0, 8)
    assert pool._starts["large"] != pool._starts["next"]
    pool.acquire("next")
    assert pool.held_bytes == pool.peak_bytes == 8 and not large.array.any()


def test_a_shard_that_was_partly_read_over_counts_in_part():
    sizes = {"large": 4 * PAGE, "small": PAGE}
    pool = arena(4 * PAGE, [["large"], ["small"]], sizes, sizes)
    pool.release(pool.acquire("large"))
    pool.acquire("small")
    assert pool.held_bytes == 3 * PAGE + PAGE


def test_what_lies_in_the_place_of_another_waits_for_it():
    stages, sizes = equal(4)
    pool = arena(2 * PAGE, stages, sizes, sizes)
    first = pool.acquire("s0")
    assert pool.fits("s1") and not pool.fits("s2")
    pool.acquire("s1")
    pool.release(first)
    assert pool.fits("s2") and not pool.fits("s3")


def test_what_finds_no_place_beside_its_stage_gets_a_buffer_for_as_long_as_it_is_used():
    """`kept` lies in the middle between two that are gone, and `wide` fits into neither gap."""
    stages = [["left", "kept", "right"], ["kept", "wide"]]
    sizes = {"left": 2 * PAGE, "kept": PAGE, "right": 2 * PAGE, "wide": 4 * PAGE}
    pool = arena(5 * PAGE, stages, sizes, sizes)
    pool._starts = {"left": 0, "kept": 2 * PAGE, "right": 3 * PAGE}
    for name in ("left", "kept", "right"):
        pool.acquire(name).array[:] = 1
    for name in ("left", "right"):
        pool.release(pool._used[name])
    wide = pool.acquire("wide")
    assert wide.num_bytes == 4 * PAGE
    assert not pool._slots["left"].array.any() and pool._slots["kept"].array.all()  # their pages were given up for it
    gone = weakref.ref(wide.array)
    pool.release(wide)
    del wide
    assert gone() is None


def test_a_lost_place_is_not_written_to_and_the_pages_around_it_are_given_up():
    pool = arena(100)
    before = pool.acquire("a")
    before.array[:] = 7
    pool.release(before)
    lost = pool.acquire("d")
    lost.array[:] = 9
    pool.discard(lost)
    assert pool.used_bytes == 0 and pool.fits("d")
    new = pool.acquire("d")
    new.array[:] = 1
    assert new is not lost and (lost.array == 9).all() and not before.array.any()


def test_a_place_in_use_when_another_is_lost_keeps_its_bytes_until_it_is_given():
    pool = arena(100)
    lost, used = pool.acquire("b"), pool.acquire("c")
    used.array[:] = 5
    pool.discard(lost)
    assert (used.array == 5).all()
    pool.release(used)
    assert not used.array.any()
    assert pool.acquire("c") is not used


def test_what_is_being_filled_is_not_handed_out_after_clear():
    pool = arena(20)
    filling = pool.acquire("a")
    pool.clear(filling)
    assert pool.used_bytes == 10 and not pool.fits("a")
    pool.release(filling)
    assert pool.acquire("a") is filling


def test_a_closed_arena_holds_no_memory():
    pool = arena(100)
    slots = [pool.acquire(name) for name in "abc"]
    alive = [weakref.ref(slot) for slot in slots]
    pool.close()
    del slots
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize(("limit", "pages"), [(25, 4), (35, 5), (45, 6), (80, 10)])
def test_an_arena_is_as_large_as_what_the_limit_lets_be_there_together(limit, pages):
    assert max_buffer_bytes(STAGES, SIZES, COUNTED, limit) == pages * PAGE


@st.composite
def modules(draw):
    """Stages, and the size of each shard in pages; some shards are needed more than once."""
    names = [f"s{number}" for number in range(draw(st.integers(1, 9)))]
    stages = [draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)) for _ in range(6)]
    return stages, {name: PAGE * draw(st.integers(1, 5)) for shards in stages for name in shards}


@settings(max_examples=examples(200), deadline=None)
@given(modules(), st.integers(0, 20))
def test_shards_of_a_stage_lie_apart_and_inside(module, more):
    stages, sizes = module
    num_bytes = max(sum(sizes[name] for name in shards) for shards in stages) + more * PAGE
    starts = assign_offsets(stages, sizes, num_bytes)
    assert all(0 <= start <= num_bytes - sizes[name] and start % PAGE == 0 for name, start in starts.items())
    for shards in stages:
        there = [(starts[name], starts[name] + sizes[name]) for name in shards if name in starts]
        assert not any(overlap(one, other) for i, one in enumerate(there) for other in there[:i])


@settings(max_examples=examples(200), deadline=None)
@given(modules(), st.integers(0, 12))
def test_every_stage_can_be_had_in_a_room_that_holds_the_largest(module, more):
    """Whatever is left over of the stage before, in the order in which a ring asks."""
    stages, sizes = module
    limit = max(sum(sizes[name] for name in shards) for shards in stages) + more * PAGE
    pool = arena(limit, stages, sizes, sizes)
    there: dict[str, Slot] = {}
    for shards in [*stages, *stages]:
        for name in [name for name in there if name not in shards]:
            pool.release(there.pop(name))
        for name in shards:
            if name not in there:
                assert pool.fits(name)
                there[name] = pool.acquire(name)
                there[name].array[:] = len(there)
        spans = places(pool, there.values())
        assert not any(overlap(one, other) for i, one in enumerate(spans) for other in spans[:i])
        assert pool.used_bytes <= pool.held_bytes <= pool.peak_bytes <= limit
    assert pool.num_bytes <= limit


@settings(max_examples=examples(300), deadline=None)
@given(st.data(), st.integers(35, 80))
def test_whatever_comes_and_goes_the_limit_holds_and_no_byte_has_two_users(data, limit_bytes):
    pool, used, lost = arena(limit_bytes), {}, []
    for _ in range(data.draw(st.integers(1, 30))):
        name = data.draw(st.sampled_from("abcde"))
        action = data.draw(st.sampled_from(["acquire", "acquire", "release", "discard", "clear"]))
        if action == "acquire" and pool.fits(name):
            used[name] = pool.acquire(name)
            assert used[name].num_bytes == SIZES[name]
        elif action == "clear":
            kept = data.draw(st.sampled_from([None, *used]))
            pool.clear(used.get(kept))
            used = {kept: used[kept]} if kept else {}
        elif action in ("release", "discard") and name in used:
            slot = used.pop(name)
            getattr(pool, action)(slot)
            lost += [slot] * (action == "discard")
        assert pool.used_bytes == sum(COUNTED[name] for name in used) <= pool.held_bytes
        assert pool.held_bytes <= pool.peak_bytes <= limit_bytes
        spans = places(pool, [*used.values(), *lost])
        assert not any(overlap(one, other) for i, one in enumerate(spans) for other in spans[:i])


def test_far_stages_may_lie_in_one_place():
    stages, sizes = equal(3 * AHEAD)
    assert len(set(assign_offsets(stages, sizes, 4 * PAGE).values())) == 4
