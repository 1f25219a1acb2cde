from __future__ import annotations

import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.measure import read_memory
from offramp.runtime.slots import EqualSlots, SizedSlots, Slot

PAGE = 4096
SIZES = {"a": PAGE, "b": PAGE, "c": 2 * PAGE, "d": 3 * PAGE, "e": 3 * PAGE}
COUNTED = {"a": 10, "b": 10, "c": 15, "d": 20, "e": 25}
"""`d` and `e` are of one size and count differently."""


def sized(limit_bytes):
    return SizedSlots(SIZES, COUNTED, limit_bytes)


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
    room = EqualSlots(slots)
    taken = [room.take("a"), room.take("b")]
    assert {id(slot) for slot in taken} == {id(slot) for slot in slots}
    assert not room.fits("c")
    room.give(taken[0])
    assert room.fits("c") and room.take("c") is taken[0]


def test_a_lost_equal_slot_is_replaced_and_never_handed_out_again():
    room = EqualSlots([Slot(PAGE)])
    lost = room.take("a")
    room.lose(lost)
    new = room.take("a")
    assert new is not lost and new.num_bytes == lost.num_bytes
    room.clear(None)
    assert room.take("a") is new and not room.fits("b")


def test_equal_slots_are_all_free_after_clear_but_the_one_that_is_being_filled():
    room = EqualSlots([Slot(PAGE) for _ in range(3)])
    filling, *_ = [room.take(name) for name in "abc"]
    room.clear(filling)
    again = [room.take(name) for name in "ab"]
    assert filling not in again and not room.fits("c")
    room.give(filling)
    assert room.take("c") is filling


def test_a_slot_is_used_again_for_the_next_shard_of_its_size():
    room = sized(100)
    first = room.take("a")
    room.give(first)
    assert room.take("b") is first
    room.give(room.take("d"))
    assert room.take("e").num_bytes == SIZES["e"]
    assert room.peak_bytes == 10 + 20 + 25  # the slot of d is free, and counts


def test_free_slots_make_room_before_the_limit_is_passed():
    room = sized(30)
    for name in "abcde":
        slot = room.take(name)
        assert slot.num_bytes == SIZES[name]
        room.give(slot)
    assert room.peak_bytes <= 30


def test_a_lost_slot_counts_no_more_and_its_memory_is_whoever_holds_it():
    room = sized(25)
    lost = room.take("e")
    assert not room.fits("a")
    room.lose(lost)
    assert room.used_bytes == 0 and room.fits("e")
    new = room.take("e")
    assert new is not lost
    alive = weakref.ref(lost)
    del lost
    assert alive() is None


def test_a_slot_that_is_being_filled_is_not_handed_out_after_clear():
    room = sized(20)
    filling = room.take("a")
    room.clear(filling)
    assert room.used_bytes == 10
    assert room.take("b") is not filling
    assert not room.fits("a")
    room.give(filling)
    assert room.take("a") is filling


def test_a_closed_room_holds_no_memory():
    room = sized(100)
    slots = [room.take(name) for name in "abc"]
    room.give(slots[0])
    alive = [weakref.ref(slot) for slot in slots]
    room.close()
    del slots
    assert [ref() for ref in alive] == [None] * 3


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(25, 80))
def test_whatever_comes_and_goes_the_limit_holds_and_no_slot_has_two_users(data, limit_bytes):
    room, used = sized(limit_bytes), []
    for _ in range(data.draw(st.integers(1, 30))):
        name = data.draw(st.sampled_from("abcde"))
        action = data.draw(st.sampled_from(["take", "take", "give", "lose", "clear"]))
        if action == "take" and room.fits(name):
            slot = room.take(name)
            assert slot.num_bytes == SIZES[name] and all(other is not slot for _, other in used)
            used.append((name, slot))
        elif action == "clear":
            used = used[: data.draw(st.integers(0, min(len(used), 1)))]
            room.clear(used[0][1] if used else None)
        elif action in ("give", "lose") and used:
            _, slot = used.pop(data.draw(st.integers(0, len(used) - 1)))
            getattr(room, action)(slot)
        assert room.used_bytes == sum(COUNTED[name] for name, _ in used)
        assert room.used_bytes <= room._held_bytes <= room.peak_bytes <= limit_bytes
        held = [*(slot for _, slot in used), *room._free]
        assert len({id(slot) for slot in held}) == len(held)
        assert room._held_bytes == sum(room._counts[id(slot)] for slot in held)
