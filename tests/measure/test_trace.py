import json
import threading
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.measure import MOST_SPANS, TRACED_PASSES, Span, Trace, bound_seconds


def two_layers():
    trace = Trace()
    trace.add(Span("layer 1", 0, "read", 10.0, 10.25, bytes=4096, thread="reader"))
    trace.add(Span("layer 1", 0, "wait", 10.0, 10.25))
    trace.add(Span("layer 1", 0, "compute", 10.25, 10.5))
    trace.add(Span("layer 2", 1, "read", 10.25, 10.75, bytes=8192, thread="reader"))
    trace.add(Span("layer 2", 1, "compute", 10.75, 11.0))
    trace.add(Span("layer 2", 1, "compute", 11.0, 11.5))
    trace.add(Span("exit 2", 1, "head", 11.5, 11.625))
    return trace


def test_a_span_keeps_what_was_added():
    trace = Trace()
    trace.add(Span("layer 1", 0, "read", 1.0, 2.0, bytes=7, thread="reader", pass_index=3))
    assert trace.spans() == [Span("layer 1", 0, "read", 1.0, 2.0, 7, "reader", 3)]
    with pytest.raises(AttributeError):
        trace.spans()[0].bytes = 8


def test_spans_come_in_order_of_their_start():
    trace = Trace()
    for start in (3.0, 1.0, 2.0):
        trace.add(Span("x", 0, "read", start, start))
    assert [span.start_seconds for span in trace.spans()] == [1.0, 2.0, 3.0]


def test_the_spans_of_one_pass_are_found():
    trace = two_layers()
    later = Span("layer 1", 0, "compute", 20.0, 24.0, pass_index=1)
    trace.add(later)
    assert trace.spans(pass_index=1) == [later]
    assert trace.spans() == [*trace.spans(pass_index=0), later]
    assert trace.spans(pass_index=7) == []


def test_only_the_last_passes_are_kept():
    trace = Trace(num_passes=3)
    for pass_index in range(100):
        for stage in range(5):
            trace.add(Span("x", stage, "compute", float(pass_index), float(pass_index), pass_index=pass_index))
    trace.add(Span("late", 0, "read", 0.0, 0.0, pass_index=4))
    assert [span.pass_index for span in trace.spans()] == [97] * 5 + [98] * 5 + [99] * 5


@pytest.mark.parametrize(("num_spans", "kept"), [(100, range(97, 100)), (9, range(98, 100)), (1, range(98, 100))])
def test_long_passes_are_fewer_but_two(num_spans, kept):
    trace = Trace(num_passes=3, num_spans=num_spans)
    for pass_index in range(100):
        for stage in range(5):
            trace.add(Span("x", stage, "compute", float(pass_index), float(pass_index), pass_index=pass_index))
    assert [span.pass_index for span in trace.spans()] == [index for index in kept for _ in range(5)]


def test_the_most_spans_take_less_than_half_a_mebibyte():
    """No plan counts them: a run near the smallest budget must not grow by what it records."""
    trace = Trace(TRACED_PASSES, MOST_SPANS)
    tracemalloc.start()
    try:
        for number in range(2 * MOST_SPANS):
            start = number / 7
            name = f"layer-{number % 200}"
            trace.add(Span(name, number % 12, "read", start, start + 0.1, 10**7 + number, "reader", number // 700))
        assert tracemalloc.get_traced_memory()[1] < 1 << 19
    finally:
        tracemalloc.stop()
    assert len(trace.spans()) > MOST_SPANS - 700


def test_a_trace_keeps_at_least_one_pass():
    with pytest.raises(ValueError, match="num_passes must be at least 1, got 0"):
        Trace(num_passes=0)


def test_threads_lose_no_span():
    trace = Trace()

    def add_many(thread):
        for number in range(3000):
            trace.add(Span("x", number, "read", 0.0, 0.0, thread=thread, pass_index=number % 50))

    threads = [threading.Thread(target=add_many, args=(name,)) for name in ("loop", "reader", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trace.spans()) == 9000


def test_json_lines_give_the_spans_back(tmp_path):
    trace = two_layers()
    trace.add(Span('line\nbreak "quoted" \ud800', 2, "compute", 12.0, 13.0))
    trace.to_jsonl(tmp_path / "trace.jsonl")
    lines = (tmp_path / "trace.jsonl").read_text().splitlines()
    assert [Span(**json.loads(line)) for line in lines] == trace.spans()


def test_chrome_trace_has_named_threads_and_microseconds(tmp_path):
    two_layers().to_chrome(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    threads = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert set(threads) == {"loop", "reader"}
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"offramp"}
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == 7
    assert complete[-1] == {
        "ph": "X",
        "pid": 1,
        "tid": threads["loop"],
        "name": "exit 2",
        "cat": "head",
        "ts": 1.5e6,
        "dur": 0.125e6,
        "args": {"kind": "head", "stage": 1, "pass_index": 0, "bytes": 0},
    }


def test_an_empty_trace_can_be_written(tmp_path):
    Trace().to_chrome(tmp_path / "trace.json")
    assert [event["ph"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]] == ["M"]


def test_bound_is_the_busier_of_the_two():
    assert bound_seconds([1.0, 2.0], [0.5, 0.5], 0.25) == 3.25
    assert bound_seconds([0.5, 0.5], [1.0, 2.0], 0.25) == 3.25


SECONDS = st.lists(st.floats(0, 10), min_size=1, max_size=12)


@given(SECONDS, SECONDS, st.integers(1, 4))
def test_no_ring_of_slots_beats_the_bound(compute, read, num_slots):
    read = (read * len(compute))[: len(compute)]
    io_end, compute_end = [0.0], [0.0]  # the recurrence of a ring with `num_slots` slots
    for index, (c, r) in enumerate(zip(compute, read, strict=True)):
        io_end.append(max(io_end[-1], compute_end[max(0, index + 1 - num_slots)]) + r)
        compute_end.append(max(compute_end[-1], io_end[-1]) + c)
    assert compute_end[-1] >= bound_seconds(compute, read, 0.0) * (1 - 1e-12)
