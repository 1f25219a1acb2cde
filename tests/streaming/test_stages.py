from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.program.program import Call, Part, Value
from offramp.streaming.stages import FEW_STAGES, Op, plan_stages
from tests.selection import examples
from tests.streaming.traces import VALUE_BYTES, WEIGHTS, Tracer, sizes, trace, traces

SIZES = sizes(WEIGHTS)


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


@settings(max_examples=examples(200), deadline=None)
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


@settings(max_examples=examples(200), deadline=None)
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


def starts(plan):
    """The modules that stages begin with; the first has none."""
    return [stage.part.start and stage.part.start.module for stage in plan.stages]


def bounds(plan, run):
    """The first operation of each stage, and the end."""
    at = {place.call: place.start for place in run.places}
    return [*(at[stage.part.start] for stage in plan.stages), len(run.ops)]


def staged(plan, run):
    """(stage, its operations)"""
    ends = bounds(plan, run)
    return [(stage, run.ops[ends[i] : ends[i + 1]]) for i, stage in enumerate(plan.stages)]


plans = st.tuples(traces, st.sampled_from([None, 1, 10, 25, 60, 10_000]), st.sampled_from([1, 12, 1 << 20]))


@settings(max_examples=examples(300), deadline=None)
@given(plans)
def test_stages_cover_all_operations_and_have_the_weights_that_these_touch(case):
    run, stage_bytes, table_bytes = case
    plan = plan_stages(run, SIZES, stage_bytes, table_bytes)
    ends = bounds(plan, run)
    assert ends[0] == 0 and (not run.ops or ends == sorted(set(ends)))
    for stage, ops in staged(plan, run):
        touched = {name for op in ops for name in op.weights}
        assert touched <= {*stage.uses, *stage.tables}
        assert {*stage.uses, *stage.tables} - touched <= set(plan.adopted)
        assert len({*stage.uses, *stage.tables}) == len(stage.uses) + len(stage.tables)


@settings(max_examples=examples(300), deadline=None)
@given(plans)
def test_no_stage_needs_more_than_it_may_unless_it_cannot_be_cut(case):
    run, stage_bytes, table_bytes = case
    plan = plan_stages(run, SIZES, stage_bytes, table_bytes)
    places, ends = {place.start for place in run.places}, bounds(plan, run)
    assert stage_bytes in (None, plan.stage_bytes)
    for i, (stage, ops) in enumerate(staged(plan, run)):
        needed = {name for op in ops for name in op.weights} - set(stage.tables)
        assert SIZES.of(needed) <= plan.stage_bytes or not places & set(range(ends[i] + 1, ends[i + 1]))


@settings(max_examples=examples(200), deadline=None)
@given(plans)
def test_each_weight_is_touched_adopted_or_unused_and_a_table_only_looked_up(case):
    run, stage_bytes, table_bytes = case
    plan = plan_stages(run, SIZES, stage_bytes, table_bytes)
    touched = set(run.weights())
    assert touched | set(plan.adopted) | set(plan.unused) == set(WEIGHTS)
    assert len(touched) + len(plan.adopted) + len(plan.unused) == len(WEIGHTS)
    tables = {name for stage in plan.stages for name in stage.tables}
    for name in touched:
        looked_up = all(op.name == "aten.embedding.default" for op in run.ops if name in op.weights)
        assert (name in tables) == (looked_up and WEIGHTS[name] >= table_bytes)
    assert not tables & {name for stage in plan.stages for name in stage.uses}


@settings(max_examples=examples(100), deadline=None)
@given(plans)
def test_equal_runs_give_equal_stages(case):
    traced, stage_bytes, table_bytes = case
    plan = plan_stages(traced, SIZES, stage_bytes, table_bytes)
    again = plan_stages(
        type(traced)(traced.ops, traced.spans, dict(traced.values), traced.outputs), SIZES, stage_bytes, table_bytes
    )
    assert plan == again


