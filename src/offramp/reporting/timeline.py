"""Picture of the memory of a run over time as SVG: a band for each stage, the budget as a line, and lanes of reads.

Passes around the highest memory are drawn; what was before them is compressed into a narrow panel on the left.
`reporting.memory` draws one run of any length with matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offramp.reporting.layers import stage_names
from offramp.reporting.pictures import Picture
from offramp.reporting.svg import Canvas, Scale, cut, draw_legend, scale_of, width_of
from offramp.reporting.tables import csv_of, slug
from offramp.units import format_duration, format_size

if TYPE_CHECKING:
    from offramp.measure import MemorySample, Span

NUM_PASSES = 3
_MOST_POINTS = 500
_APART = 4.0
"""Distance in the picture from which two reads are told apart."""
_LEFT, _RIGHT, _BEFORE = 62.0, 886.0, 52.0
_LANES = {"read": ("f0", "reading weights"), "idle_read": ("f6", "reading between passes"),
          "wait": ("f1", "waiting for weights")}  # fmt: skip
"""Kind of span -> class and meaning of its lane, from top to bottom."""


@dataclass(frozen=True)
class Run:
    """Samples and spans of a run, on one clock, and what is known of its memory."""

    samples: Sequence[MemorySample]
    spans: Sequence[Span]
    budget_bytes: int | None
    peak_bytes: int | None
    """Peak that the kernel counted, which may lie between two samples."""


def draw_timeline(title: str, run: Run, caption: str = "") -> Picture:
    """Return the picture of a run. Raises ValueError without samples."""
    if not run.samples:
        raise ValueError("samples must not be empty")
    spans = _window(run)
    begin = min((span.start_seconds for span in spans), default=run.samples[0].seconds)
    end = max((span.end_seconds for span in spans), default=run.samples[-1].seconds)
    lanes = [kind for kind in _LANES if any(span.kind == kind for span in spans)]
    canvas = Canvas(900, 0)
    top, floor = draw_legend(canvas, 16, _keys(run, lanes)) + 26, 290.0
    canvas.height = floor + 50 + 14 * len(lanes)
    before = [sample for sample in run.samples if sample.seconds < begin]
    first = _LEFT + (_BEFORE if before else 0)
    known = [*(sample.rss_bytes for sample in run.samples), run.budget_bytes or 0, run.peak_bytes or 0]
    up = scale_of(known, floor, top, format_size, base=2, from_zero=True)
    across = scale_of([0.0, end - begin], first, _RIGHT, format_duration, from_zero=True)
    across = Scale(0.0, end - begin or 1.0, first, _RIGHT, tuple(t for t in across.ticks if t[0] <= end - begin))
    if before:
        canvas.box(
            _LEFT, top, _BEFORE - 3, floor - top, "before", f"before: {format_duration(begin - before[0].seconds)}"
        )
    _draw_bands(canvas, spans, begin, across, (top, floor))
    _draw_scales(canvas, up, across, floor + 14 * len(lanes))
    if before:
        _draw_curve(canvas, before, Scale(before[0].seconds, begin, _LEFT, first - 3, ()), up)
    inside = [sample for sample in run.samples if begin <= sample.seconds <= end]
    clock = Scale(begin, end if end > begin else begin + 1, first, _RIGHT, ())
    _draw_curve(canvas, [*(sample._replace(seconds=begin) for sample in before[-1:]), *inside], clock, up)
    _draw_exits(canvas, spans, clock, top)
    _draw_limits(canvas, run, up)
    blocks = {kind: _blocks([span for span in spans if span.kind == kind], clock) for kind in lanes}
    for index, kind in enumerate(lanes):
        _draw_lane(canvas, blocks[kind], clock, floor + 5 + 14 * index)
    shown = [*_bands(spans), *(block for kind in lanes for block in blocks[kind])]
    return Picture(slug(title), title, canvas.svg(title), _data(inside, shown, begin), caption, is_wide=True)


def _window(run: Run) -> list[Span]:
    """Return the spans of the passes that are drawn: those up to the one with the highest memory, or the first ones."""
    passes = sorted({span.pass_index for span in run.spans})
    ends: dict[int, float] = {}
    for span in run.spans:
        ends[span.pass_index] = max(ends.get(span.pass_index, 0.0), span.end_seconds)
    highest = max(run.samples, key=lambda sample: sample.rss_bytes).seconds
    reached = sum(ends[each] < highest for each in passes)
    last = min(max(reached + 1, NUM_PASSES), len(passes))
    kept = set(passes[max(0, last - NUM_PASSES) : last])
    return [span for span in run.spans if span.pass_index in kept]


def _keys(run: Run, lanes: Sequence[str]) -> list[tuple[str, str, str]]:
    keys = [("line", "line s0", "resident set")]
    if any(sample.anon_bytes is not None for sample in run.samples):
        keys.append(("box", "area f0", "anonymous part"))
    keys += [("box", "band0", "computing, by stage"), ("triangle", "taken", "exit taken")] if run.spans else []
    keys += [("line", "limit dashed", "budget")] if run.budget_bytes is not None else []
    return keys + [("box", *_LANES[kind]) for kind in lanes]


def _draw_scales(canvas: Canvas, up: Scale, across: Scale, bottom: float) -> None:
    for value, text in up.ticks:
        canvas.path([(_LEFT, up(value)), (_RIGHT, up(value))], "grid")
        canvas.text(_LEFT - 7, up(value) + 4, text, "quiet small", "end")
    for value, text in across.ticks:
        canvas.text(across(value), bottom + 18, text, "quiet small", "middle")
    canvas.path([(_LEFT, up.first), (_RIGHT, up.first)], "axis")
    canvas.text((across.first + across.last) / 2, bottom + 36, "time", "quiet", "middle")


def _bands(spans: Sequence[Span]) -> list[Span]:
    """Return one span for each stage of each pass, by the name of the stage: all of its computation."""
    names = stage_names(spans)
    found: dict[tuple[int, int], Span] = {}
    for span in sorted(spans, key=lambda each: each.start_seconds):
        if span.kind in ("compute", "head"):
            first = found.setdefault((span.pass_index, span.stage), span)
            end = max(first.end_seconds, span.end_seconds)
            found[span.pass_index, span.stage] = first._replace(end_seconds=end, kind="compute", name=names[span.stage])
    return list(found.values())


def _blocks(spans: Sequence[Span], clock: Scale) -> list[Span]:
    """Return spans of one kind. Those that the picture could not show apart are one, with the sum of their bytes."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda each: each.start_seconds):
        begin, last = clock(span.start_seconds), found[-1] if found else span
        if not found or begin - clock(last.start_seconds) > _APART or begin - clock(last.end_seconds) > _APART / 2:
            found.append(span)
        else:
            end = max(last.end_seconds, span.end_seconds)
            found[-1] = last._replace(end_seconds=end, bytes=last.bytes + span.bytes)
    return found


