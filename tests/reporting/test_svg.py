"""Scales, texts and pictures that stand alone."""

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.measure import MemorySample, Span
from offramp.reporting.layers import stage_names
from offramp.reporting.pictures import Axis, Bars, Point, bar_rows, exit_histograms, scatter
from offramp.reporting.svg import Canvas, alone, cut, scale_of
from offramp.reporting.timeline import Run, draw_timeline
from offramp.units import format_size

HOSTILE = "<script>alert('x')</script>\x00\x1b]]>&amp;\"\ud800"
PLAIN = Axis("x", "", lambda value: f"{value:.3g}")


@given(st.floats(0, 1e12), st.floats(0, 1e12), st.sampled_from([2, 10]), st.booleans())
def test_scales_hold_all_values_and_have_some_ticks(one, other, base, from_zero):
    found = scale_of([one, other], 400, 20, lambda value: f"{value:g}", base=base, from_zero=from_zero)
    for value in (one, other):
        assert 20 - 1e-6 <= found(value) <= 400 + 1e-6
    places = [found(value) for value, _ in found.ticks]
    assert len(places) <= 12 and places == sorted(places, reverse=True)
    assert all(20 - 1e-6 <= place <= 400 + 1e-6 for place in places)


def test_ticks_are_round_in_their_unit():
    texts = [text for _, text in scale_of([0, 400 << 20], 0, 300, format_size, base=2).ticks]
    assert texts == ["0", "100 MiB", "200 MiB", "300 MiB", "400 MiB"]
    wide = scale_of([1 << 10, 1 << 30], 0, 300, format_size, base=2)
    assert wide.is_log and 3 <= len(wide.ticks) <= 7


@given(st.text(max_size=40), st.integers(3, 20))
def test_cut_texts_are_one_line_of_at_most_a_length(text, length):
    shown = cut(text, length)
    assert len(shown) <= length and shown.isprintable()


def pictures(text):
    points = [
        Point(text, text, (1, 1, 2), (2, 1, 3), text, label=text),
        Point("b", "c", (2, 2, 2), (3, 3, 3), label="d"),
    ]
    yield scatter(text, points, PLAIN, PLAIN, text)
    yield exit_histograms(text, [(text, (1, 0, 3)), ("b", (0, 0, 0))], text)
    yield bar_rows(text, [Bars(text, (1.0, -2.0), text)], (text, "b"), PLAIN, text)
    samples = [MemorySample(float(number), 1 << 20, None, None) for number in range(5)]
    yield draw_timeline(text, Run(samples, [], None, None), text)


@pytest.mark.parametrize("text", ["plain", HOSTILE, ""])
def test_pictures_are_valid_whatever_names_are(text):
    for picture in pictures(text):
        for svg in (picture.svg, alone(picture.svg)):
            root = ET.fromstring(svg.encode("utf-8", "replace"))
            assert not [each for each in root.iter() if each.tag.endswith("script")]
        assert "var(" not in alone(picture.svg)


def test_a_run_without_samples_is_refused():
    with pytest.raises(ValueError, match="empty"):
        draw_timeline("x", Run([], [], None, None))


def test_many_short_reads_are_drawn_together_without_losing_bytes():
    spans = [Span("a", 0, "read", 0.001 * n, 0.001 * n + 0.0005, 10, "reader", 0) for n in range(5000)]
    spans += [Span("a", 0, "compute", 0.0, 5.0, 0, "loop", 0)]
    samples = [MemorySample(0.01 * number, 1 << 20, 1 << 19, None) for number in range(500)]
    picture = draw_timeline("x", Run(samples, spans, None, None))
    reads = [line.split(",") for line in picture.data.splitlines() if line.startswith("read,")]
    assert len(reads) < 300 and sum(int(row[5]) for row in reads) == 50_000 and len(picture.svg) < 100_000


@pytest.mark.parametrize("num_layers", [3, 50])
def test_layers_are_named_or_numbered_as_their_exits_are_in_all_of_a_picture(num_layers):
    """Names where most bands have room for them, else numbers; shards, steps and exits name no layer."""
    spans = []
    for layer in range(num_layers):
        about = layer + 1, "compute", float(layer), layer + 0.9, 0, "loop", 0
        steps = [Span(f"layer.{layer} {step}", *about) for step in ("attention", "up")]
        exit = Span(f"exit {layer + 1}", *about)._replace(kind="head")
        spans += [exit._replace(name=f"layer-0{layer}-up", kind="read"), *steps, exit]
    samples = [MemorySample(float(second), 1 << 20, 1 << 19, None) for second in range(num_layers)]
    picture = draw_timeline("x", Run(samples, spans, None, None))
    assert (">layer 1<" in picture.svg, ">1<" in picture.svg) == ((True, False) if num_layers == 3 else (False, True))
    assert "layer.0" not in picture.svg and "compute,layer 1,0," in picture.data
    others = [Span("block 0", 0, "compute", 0.0, 1.0, 0, "loop", 0), Span("head", 2, "head", 1.0, 2.0, 0, "loop", 0)]
    assert stage_names(others) == {0: "block", 2: "head"}


def test_a_canvas_escapes_what_it_draws():
    canvas = Canvas(10, 10)
    canvas.text(0, 0, "<b>&")
    canvas.mark(1, 1, "f0", title="<i>", row='"><b>')
    assert "<b>" not in canvas.svg("<t>") and "<i>" not in canvas.svg("<t>") and '"><b' not in canvas.svg("<t>")