def block(name, *weights, inner=2):
    """A call with several weighted calls inside."""
    inside = " ".join(f"{name}.x{i}( {name}.x{i}.w )" for i in range(inner))
    return f"{name}( {' '.join(weights)} {inside} )"


def of_trace(text, size=4):
    """Sizes for all weights in a trace."""
    return sizes(dict.fromkeys(trace(text).weights(), size))


def stages_of(text, **options):
    return plan_stages(trace(text), of_trace(text), **options)


BLOCKS = " ".join(block(f"layers.{i}") for i in range(5))


def test_blocks_that_follow_one_another_are_the_stages():
    plan = stages_of(f"embed( e ) {BLOCKS} head( h )")
    assert starts(plan) == [None, *(f"layers.{i}" for i in range(5)), "head"]
    assert plan.stage_bytes == 8
    assert all(stage.part.hidden == 0 for stage in plan.stages[1:])


def test_what_comes_before_the_first_block_is_in_its_stage_where_it_fits():
    plan = stages_of(f"{BLOCKS} head( h )")
    assert starts(plan) == [None, *(f"layers.{i}" for i in range(1, 5)), "head"]


def test_a_shared_block_that_is_called_again_and_again_is_a_stage_each_time():
    shared = block("group.0")
    plan = stages_of(f"embed( e ) {shared} {shared} {shared}")
    assert [(stage.part.start.module, stage.part.start.number) for stage in plan.stages[1:]] == [
        ("group.0", number) for number in (1, 2, 3)
    ]
    assert len({stage.uses for stage in plan.stages[1:]}) == 1


def test_of_blocks_within_blocks_the_inner_ones_are_the_stages():
    outer = " ".join(f"s.{i}( {block(f's.{i}.l.0')} {block(f's.{i}.l.1')} )" for i in range(2))
    assert starts(stages_of(f"e {outer}")) == [None, "s.0", "s.0.l.1", "s.1", "s.1.l.1"]


def test_blocks_of_which_one_alone_has_blocks_within_are_the_stages_themselves():
    inner = f"s.2( {block('s.2.l.0')} {block('s.2.l.1')} )"
    assert starts(stages_of(f"e {block('s.0')} {block('s.1')} {inner}")) == [None, "s.0", "s.1", "s.2"]


def test_what_blocks_only_hand_out_is_no_obstacle():
    """Keys and values for the next step of a generation."""
    tracer, cache = Tracer(), []
    hidden = tracer.op("e")
    for i in range(3):
        tracer.enter(f"layers.{i}", hidden)
        for j in range(2):
            tracer.enter(f"layers.{i}.x{j}")
            cache.append(tracer.op(f"layers.{i}.x{j}.w", reads=(hidden,)))
            hidden = tracer.op(reads=(hidden, cache[-1]))
            tracer.leave()
        tracer.leave()
    traced = tracer.done(hidden, *cache)
    plan = plan_stages(traced, sizes(dict.fromkeys(traced.weights(), 4)))
    assert starts(plan) == [None, "layers.0", "layers.1", "layers.2"]
    assert [stage.part.flows[stage.part.hidden] for stage in plan.stages[1:]] == [traced.values[hidden][0]] * 3
    assert [len(stage.part.flows) for stage in plan.stages] == [0, 1, 3, 5]


def test_children_of_the_whole_model_may_be_blocks():
    assert starts(stages_of("e " + " ".join(block(str(i)) for i in range(3)))) == [None, "0", "1", "2"]


def test_layers_with_one_weighted_call_or_none_are_no_blocks():
    """A list of linear layers is not cut at each: there is no telling how small they are."""
    plan = stages_of(" ".join(f"layers.{i}( layers.{i}.w )" for i in range(40)))
    assert len(plan.stages) < 40
    assert plan.stage_bytes == 40 * 4 // FEW_STAGES


