"""Commands that are killed at any call that changes their files are completed by the same command; equal commands leave
equal files. All calls of all verbs: tests/checks/kills.py.
"""

import shutil

import pytest

from tests.cli.kills import CASES, Place, differences

SAMPLE = {"tune": (-1,), "run": (3, -2)}
"""Verb -> places of the kills that CI tries, among all calls of the verb. The last call is the one after which nothing
is left to do.
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where commands run, and are killed."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: kills are not tested")
    with Place(tmp_path_factory.mktemp("kills"), SAMPLE) as place:
        yield place


def problems(place, verb, chosen):
    """What is wrong after each kill; None where nothing is. The kills that did not come count as wrong."""
    undisturbed = place.undisturbed(CASES[verb])
    if undisturbed is None:
        pytest.skip("this user may not trace: kills are not tested")
    tree, paths, calls = undisturbed
    for index in range(len(calls)) if chosen is None else chosen:
        killed, problem = place.kill(CASES[verb], *calls[index], paths, tree)
        yield problem if killed else f"{calls[index]}: not reached"


@pytest.mark.parametrize("verb", SAMPLE)
def test_some_kills(place, verb):
    found = list(problems(place, verb, SAMPLE[verb]))
    assert found == [None] * len(SAMPLE[verb])


@pytest.mark.slow
@pytest.mark.parametrize("verb", CASES)
def test_every_kill(tmp_path, verb):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: kills are not tested")
    with Place(tmp_path, [verb]) as place:
        assert set(problems(place, verb, None)) == {None}


@pytest.mark.slow
@pytest.mark.parametrize("verb", CASES)
def test_equal_commands_leave_equal_files(tmp_path, verb):
    with Place(tmp_path, [verb]) as place:
        one, two = (place.in_new_process(CASES[verb], seed) for seed in (1, 2))
        assert differences(one, two) == []
