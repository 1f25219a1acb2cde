from __future__ import annotations

import pytest

from offramp.measure import read_memory
from offramp.runtime.slots import EqualSlots, Slot, new_pages

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
