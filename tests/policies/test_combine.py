from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.errors import UsageError
from offramp.policies import AllOf, AnyOf, Confidence, Evidence, From, FullDepth, Patience, StopAt
from tests.policies.driver import REGRESSION, SINGLE, answers, exits_of, logits, policies, quick, rules

NUM_EXITS = 6
batches = logits(num_exits=NUM_EXITS)


def joined_masks(join, parts, logits_KBC):
    """At each exit, the mask of the joined policy and those of its parts, all of the same rows and history."""
    num_exits, num_rows = logits_KBC.shape[:2]
    deciders = [policy.start(num_rows, num_exits) for policy in (join(parts), *parts)]
    rows = np.arange(num_rows)
    for exit_index in range(1, num_exits + 1):
        evidence = Evidence.from_logits(logits_KBC[exit_index - 1, rows], SINGLE)
        joined, *single = (decider.update(exit_index, evidence) for decider in deciders)
        yield joined.tolist(), np.array(single)
        for decider in deciders:
            decider.keep(~joined)
        rows = rows[~joined]


some_rules = st.lists(rules(NUM_EXITS), min_size=2, max_size=3).map(tuple)


@quick
@given(batches, some_rules)
def test_any_of_leaves_whenever_one_part_would(logits_KBC, parts):
    for joined, single in joined_masks(AnyOf, parts, logits_KBC):
        assert joined == single.any(axis=0).tolist()


@quick
@given(batches, some_rules)
def test_all_of_leaves_when_every_part_would(logits_KBC, parts):
    for joined, single in joined_masks(AllOf, parts, logits_KBC):
        assert joined == single.all(axis=0).tolist()


def test_two_parts_that_fire_together_do_not_cancel():
    assert exits_of(AnyOf((Patience(1), StopAt(2))), answers([[0]] * 4)) == [2]


def test_a_part_counts_while_another_lets_rows_leave():
    sure, unsure = [0.0, 9.0], [0.0, 0.1]
    logits_KBC = np.array([[sure, unsure], [unsure, unsure], [unsure, unsure], [unsure, unsure]])
    assert exits_of(AnyOf((Confidence(0.9), Patience(2))), logits_KBC) == [1, 3]


def test_all_of_waits_for_the_slower_part_from_its_exit_on():
    sure, unsure = [0.0, 9.0], [0.0, 0.1]
    logits_KBC = np.array([[sure, sure], [sure, unsure], [unsure, sure], [unsure, unsure]])
    assert exits_of(AllOf((StopAt(2), Confidence(0.9))), logits_KBC) == [2, 3]


@quick
@given(batches, policies(NUM_EXITS), st.integers(1, NUM_EXITS))
def test_from_leaves_where_a_policy_that_saw_everything_would_next(logits_KBC, policy, exit_index):
    if isinstance(policy, (FullDepth, From)):
        return
    num_rows = logits_KBC.shape[1]
    decider, expected = policy.start(num_rows, NUM_EXITS), [NUM_EXITS] * num_rows
    for k in range(1, NUM_EXITS + 1):
        for row in np.flatnonzero(decider.update(k, Evidence.from_logits(logits_KBC[k - 1], SINGLE))):
            if k >= exit_index:
                expected[row] = min(expected[row], k)
    assert exits_of(From(exit_index, policy), logits_KBC) == expected


@pytest.mark.parametrize(("exit_index", "expected"), [(1, 3), (3, 3), (4, 4), (6, 6)])
def test_from_holds_rows_back_but_not_their_counters(exit_index, expected):
    assert exits_of(From(exit_index, Patience(2)), answers([[0, 1]] * 6)) == [expected] * 2


@quick
@given(batches, policies(NUM_EXITS))
def test_exits_are_between_the_earliest_and_the_last(logits_KBC, policy):
    policy.check(NUM_EXITS, SINGLE)
    for exit_index in exits_of(policy, logits_KBC):
        assert policy.earliest_exit(NUM_EXITS) <= exit_index <= policy.last_exit(NUM_EXITS)


@quick
@given(batches, policies(NUM_EXITS))
def test_evidence_before_the_first_never_matters(logits_KBC, policy):
    assert exits_of(policy, logits_KBC) == exits_of(policy, logits_KBC, first=1)


