"""The remedy of every message is carried out: each place that refuses and advises has an entry, and each entry leads
where its message says.
"""

import functools
from collections import Counter

import pytest

from offramp import errors
from offramp.checkpoints.weights import STAND_INS
from offramp.runtime.planner import REMEDIES
from tests.remedies.entries import provoke
from tests.remedies.places import House
from tests.remedies.table import OPEN, TABLE, lacking, slow_entries

CARRIED = [entry for entry in TABLE if entry.closed is None]


@functools.cache
def advising():
    """The places that advise something."""
    return [place for place in House().places if place.remedies]


def params():
    numbers, slow = Counter(), slow_entries()
    for entry in CARRIED:
        numbers[entry.id] += 1
        name = entry.id if numbers[entry.id] == 1 else f"{entry.id}-{numbers[entry.id]}"
        yield pytest.param(entry, id=name, marks=pytest.mark.slow if entry in slow else ())


@pytest.mark.parametrize("entry", list(params()))
def test_the_remedy_leads_where_it_says(entry, w):
    (place,) = entry.places(advising())
    seen = provoke(entry, w)
    said = [each.message for each in seen if each.is_at(place)]
    assert said, f"refused elsewhere: {sorted({(each.file, each.line, each.message) for each in seen})[-2:]}"
    assert entry.says in said[-1]
    w.carry_out(entry.act, *([] if isinstance(entry.act, str) else [said[-1]]))
    if entry.again:
        w.carry_out(entry.work)


def test_every_remedy_has_an_entry():
    assert sorted(set(lacking(advising())) - set(OPEN)) == []


def test_every_entry_is_of_one_place_that_advises():
    assert [(entry.place, len(found)) for entry in TABLE if len(found := entry.places(advising())) != 1] == []
    assert [line for line in OPEN if not any(line.startswith(place.key) for place in advising())] == []


def test_every_row_of_the_tables_of_remedies_has_an_entry():
    """Tables that the finder cannot read: errors of the system, files that stand in for a checkpoint's, and limits."""
    rows = [row[-1] for row in errors._SYSTEM] + [errors._OTHER[-1]] + [remedy for _, remedy in STAND_INS.values()]
    rows += REMEDIES.values()
    assert [row for row in rows if not any(entry.says in row for entry in TABLE)] == []


def test_the_finder_sees_what_raises(tmp_path):
    """A place that nothing in the table names is found, however it is written."""
    (tmp_path / "room.py").write_text(
        "from offramp.errors import StoreError\n_AGAIN = 'do it again'\n"
        "def one(x):\n    raise StoreError(f'no {x}', None, _AGAIN)\n"
        "def two(remedy):\n    return StoreError('odd', remedy=remedy)\n"
        "def three():\n    raise two('turn left') or two(f'turn {1}')\n"
        "def four(x):\n    raise ValueError(f'wrong {x}: use 3')\n"
        "def five(x):\n    what, advice = ('a', 'b') if x else ('c', None)\n    raise StoreError(what, x, advice)\n"
        "def six(x):\n    raise ValueError(f'x must be 3, not {x}')\n"
    )
    found = {place.function: (place.what, place.remedies) for place in House(tmp_path).places}
    assert found == {
        "one": ("no {}", ("do it again",)),
        "two": ("odd", ("turn left", "turn {}")),
        "four": ("wrong {}: use 3", ("wrong {}: use 3",)),
        "five": ("a | c", ("b",)),
        "six": ("x must be 3, not {}", ()),
    }