def _draw_bands(canvas: Canvas, spans: Sequence[Span], origin: float, across: Scale, ends: tuple[float, float]) -> None:
    """Tint the full height while a stage computes; waits between stages stay blank."""
    bands = [(span, across(span.start_seconds - origin), across(span.end_seconds - origin)) for span in _bands(spans)]
    for span, x, end in bands:
        text = f"{cut(span.name, 60)}, pass {span.pass_index}: {format_duration(span.end_seconds - span.start_seconds)}"
        canvas.box(x, ends[0], end - x, ends[1] - ends[0], f"band{span.stage % 2}", text)
    for middle, text in _fitting(bands):
        canvas.text(middle, ends[0] - 5, text, "quiet small", "middle")


def _fitting(bands: Sequence[tuple[Span, float, float]]) -> list[tuple[float, str]]:
    """Return the labels that fit their bands, and their places: names if most of them fit, otherwise numbers."""
    found: list[tuple[float, str]] = []
    for label in (lambda span: cut(span.name, 20), lambda span: str(span.stage)):
        named = [(label(span), begin, end) for span, begin, end in bands]
        found = [((begin + end) / 2, text) for text, begin, end in named if width_of(text) * 0.85 < end - begin]
        if 2 * len(found) > len(bands):
            break
    return found


