from __future__ import annotations

from hypothesis import given, settings

from offramp.program.program import Call, Part, Value
from offramp.streaming.graph import Op
from tests.streaming.traces import VALUE_BYTES, Tracer, trace, traces


def places(run):
    return [(place.start, place.call.module if place.call else None, place.depth) for place in run.places]


def test_a_run_can_be_cut_at_its_begin_and_where_a_call_begins_after_an_operation():
    run = trace("w0 a( w1 w2 b( w3 ) ) a( w1 ) w4")
    assert places(run) == [(0, None, 0), (1, "a", 0), (3, "b", 1), (4, "a", 0)]
    assert [place.call.number for place in run.places[1:]] == [1, 1, 2]


def test_of_calls_that_begin_at_one_operation_the_outermost_is_the_place():
    assert places(trace("w0 a( b( c( w1 ) ) ) d( w2 )")) == [(0, None, 0), (1, "a", 0), (2, "d", 0)]
    assert places(trace("w0 a( w1 b( c( ) ) ) d( w2 )")) == [(0, None, 0), (1, "a", 0), (2, "d", 0)]


def test_of_calls_that_follow_one_another_the_place_is_the_one_that_does_something():
    """Dropout does nothing where nothing is learnt."""
    assert places(trace("w0 drop( ) a( x( ) b( w1 ) )")) == [(0, None, 0), (1, "a", 0)]


def test_calls_before_the_first_operation_and_behind_the_last_are_no_places():
    assert places(trace("a( b( w0 ) ) c( ) d( )")) == [(0, None, 0)]
    assert places(trace("a( )")) == [(0, None, 0)]


def test_a_span_is_what_happens_in_a_call():
    run = trace("w0 a( w1 b( w2 w3 ) ) b( )")
    assert [(span.call, span.start, span.end) for span in run.spans] == [
        (Call("a", 1), 1, 4),
        (Call("b", 1), 2, 4),
        (Call("b", 2), 4, 4),
    ]


def test_weights_come_in_the_order_of_their_first_use():
    run = trace("c b+a b d")
    assert list(run.weights()) == ["c", "b", "a", "d"]
    assert list(run.weights(1, 3)) == ["b", "a"]


def test_a_value_lives_from_the_operation_that_makes_it_to_the_last_that_reads_it():
    tracer = Tracer()
    early = tracer.op()
    tracer.op(reads=())
    late = tracer.op(reads=(early,))
    tracer.op(reads=(late,))
    run = tracer.done()
    assert [run.live.at(op) for op in range(5)] == [[], [0], [0], [2], [3]]
    assert [run.live.bytes_at(op) for op in range(5)] == [0, *[VALUE_BYTES] * 4]


def test_what_the_run_returns_lives_to_its_end_and_what_nobody_reads_dies_at_once():
    tracer = Tracer()
    returned, lost = tracer.op(reads=(), num_bytes=3), tracer.op(reads=(), num_bytes=100)
    tracer.op(reads=(), num_bytes=5)
    run = tracer.done(returned)
    assert [run.live.at(op) for op in range(4)] == [[], [returned], [returned], [returned]]
    assert lost not in run.live.at(2)
    assert run.live.most_bytes == 103


def test_a_value_that_is_written_again_is_the_same_value():
    tracer = Tracer()
    value = tracer.op(reads=())
    tracer.ops.append(Op("aten.add_.Tensor", (), (value,), ()))
    tracer.op(reads=())
    assert tracer.done(value).live.at(2) == [value]


@settings(max_examples=200, deadline=None)
@given(traces)
def test_bytes_that_live_are_those_of_the_values_that_live(run):
    for op in range(len(run.ops) + 1):
        assert run.live.bytes_at(op) == sum(run.values[value][1] for value in run.live.at(op))
    beside = [
        sum(
            num_bytes
            for value, (_, num_bytes) in run.values.items()
            if run.live.made[value] <= op <= run.live.last[value]
        )
        for op in range(len(run.ops))
    ]
    assert run.live.most_bytes == max(beside, default=0)


@settings(max_examples=200, deadline=None)
@given(traces)
def test_places_go_forward_and_each_begins_a_call_of_its_own(run):
    assert all(one.start < other.start for one, other in zip(run.places, run.places[1:], strict=False))
    calls = [place.call for place in run.places[1:]]
    assert None not in calls and len(set(calls)) == len(calls)
    starts = {(span.call, span.start) for span in run.spans}
    assert all((place.call, place.start) in starts for place in run.places[1:])


def part_at(tracer, index, old_before=0):
    run = tracer.done()
    return run.part(run.places[index], old_before)


def test_the_hidden_state_is_the_first_argument_where_nothing_else_that_is_new_is_read_behind():
    tracer = Tracer()
    mask = tracer.op(reads=())
    hidden = tracer.op(reads=())
    tracer.enter("a", hidden, mask)
    tracer.op(reads=(hidden, mask))
    assert part_at(tracer, 1).hidden is None  # the mask is new
    assert part_at(tracer, 1, old_before=1).hidden == 1
    assert [value.axes for value in part_at(tracer, 1).flows] == [(2,), (2,)]


def test_a_first_argument_that_no_operation_made_is_no_hidden_state():
    """An input of the run, or a weight: the second argument does not take its place."""
    tracer = Tracer()
    hidden = tracer.op(reads=())
    tracer.enter("a", None, hidden)
    tracer.op(reads=(hidden,))
    assert part_at(tracer, 1).hidden is None


def test_a_first_argument_that_nobody_reads_is_no_hidden_state():
    tracer = Tracer()
    hidden = tracer.op(reads=())
    other = tracer.op(reads=())
    tracer.enter("a", hidden)
    tracer.op(reads=(other,))
    assert part_at(tracer, 1, old_before=2).hidden is None


def test_what_flows_has_the_shape_that_it_has_there():
    """A view of a value may be of another shape than what the operation made."""
    tracer = Tracer()
    value = tracer.op(reads=())
    tracer.values[value] = Value("float32", (3, 4)), VALUE_BYTES
    tracer.enter("a", value)
    tracer.op(reads=(value,))
    assert part_at(tracer, 1).flows == (Value("float32", (2,)),)


def test_nothing_flows_into_the_begin():
    run = trace("w0 w1")
    assert run.part(run.places[0], 0) == Part((), None, (), None)
