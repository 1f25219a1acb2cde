"""Rows that leave are taken out of the backend's arrays only if that pays, and nobody can tell from the answers."""

from __future__ import annotations

from itertools import cycle, pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.runtime.gate import ExitStatistics, Gathering
from offramp.runtime.guard import DeadlineGuard
from tests.runtime.driver import answers, batches, encode, expected
from tests.selection import examples
from tests.toy import Toy, ToyBackend, layer_shards, open_engine

quick = settings(
    deadline=None, max_examples=examples(60), database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
POLICIES = ["patience:1", "votes:2", "confidence:0.7", "from:2>entropy:0.6", "margin:0.3|patience:2", "stage:3"]
ROWS = ["abc", "defghijkl", "", "kkkkkkkkkkkk", "lb", "abcdef"]
NEVER, ALWAYS = (False,), (True,)


class Told(Gathering):
    """Gathers where it is told to, and remembers what it was asked and shown."""

    def __init__(self, choices):
        super().__init__()
        self.choices, self.asked, self.layers, self.gatherings = cycle(choices), [], [], []

    def pays(self, num_rows, num_kept, length, num_layers):
        self.asked.append((num_rows, num_kept, length, num_layers))
        return next(self.choices)

    def record_layer(self, num_rows, length, seconds):
        self.layers.append(num_rows)
        assert seconds > 0

    def record_gathering(self, num_kept, length, seconds):
        self.gatherings.append(num_kept)
        assert seconds > 0


def open_told(store, policy, choices, *arguments, **options):
    engine = open_engine(store, policy, *arguments, **options)
    engine.gate.gathering = Told(choices)
    return engine


def counts(engine):
    return engine.gate.exit_statistics.evaluated.tolist(), engine.gate.exit_statistics.exited.tolist()


@quick
@given(data=st.data(), rows=batches, policy=st.sampled_from(POLICIES), toy=st.sampled_from([Toy(), Toy(6)]))
def test_gathered_or_not_answers_exits_and_bytes_are_the_same(shelf, data, rows, policy, toy):
    store = shelf.open(toy)
    residents = data.draw(st.sets(st.sampled_from(["embedding", "head", *layer_shards(store)])))
    drawn = data.draw(st.lists(st.booleans(), min_size=1, max_size=6))
    found = []
    for choices in (ALWAYS, NEVER, drawn):
        engine = open_told(store, policy, choices, 2, residents)
        outcomes = engine.sweep([encode(rows)])
        found.append((answers(outcomes), [outcome.bytes_read for outcome in outcomes], counts(engine)))
        engine.close()
    assert found[0][0] == expected(store, rows, policy)
    assert found[1] == found[0]
    assert found[2] == found[0]
    store.close()


@quick
@given(rows=st.lists(batches, min_size=2, max_size=4), policy=st.sampled_from(POLICIES), drawn=st.lists(st.booleans()))
def test_one_pass_does_not_change_the_next(shelf, rows, policy, drawn):
    store = shelf.open(Toy(6))
    engine = open_told(store, policy, drawn or NEVER, 2)
    for batch in rows:
        assert answers(engine.sweep([encode(batch)], more=True)) == expected(store, batch, policy)
    engine.close()
    store.close()


def test_rows_that_are_not_gathered_are_carried_to_the_end(shelf):
    store = shelf.open(Toy(6))
    exits = [exit_stage for exit_stage, _ in expected(store, ROWS, "patience:1")]
    assert len(set(exits)) >= 3, "rows leave at several exits"
    seen = {}
    for choices in (ALWAYS, NEVER):
        engine = open_told(store, "patience:1", choices)
        engine.sweep([encode(ROWS)])
        engine.close()
        seen[choices] = engine.gate.gathering
    here = [sum(exit_stage >= layer for exit_stage in exits) for layer in range(1, max(exits) + 1)]
    assert seen[ALWAYS].layers == here
    assert seen[ALWAYS].gatherings == [there for before, there in pairwise(here) if there < before]
    assert seen[NEVER].layers == [len(ROWS)] * max(exits)
    assert seen[NEVER].gatherings == []
    assert {rows for rows, *_ in seen[NEVER].asked} == {len(ROWS)}
    assert [kept for _, kept, *_ in seen[NEVER].asked] == [there for there in here[1:] if there < len(ROWS)]


def test_a_batch_of_one_row_is_never_asked_about(shelf):
    store = shelf.open(Toy())
    engine = open_told(store, "patience:1", ALWAYS)
    for row in ROWS:
        engine.sweep([encode([row])])
    engine.close()
    assert engine.gate.gathering.asked == []


class Rotting(ToyBackend):
    """What exits say of the first row is no number from one of them on."""

    def __init__(self, good_exits):
        super().__init__()
        self.good_exits = good_exits

    def exit_logits(self, state, value, weights):
        logits_PC = super().exit_logits(state, value, weights)
        if self.computed.count("exit") > self.good_exits:
            logits_PC[0] = np.nan
        return logits_PC


def test_what_a_row_says_after_it_has_left_is_not_looked_at(shelf):
    store, policy = shelf.open(Toy(6)), "patience:1"
    exits = {row: expected(store, [row], policy)[0][0] for row in ROWS}
    first = min(ROWS, key=exits.__getitem__)
    rows = [first, *(row for row in ROWS if exits[row] > exits[first])]
    assert max(exits.values()) > exits[first] + 1, "exits are asked after it has left"
    engine = open_told(store, policy, NEVER, backend=Rotting(exits[first]))
    assert answers(engine.sweep([encode(rows)])) == expected(store, rows, policy)
    engine.close()


@pytest.mark.parametrize("choices", [ALWAYS, NEVER])
def test_a_deadline_cuts_those_that_are_still_there(shelf, choices):
    store, policy = shelf.open(Toy(6)), "patience:1"
    guard = DeadlineGuard(1e6, lambda to, length: 2e6 if to == 4 else 0.0)
    engine = open_told(store, policy, choices, 2, guard=guard)
    outcomes = engine.sweep([encode(ROWS)])
    engine.close()
    early = [exit_stage <= 3 for exit_stage, _ in expected(store, ROWS, policy)]
    assert any(early) and not all(early)
    assert [not outcome.is_cut for outcome in outcomes] == early
    whole, cut = (expected(store, ROWS, text) for text in (policy, "stage:3"))
    assert answers(outcomes) == [one if left else other for left, one, other in zip(early, whole, cut, strict=True)]


def test_it_is_asked_for_the_layers_that_the_rest_is_likely_to_see(shelf):
    store = shelf.open(Toy(6))
    engine = open_told(store, "patience:1", NEVER)
    engine.gate.exit_statistics.evaluated[:], engine.gate.exit_statistics.exited[:] = 1000, 500
    engine.sweep([encode(ROWS)])
    engine.close()
    num_rows, num_kept, length, num_layers = engine.gate.gathering.asked[0]
    assert (num_rows, length) == (6, 12)
    first = min(exit_stage for exit_stage, _ in expected(store, ROWS, "patience:1"))
    stays = [0.5**layers for layers in range(6 - first)]
    assert num_layers == pytest.approx(sum(1 - (1 - stay) ** num_kept for stay in stays), rel=0.01)


def test_what_was_never_seen_is_tried():
    gathering = Gathering()
    assert gathering.pays(8, 7, 16, 1.0)
    gathering.record_layer(8, 16, 0.008)
    assert gathering.pays(8, 7, 16, 1.0)
    gathering.record_gathering(7, 16, 100.0)
    assert not gathering.pays(8, 7, 16, 1.0)
    assert gathering.pays(8, 3, 16, 1.0), "so few rows were never gathered"
    assert gathering.pays(8, 7, 64, 1.0), "nor were so long ones"


def test_it_pays_if_the_layers_to_come_take_longer_with_the_rows_that_left():
    """A millisecond a row and layer, five to gather."""
    gathering = Gathering()
    for num_rows in (8, 9, 15):
        gathering.record_layer(num_rows, 16, 0.001 * num_rows)
    for num_kept in (4, 5, 7):
        gathering.record_gathering(num_kept, 16, 0.005)
    assert gathering.pays(8, 4, 16, 1.3), "4 rows x 1.3 layers"
    assert not gathering.pays(8, 4, 16, 1.2)
    assert gathering.pays(8, 6, 20, 2.6), "lengths alike share what was seen"
    assert not gathering.pays(8, 6, 20, 2.4)


def test_a_gathering_that_was_slow_once_is_tried_again():
    gathering, asked = Gathering(), 0
    gathering.record_layer(8, 16, 0.008)
    gathering.record_gathering(4, 16, 0.4)
    while not gathering.pays(8, 4, 16, 4.0):
        asked += 1
    assert 50 < asked < 300
    for _ in range(40):
        gathering.record_gathering(4, 16, 0.0001)
    assert gathering.pays(8, 7, 16, 1.0)


def test_layers_ahead_are_those_that_some_row_is_likely_to_see():
    statistics = ExitStatistics(4)
    assert statistics.expected_layers(1, 4, 3) == 3, "no row has exited yet"
    statistics.record(2, np.array([True, True, True, False]))
    assert statistics.expected_layers(1, 4, 1) == pytest.approx(1 + 0.25 + 0.25)
    assert statistics.expected_layers(1, 4, 2) == pytest.approx(1 + 2 * (1 - 0.75**2))
    assert statistics.expected_layers(1, 3, 1) == pytest.approx(1.25)
    assert statistics.expected_layers(2, 4, 1) == 2
    statistics.record(3, np.array([True]))
    assert statistics.expected_layers(2, 4, 5) == 1
