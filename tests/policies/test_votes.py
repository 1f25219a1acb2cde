import pytest

from offramp.errors import UsageError
from offramp.policies import Votes, parse
from tests.policies.driver import REGRESSION, SINGLE, answers, exits_of


def test_votes_need_not_be_in_a_row():
    labels_KB = [[0, 0, 0, 0], [1, 0, 1, 1], [0, 1, 2, 1], [1, 0, 0, 0], [1, 0, 1, 1]]
    assert exits_of(Votes(2), answers(labels_KB, 3)) == [3, 2, 4, 3]
    assert exits_of(Votes(3), answers(labels_KB, 3)) == [5, 4, 5, 5]


def test_from_does_not_lose_the_first_votes():
    labels_KB = [[0], [0], [1], [0], [1]]
    assert exits_of(parse("from:4>votes:3"), answers(labels_KB)) == [4]


def test_impossible_votes_are_refused():
    with pytest.raises(ValueError, match="votes:1: V must be an integer >= 2"):
        Votes(1)
    with pytest.raises(UsageError, match="votes:7 can never fire with 6 exits - use at most 6"):
        Votes(7).check(6, SINGLE)
    with pytest.raises(UsageError, match="which a regression does not have"):
        Votes(2).check(6, REGRESSION)
