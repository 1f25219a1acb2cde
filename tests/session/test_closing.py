"""Closing ends all threads and frees what was opened, however often. `tests/checks/soak.py` does it 1,000 times."""

import gc
from functools import partial

import pytest

import offramp
from tests import opening
from tests.processes import wait_until

FEW = 100
"""Objects in cycles that libraries may leave; two engines that are not freed leave more than a thousand."""


@pytest.mark.parametrize("name", opening.CASES)
def test_closing_leaves_nothing(name, tmp_path):
    """Nor for the collector of cycles, which runs rarely where libraries have made many objects."""
    once = opening.make_case(name, tmp_path)
    for _ in range(2):  # what the first use of the libraries leaves
        once()
    gc.collect()
    before = opening.held()
    gc.disable()
    try:
        once()
        once()
        assert gc.collect() < FEW
    finally:
        gc.enable()
    assert opening.held()[:2] == before[:2]


def test_an_engine_that_is_not_closed_is_seen(tmp_path, monkeypatch):
    """The measurement above can fail."""
    left = []

    class Open:
        def __init__(self, *args, **options):
            left.append(offramp.prepare(*args, **options).open())

        def __enter__(self):
            return left[-1]

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(offramp, "load", Open)
    once = opening.make_case("ort-texts", tmp_path)
    once()
    before = opening.held()
    once()
    after = opening.held()
    monkeypatch.undo()
    for classifier in left:
        classifier.close()
    assert after.threads > before.threads and after.descriptors > before.descriptors


class Open:
    """An engine that is left open."""

    def __init__(self, make, *args, **options):
        self._engine = make(*args, **options)

    def __enter__(self):
        return self._engine.__enter__()

    def __exit__(self, *error):
        pass


@pytest.mark.parametrize("name", ["ort-texts", "numpy-texts", "torch-arrays", "stream", "stream-budget"])
def test_an_engine_that_is_never_closed_is_freed_when_it_is_collected(name, tmp_path, monkeypatch):
    """Held before by its reader thread and by the ledger: a thread, 16 descriptors and the memory of each stayed."""
    monkeypatch.setattr(offramp, "load", partial(Open, offramp.load))
    monkeypatch.setattr(offramp, "stream", partial(Open, offramp.stream))
    once = opening.make_case(name, tmp_path)
    once()
    gc.collect()
    before = opening.held()
    for _ in range(3):
        once()

    def is_freed():
        gc.collect()  # again, since a reader holds its ring while it reads
        return opening.held()[:2] <= before[:2]

    wait_until(is_freed, "threads or descriptors stay")