def _draw_curve(canvas: Canvas, samples: Sequence[MemorySample], across: Scale, up: Scale) -> None:
    """Draw the resident set as a line, and its anonymous part as an area."""
    kept = _thinned(samples)
    anonymous = [(across(each.seconds), up(each.anon_bytes)) for each in kept if each.anon_bytes is not None]
    if len(anonymous) > 1 and len(anonymous) == len(kept):
        ends = [(anonymous[-1][0], up(0)), (anonymous[0][0], up(0))]
        canvas.path([*anonymous, *ends], "area f0", closed=True)
    if len(kept) > 1:
        canvas.path([(across(each.seconds), up(each.rss_bytes)) for each in kept], "line s0")


def _thinned(samples: Sequence[MemorySample]) -> list[MemorySample]:
    """Return at most `_MOST_POINTS` samples: of each run of equal length the highest, so that no peak is lost."""
    size = max(1, -(-len(samples) // _MOST_POINTS))
    groups = [samples[start : start + size] for start in range(0, len(samples), size)]
    return [max(group, key=lambda sample: sample.rss_bytes) for group in groups]


def _draw_exits(canvas: Canvas, spans: Sequence[Span], clock: Scale, top: float) -> None:
    """Mark the exit that was taken in each pass: the last head that was evaluated."""
    last = {span.pass_index: span for span in sorted(spans, key=lambda each: each.end_seconds) if span.kind == "head"}
    for span in last.values():
        text = f"exit taken: {cut(span.name, 60)}, pass {span.pass_index}"
        canvas.mark(clock(span.end_seconds), top + 8, "taken", shape="triangle", title=text)


def _draw_limits(canvas: Canvas, run: Run, up: Scale) -> None:
    peak = run.peak_bytes or max(sample.rss_bytes for sample in run.samples)
    below = 0
    if run.budget_bytes is not None:
        height = up(run.budget_bytes)
        canvas.path([(_LEFT, height), (_RIGHT, height)], "limit dashed")
        canvas.text(_RIGHT - 4, height - 5, f"budget {format_size(run.budget_bytes)}", "limit-text halo", "end")
        below = 19 if abs(height - up(peak)) < 14 and peak <= run.budget_bytes else 0
    canvas.text(_RIGHT - 4, up(peak) - 5 + below, f"peak {format_size(peak)}", "head halo", "end")


def _draw_lane(canvas: Canvas, spans: Sequence[Span], clock: Scale, y: float) -> None:
    canvas.text(_LEFT - 7, y + 8, spans[0].kind.replace("_", " "), "quiet small", "end")
    for span in spans:
        x, seconds = clock(span.start_seconds), span.end_seconds - span.start_seconds
        text = f"{span.kind.replace('_', ' ')} {cut(span.name, 60)}: {format_duration(seconds)}"
        text += f", {format_size(span.bytes)}" if span.bytes else ""
        canvas.box(x, y, clock(span.end_seconds) - x, 10, _LANES[span.kind][0], text)


def _data(samples: Sequence[MemorySample], spans: Sequence[Span], origin: float) -> str:
    """Return what the picture shows as rows of samples and of spans, with times in milliseconds."""
    rows: list[tuple[object, ...]] = [
        ("sample", "", "", round((each.seconds - origin) * 1e3, 3), "", each.rss_bytes, each.anon_bytes)
        for each in _thinned(samples)
    ]
    for span in spans:
        ends = (round((each - origin) * 1e3, 3) for each in (span.start_seconds, span.end_seconds))
        rows.append((span.kind, span.name, span.pass_index, *ends, span.bytes or "", ""))
    heads = ("kind", "name", "pass", "begin (ms)", "end (ms)", "resident or read (B)", "anonymous (B)")
    return csv_of(heads, rows)
