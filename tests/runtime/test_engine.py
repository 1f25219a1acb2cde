"""The engine's answers: the same, bit for bit, whatever is resident, read ahead, read how, or beside in the batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.errors import NonFiniteError, StoreError, UsageError
from offramp.runtime.guard import NO_DEADLINE, DeadlineGuard
from offramp.runtime.run_plan import choose_reads
from tests.runtime.driver import answers, batches, encode, expected
from tests.selection import examples
from tests.toy import Toy, layer_shards, open_engine, token_batch

quick = settings(
    deadline=None, max_examples=examples(60), database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
policies = st.sampled_from(
    [
        "none",
        "patience:1",
        "patience:2",
        "patience:inf",
        "stage:1",
        "stage:3",
        "confidence:0.7",
        "from:2>entropy:0.6",
        "stage:4",
    ]
)
TOYS = [Toy(), Toy(shared=True), Toy(whole=True)]
ROWS = ["abc", "defghijkl", "", "kkkkkkkkkkkk", "lb"]


def run_once(store, policy, rows, num_slots=1, residents=(), reads="buffered"):
    engine = open_engine(store, policy, num_slots, residents, reads=reads)
    outcomes = engine.sweep([encode(rows)])
    engine.close()
    return answers(outcomes)


@quick
@given(data=st.data(), rows=batches, policy=policies, toy=st.sampled_from(TOYS))
def test_answers_are_those_of_each_row_alone_through_the_whole_model(shelf, data, rows, policy, toy):
    store = shelf.open(toy)
    num_slots = data.draw(st.integers(3 if toy.whole else 1, 3))
    residents = data.draw(st.sets(st.sampled_from(["embedding", "head", *layer_shards(store)])))
    engine = open_engine(store, policy, num_slots, residents)
    for more in data.draw(st.lists(st.booleans(), min_size=1, max_size=3)):
        assert answers(engine.sweep([encode(rows)], more=more)) == expected(store, rows, policy)
        rows = data.draw(batches)
    engine.close()
    store.close()


@quick
@given(data=st.data(), sweep=st.lists(batches, min_size=1, max_size=4), policy=policies, toy=st.sampled_from(TOYS))
def test_batches_that_share_a_sweep_are_answered_as_if_alone(shelf, data, sweep, policy, toy):
    store = shelf.open(toy)
    num_slots = data.draw(st.integers(3 if toy.whole else 2, 3))
    residents = data.draw(st.sets(st.sampled_from(["embedding", "head", *layer_shards(store)])))
    engine = open_engine(store, policy, num_slots, residents)
    for more in (True, False):
        outcomes = engine.sweep([encode(rows) for rows in sweep], more=more)
        assert answers(outcomes) == [each for rows in sweep for each in expected(store, rows, policy)]
    engine.close()
    store.close()


def test_steps_run_together_where_batches_share_a_sweep_and_much_would_be_kept(shelf):
    engine = open_engine(shelf.open(Toy()), "none", 2)
    schedule = engine.schedule
    kernels = [[step.kernel for step in steps] for steps in schedule.groups(1, 2)]
    assert kernels == [["attention"], ["up", "down"]]
    alone = [[step.kernel for step in steps] for steps in schedule.groups(1, 1)]
    assert alone == [["attention"], ["up"], ["down"]]
    assert (schedule.most_shards_together(2, frozenset()), schedule.most_shards_together(1, frozenset())) == (2, 1)
    engine.sweep([encode(ROWS), encode(ROWS[:2])])
    start = engine.backend.computed.index("attention")
    assert engine.backend.computed[start : start + 6] == ["attention", "attention", "up", "down", "up", "down"]
    engine.close()


def test_batches_are_set_aside_after_each_of_their_turns_and_one_alone_is_not(shelf, monkeypatch):
    engine = open_engine(shelf.open(Toy()), "none", 2)
    turns = []
    monkeypatch.setattr(engine.backend, "set_aside", lambda state: turns.append((state.num_rows, [*state.values])))
    engine.sweep([encode(ROWS)])
    assert turns == []
    engine.sweep([encode(ROWS), encode(ROWS[:2])])
    groups = [steps for index in range(len(engine.schedule.stages)) for steps in engine.schedule.groups(index, 2)]
    assert [num_rows for num_rows, _ in turns] == [5, 2] * len(groups)
    assert all(values for _, values in turns)
    engine.close()


def test_steps_that_run_together_need_slots_for_all_their_weights(shelf):
    """With fewer the engine would wait for ever."""
    engine = open_engine(shelf.open(Toy()), "none", 1)
    with pytest.raises(ValueError, match="2 shards are needed at once, and there are 1 slots"):
        engine.sweep([encode(ROWS), encode(ROWS[:2])])
    assert len(engine.sweep([encode(ROWS)])) == len(ROWS)
    engine.close()


@pytest.mark.parametrize("reads", ["buffered", "direct", "mapped"])
@pytest.mark.parametrize("verify", ["always", "first", "never"])
def test_how_shards_are_read_does_not_change_the_answer(shelf, verify, reads):
    store = shelf.open(Toy(padding_bytes=1 << 14), verify)
    if choose_reads(store, reads, layer_shards(store), 0, 0).name != reads:
        pytest.skip(f"the file system has no {reads} reads")
    for _ in range(2):
        assert run_once(store, "patience:1", ROWS, 2, reads=reads) == expected(store, ROWS, "patience:1")
    store.close()


def test_everything_resident_gives_the_same_answer_and_reads_nothing_twice(shelf):
    store = shelf.open(Toy())
    engine = open_engine(store, "patience:1", 0, ["embedding", "head", *layer_shards(store)])
    assert answers(engine.sweep([encode(ROWS)])) == expected(store, ROWS, "patience:1")
    read = engine.feed.bytes_read
    second = engine.sweep([encode(ROWS)])
    assert answers(second) == expected(store, ROWS, "patience:1")
    assert (
        engine.feed.bytes_read - read == sum(outcome.bytes_read for outcome in second) < 1 << 16
    )  # rows of the tables
    engine.close()


def test_infinite_patience_is_no_exit_is_the_full_model(shelf):
    store = shelf.open(Toy())
    full = run_once(store, "none", ROWS)
    assert run_once(store, "patience:inf", ROWS) == full
    assert [exit_stage for exit_stage, _ in full] == [4] * len(ROWS)


@quick
@given(order=st.permutations(range(len(ROWS))), policy=policies)
def test_permuting_the_batch_permutes_the_answer(shelf, order, policy):
    store = shelf.open(Toy())
    straight = run_once(store, policy, ROWS)
    assert run_once(store, policy, [ROWS[place] for place in order]) == [straight[place] for place in order]


def test_rows_leave_one_by_one(shelf):
    store = shelf.open(Toy(6))
    rows = ["abcdef"[: 1 + place % 6] * (1 + place % 3) for place in range(12)]
    exits = [exit_stage for exit_stage, _ in run_once(store, "patience:1", rows, 2)]
    assert len(set(exits)) >= 3  # the batch shrank in the middle of the pass, more than once
    assert run_once(store, "patience:1", rows, 2) == expected(store, rows, "patience:1")


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_answers_stay_right_when_look_ahead_stops_at_likely_exits(shelf, num_slots):
    store = shelf.open(Toy(6))
    engine = open_engine(store, "confidence:0.5", num_slots, ["layer-02-up"])
    rows = ["abcdefghijkl"[place % 7 : place % 7 + 1 + place % 5] for place in range(60)]
    outcomes = [engine.sweep([encode([row])], more=bool(place % 3))[0] for place, row in enumerate(rows)]
    assert answers(outcomes) == expected(store, rows, "confidence:0.5")
    assert any(turn.after for turn in engine.turns(1))
    engine.close()


def test_a_model_without_exits_runs_to_its_head(shelf):
    store = shelf.open(Toy(exits=False))
    assert run_once(store, "none", ROWS) == expected(store, ROWS, "none")


def test_regression_leaves_by_values_that_agree(shelf):
    store = shelf.open(Toy(problem="regression"))
    assert run_once(store, "patience:1@1.5", ROWS) == expected(store, ROWS, "patience:1@1.5")


@pytest.mark.parametrize(("broken", "stage"), [("exit 2", "exit 2"), ("head", "head")])
def test_logits_that_are_no_numbers_name_their_stage(shelf, broken, stage):
    store = shelf.open(Toy(broken=broken))
    engine = open_engine(store, "patience:2" if broken == "exit 2" else "none", 2)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=rf"^{stage} gave NaN or infinite logits - "):
            engine.sweep([encode(["abc"])])
    engine.close()


def test_an_exit_that_is_not_asked_may_be_broken(shelf):
    store = shelf.open(Toy(broken="exit 2"))
    assert run_once(store, "none", ROWS) == expected(shelf.open(Toy()), ROWS, "none")
    assert run_once(store, "stage:3", ROWS) == expected(shelf.open(Toy()), ROWS, "stage:3")


def test_a_token_outside_the_vocabulary_is_refused(shelf):
    engine = open_engine(shelf.open(Toy()))
    ids_BS = np.array([[31, 32]])
    with pytest.raises(StoreError, match="token id 32 in a vocabulary of 32"):
        engine.sweep([token_batch(ids_BS, np.ones_like(ids_BS))])
    engine.close()


@pytest.mark.parametrize("deadline_seconds", [None, 10.0])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_only_a_deadline_needs_an_exit_before_the_last_layer(shelf, num_layers, deadline_seconds):
    store = shelf.open(Toy(num_layers))
    guard = NO_DEADLINE if deadline_seconds is None else DeadlineGuard(deadline_seconds)
    if num_layers == 1 and deadline_seconds:
        with pytest.raises(UsageError, match="a deadline needs exits and this model has one layer"):
            open_engine(store, guard=guard)
        return
    engine = open_engine(store, guard=guard)
    assert answers(engine.sweep([encode(ROWS[:1])])) == expected(store, ROWS[:1], "none")
    engine.close()


def test_closing_frees_the_backend(shelf):
    engine = open_engine(shelf.open(Toy()))
    assert not engine.backend.closed
    engine.close()
    assert engine.backend.closed and not engine.feed.is_open


def test_an_empty_batch_does_nothing(shelf):
    engine = open_engine(shelf.open(Toy()))
    empty_BS = np.zeros((0, 3), np.int64)
    assert engine.sweep([token_batch(empty_BS, empty_BS)]) == []
    engine.close()
    assert engine.feed.bytes_read == 0