@quick
@given(batches, policies(NUM_EXITS), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_answer(logits_KBC, policy, random):
    order = list(range(logits_KBC.shape[1]))
    random.shuffle(order)
    exits = exits_of(policy, logits_KBC)
    assert exits_of(policy, logits_KBC[:, order]) == [exits[row] for row in order]


@quick
@given(batches, policies(NUM_EXITS))
def test_a_row_leaves_a_batch_where_it_would_leave_alone(logits_KBC, policy):
    alone = [exits_of(policy, logits_KBC[:, row : row + 1])[0] for row in range(logits_KBC.shape[1])]
    assert exits_of(policy, logits_KBC) == alone


EVER = Patience(math.inf)


@pytest.mark.parametrize(
    ("policy", "first", "earliest", "last"),
    [
        (AnyOf((StopAt(5), Patience(2))), 1, 3, 5),
        (AnyOf((StopAt(3), StopAt(5))), 3, 3, 3),
        (AnyOf((StopAt(3), EVER)), 3, 3, 3),
        (AllOf((StopAt(3), StopAt(5))), 5, 5, 5),
        (AllOf((StopAt(5), Patience(2))), 3, 5, 6),
        (AllOf((Patience(2), Patience(4))), 1, 5, 6),
        (From(4, Confidence(0.9)), 4, 4, 6),
        (From(4, Patience(2)), 2, 4, 6),
        (From(2, Patience(4)), 1, 5, 6),
        (From(4, StopAt(2)), 4, 4, 4),
        (From(4, StopAt(5)), 5, 5, 5),
        (From(4, AnyOf((Confidence(0.9), Patience(1)))), 3, 4, 6),
    ],
    ids=str,
)
def test_which_heads_and_which_stages_are_needed(policy, first, earliest, last):
    assert (policy.first_evidence(6), policy.earliest_exit(6), policy.last_exit(6)) == (first, earliest, last)


@pytest.mark.parametrize(
    "policy", [AnyOf((StopAt(1), Patience(6))), AllOf((Patience(6), StopAt(1))), From(1, Patience(6))], ids=str
)
def test_what_a_part_refuses_is_refused(policy):
    with pytest.raises(UsageError, match="patience:6 can never fire with 6 exits"):
        policy.check(6, SINGLE)
    policy.check(7, SINGLE)


def test_a_part_knows_the_problem():
    for policy in (AnyOf((StopAt(1), Confidence(0.9))), AllOf((Confidence(0.9), StopAt(1))), From(1, Confidence(0.9))):
        with pytest.raises(UsageError, match="needs probabilities"):
            policy.check(6, REGRESSION)


def test_from_an_exit_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match=r"from:7>confidence:0\.9 can never fire with 6 exits"):
        From(7, Confidence(0.9)).check(6, SINGLE)
    From(6, Confidence(0.9)).check(6, SINGLE)


def test_from_counts_from_one():
    with pytest.raises(ValueError, match="exits count from 1"):
        From(0, Patience(3))


PAIR = (Patience(1), StopAt(2))


@pytest.mark.parametrize(
    ("join", "misplaced"),
    [
        *((AllOf, part) for part in (FullDepth(), AllOf(PAIR), AnyOf(PAIR), From(2, StopAt(2)))),
        *((AnyOf, part) for part in (FullDepth(), AnyOf(PAIR), From(2, StopAt(2)))),
    ],
    ids=str,
)
def test_what_the_grammar_cannot_say_cannot_be_joined(join, misplaced):
    with pytest.raises(ValueError, match="cannot be a part of it"):
        join((Patience(1), misplaced))


@pytest.mark.parametrize("inner", [FullDepth(), From(2, StopAt(2))], ids=str)
def test_what_the_grammar_cannot_say_cannot_be_held_back(inner):
    with pytest.raises(ValueError, match="must precede rules"):
        From(1, inner)


@pytest.mark.parametrize("join", [AllOf, AnyOf])
def test_one_part_is_not_joined(join):
    with pytest.raises(ValueError, match="a combination needs at least two parts, got 1"):
        join((Patience(1),))
