"""The table of all rooms."""

from tests.remedies import adapters, checkpoints, cli, division, runtime, store, sweeps, system, tasks, training

ROOMS = {"store": store, "cli": cli, "runtime": runtime, "tasks": tasks, "checkpoints": checkpoints}
ROOMS |= {"training": training, "division": division, "adapters": adapters, "system": system, "sweeps": sweeps}
TABLE = [entry for room in ROOMS.values() for entry in room.TABLE]
QUICK = (
    "tasks/",
    "units.py",
    "policies/r",
    "policies/g",
    "checkpoints/w",
    "checkpoints/h",
    "experiments/evaluation.py: the model",
)
QUICK += ("training/folders.py", "division/names/", "division/build.py: target", "experiments/tuning.py: no goal")
"""Beginnings of the places whose entries CI carries out, all of them."""
HEAVY = ("training/", "division/", "backends/", "experiments/", "runtime/profile.py", "runtime/inputs.py: {}")
HEAVY += (
    "session/policy_files.py: a deadline",
    "checkpoints/inputs.py: the stages",
    "checkpoints/pickled.py: not a zip",
)
HEAVY += (
    "store/policy_file.py: {} of format",
    "store/policy_file.py: {} with",
    "store/policy_file.py: no {}",
    "checkpoints/config.py: {} is",
    "runtime/weight_plan.py",
)
"""Beginnings of the places whose entries train, measure or export, unless they are quick: `make test-all` does."""
SAMPLE = 6
"""CI carries out every so manieth of the other entries."""
OPEN = ()
"""Remedies without an entry so far, as `test_every_remedy_has_an_entry` prints them."""


def slow_entries():
    """Return the entries that CI leaves to `make test-all`."""
    costly = [entry for entry in TABLE if entry.slow or not entry.place.startswith(QUICK)]
    heavy = [entry for entry in costly if entry.slow or entry.place.startswith(HEAVY)]
    others = [entry for entry in costly if entry not in heavy]
    return [*heavy, *(entry for number, entry in enumerate(others) if number % SAMPLE)]


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
