from __future__ import annotations

import pytest

from offramp.measure import read_memory
from offramp.runtime.slots import Slot


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