@pytest.mark.parametrize("bypass", [False, True])
def test_layers_that_a_residual_goes_round_are_no_blocks(bypass):
    tracer = Tracer()
    start = tracer.op("e")
    for i in range(3):
        tracer.enter(f"layers.{i}")
        for j in range(2):
            tracer.enter(f"layers.{i}.x{j}")
            tracer.op(f"layers.{i}.x{j}.w")
            tracer.leave()
        tracer.leave()
    tracer.op(reads=(tracer.now, start) if bypass else (tracer.now,))
    traced = tracer.done()
    of = sizes(dict.fromkeys(traced.weights(), 4))
    plan = plan_stages(traced, of)
    assert (plan.stage_bytes == 8) != bypass
    assert (starts(plan) == [None, "layers.0", "layers.1", "layers.2"]) != bypass


def test_a_mask_that_every_block_reads_is_no_obstacle():
    tracer = Tracer()
    mask = tracer.op(reads=())
    hidden = tracer.op("e", reads=())
    for i in range(3):
        tracer.enter(f"layers.{i}", hidden, mask)
        for j in range(2):
            tracer.enter(f"layers.{i}.x{j}")
            hidden = tracer.op(f"layers.{i}.x{j}.w", reads=(hidden, mask))
            tracer.leave()
        tracer.leave()
    traced = tracer.done()
    plan = plan_stages(traced, sizes(dict.fromkeys(traced.weights(), 4)))
    assert starts(plan)[-2:] == ["layers.1", "layers.2"]
    assert [len(stage.part.flows) for stage in plan.stages[-2:]] == [2, 2]
    assert all(stage.part.hidden == 1 for stage in plan.stages[-2:])


def test_what_comes_between_blocks_goes_with_the_one_before():
    plan = stages_of(" ".join(f"{block(f'layers.{i}')} scale" for i in range(3)))
    assert starts(plan) == [None, "layers.1", "layers.2"]
    assert plan.stage_bytes == 12


def test_what_comes_between_two_towers_does_not_make_stages_larger():
    towers = [" ".join(block(f"{name}.{i}") for i in range(3)) for name in ("one", "two")]
    plan = plan_stages(trace(" large ".join(towers)), sizes({**of_trace(" ".join(towers)).bytes, "large": 100}))
    assert plan.stage_bytes == 8
    assert {"two.0", "two.1", "two.2"} <= set(starts(plan))


def test_a_size_that_is_asked_for_goes_before_the_blocks():
    text = f"embed( e ) {BLOCKS} head( h )"
    assert len(stages_of(text, stage_bytes=1000).stages) == 1
    assert starts(stages_of(text, stage_bytes=4))[:4] == [None, "layers.0", "layers.0.x1", "layers.1"]


def test_a_weight_that_is_used_twice_counts_once_in_a_stage():
    plan = stages_of("a( w ) b( w ) c( w )", stage_bytes=4)
    assert len(plan.stages) == 1


def test_of_two_places_to_cut_the_one_where_less_is_alive_is_taken():
    for wide, narrow in (("b", "c"), ("c", "b")):
        tracer = Tracer()
        for name in ("a", "b", "c", "d"):
            tracer.enter(name)
            tracer.op(name, num_bytes=100 if chr(ord(name) + 1) == wide else 1)
            tracer.leave()
        plan = plan_stages(tracer.done(), sizes(dict.fromkeys("abcd", 1)), stage_bytes=3)
        assert starts(plan) in ([None, narrow], [None, narrow, "d"], [None, "d"])
        assert wide not in starts(plan)


def test_of_two_places_where_as_much_is_alive_the_outer_one_is_taken():
    plan = stages_of("a( x( w0 ) y( w1 ) ) b( x2( w2 ) ) c( w3 )", stage_bytes=12)
    assert len(plan.stages) == 2
    assert starts(plan)[1] in ("b", "c")


def test_an_expert_that_was_not_asked_is_in_the_stages_of_the_call_around_it():
    text = "e layers.0( layers.0.gate( layers.0.gate.w ) layers.0.experts.1( layers.0.experts.1.w ) ) head( head.w )"
    of = {"e": 1, "layers.0.gate.w": 1, "layers.0.experts.1.w": 1, "head.w": 1, "layers.0.experts.0.w": 1}
    plan = plan_stages(trace(text), sizes(of), stage_bytes=1)
    assert plan.adopted == ("layers.0.experts.0.w",)
    have = [stage.part.start.module for stage in plan.stages if "layers.0.experts.0.w" in stage.uses]
    assert have == ["layers.0", "layers.0.experts.1"]


