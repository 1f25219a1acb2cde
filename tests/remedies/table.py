"""The table of all rooms."""

from tests.remedies import checkpoints, cli, division, runtime, store, system, tasks, training

ROOMS = {"store": store, "cli": cli, "runtime": runtime, "tasks": tasks, "checkpoints": checkpoints}
ROOMS |= {"training": training, "division": division, "system": system}
TABLE = [entry for room in ROOMS.values() for entry in room.TABLE]
SLOW = ("training/", "experiments/", "division/", "streaming/", "backends/", "runtime/profile.py", "runtime/inputs.py")
"""Beginnings of the places whose entries train, divide modules or measure: CI carries out every `SAMPLE`-th of them."""
SAMPLE = 10
OPEN = ()
"""Remedies without an entry so far, as `test_every_remedy_has_an_entry` prints them."""


def lacking(places):
    """Return `PLACE => REMEDY` for each remedy of these places without an entry."""
    covered = {
        (place, remedy)
        for entry in TABLE
        for place in entry.places(places)
        for remedy in place.remedies
        if entry.covers(remedy)
    }
    cells = ((place, remedy) for place in places for remedy in place.remedies)
    return [f"{place.key} => {remedy}" for place, remedy in cells if (place, remedy) not in covered]