def test_a_weight_of_the_whole_model_that_was_not_touched_is_in_no_stage():
    plan = plan_stages(trace("a( a.w )"), sizes({"a.w": 1, "w": 1, "never.called.w": 1}))
    assert plan.unused == ("w", "never.called.w")
    assert plan.adopted == ()


def test_a_weight_of_two_modules_is_adopted_by_those_that_are_called():
    of = sizes({"a.w": 1, "b.w": 1, "tied": 1}, {"tied": frozenset({"b", "c"})})
    plan = plan_stages(trace("a( a.w ) b( b.w )"), of, stage_bytes=1)
    assert [stage.uses for stage in plan.stages] == [("a.w",), ("b.w", "tied")]


def test_a_large_weight_of_which_rows_are_looked_up_is_a_table():
    text = "aten.embedding.default:words aten.embedding.default:few aten.embedding.default:tied head( tied )"
    of = sizes({"words": 1000, "few": 9, "tied": 1000})
    plan = plan_stages(trace(text), of, stage_bytes=2000, table_bytes=10)
    assert [(stage.uses, stage.tables) for stage in plan.stages] == [(("few", "tied"), ("words",))]
    assert plan.sliced == ("few", "tied", "words")


def test_weights_that_linear_layers_alone_touch_may_be_sliced():
    text = "aten.t.default:a aten.addmm.default:a aten.t.default:b aten.add.Tensor:b aten.embedding.default:c"
    assert plan_stages(trace(text), sizes({"a": 1, "b": 1, "c": 1})).sliced == ("a", "c")


@pytest.mark.parametrize("stage_bytes", [0, -1])
def test_a_stage_of_no_bytes_is_refused(stage_bytes):
    with pytest.raises(ValueError, match="stage_bytes must be more than nothing"):
        plan_stages(trace("a( w )"), sizes({"w": 1}), stage_bytes)


def test_a_run_of_nothing_is_one_stage():
    plan = plan_stages(trace(""), sizes({"w": 1}))
    assert (starts(plan), plan.unused, plan.activation_bytes) == ([None], ("w",), 0)


def test_many_calls_that_fit_into_one_stage_are_cut_in_reasonable_time():
    """The number of steps grows with the square of the places, and no faster."""
    text = " ".join(f"m{i}( w{i} )" for i in range(1500))
    assert len(plan_stages(trace(text), of_trace(text), stage_bytes=1 << 30).stages) == 1


def test_blocks_stand_among_others_of_their_list():
    """A stem before them and a head behind them, numbered like them, as in nn.Sequential."""
    inside = " ".join(block(f"{i}") for i in range(1, 4))
    plan = stages_of(f"0( e ) {inside} 4( h )")
    assert [starts(plan)[index] for index in plan.exits] == ["2", "3"]


def test_exits_stand_behind_each_block_but_the_last():
    plan = stages_of(f"embed( e ) {BLOCKS} head( h )")
    assert [starts(plan)[index] for index in plan.exits] == [f"layers.{i}" for i in range(1, 5)]


def test_without_blocks_exits_stand_where_one_hidden_state_flows():
    plan = stages_of("first( a ) second( b ) third( c )", stage_bytes=4)
    assert [starts(plan)[index] for index in plan.exits] == ["second", "third"]


@pytest.mark.parametrize("stage_bytes", [None, 1, 1 << 20])
def test_stages_begin_where_exits_were_asked_for(stage_bytes):
    points = (Call("layers.2", 1), Call("head", 1))
    plan = stages_of(f"embed( e ) {BLOCKS} head( h )", stage_bytes=stage_bytes, points=points)
    assert [starts(plan)[index] for index in plan.exits] == ["layers.2", "head"]
