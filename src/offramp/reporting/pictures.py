"""Pictures of results: points with a front, figures against budgets, rows of bars. Each has the data that it shows.

Values are drawn as they are given: this module computes no figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offramp.reporting.svg import (
    NUM_COLOURS,
    Canvas,
    Scale,
    cut,
    draw_axes,
    draw_legend,
    named_scale,
    scale_of,
    width_of,
)
from offramp.reporting.tables import csv_of, slug

_WIDTH = 440.0
MOST_LABELS = 12
_MOST_WHISKERS = 24


@dataclass(frozen=True)
class Picture:
    """A picture with its caption. `data` is what it shows, as CSV."""

    name: str
    title: str
    svg: str
    data: str
    caption: str = ""
    is_wide: bool = False


@dataclass(frozen=True)
class Axis:
    """Title of an axis, the unit of its values in CSV, and how a value is written."""

    title: str
    unit: str
    show: Callable[[float], str]
    base: float = 10.0
    """Base of round numbers: 2 for bytes."""

    @property
    def heading(self) -> str:
        """Heading of a column."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Point:
    """One subject. `x` and `y` are a value, and the ends of its interval or twice the value."""

    name: str
    series: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    row: str = ""
    """Place in the page of the row that it stands for."""
    shape: str = "circle"
    label: str = ""
    """Written beside the point. Points with a label are on the front."""


def scatter(title: str, points: Sequence[Point], x: Axis, y: Axis, caption: str = "") -> Picture:
    """Return a picture of points; those of the front are joined by steps and labelled."""
    series = list(dict.fromkeys(point.series for point in points))
    canvas = Canvas(_WIDTH, 330)
    top = draw_legend(canvas, 16, _legend(series, points)) + 22
    across = scale_of([value for point in points for value in point.x], 58, _WIDTH - 18, x.show, base=x.base)
    up = scale_of([value for point in points for value in point.y], 285, top, y.show, base=y.base)
    draw_axes(canvas, across, up, x.title, y.title)
    for point in points:
        colour = series.index(point.series) % NUM_COLOURS
        if point.label or len(points) <= _MOST_WHISKERS:
            _draw_whiskers(canvas, point, across, up, f"whisker s{colour}")
        text = f"{point.name}: {x.title} {x.show(point.x[0])}, {y.title} {y.show(point.y[0])}"
        place = across(point.x[0]), up(point.y[0])
        canvas.mark(*place, f"mark f{colour}", shape=point.shape, title=text, row=point.row)
    front = sorted((point for point in points if point.label), key=lambda point: (point.x[0], point.y[0]))
    steps = [(across(b.x[0]), up(height)) for a, b in itertools.pairwise(front) for height in (a.y[0], b.y[0])]
    if steps:
        canvas.path([(across(front[0].x[0]), up(front[0].y[0])), *steps], "front")
    taken = [(across(point.x[0]), up(point.y[0])) for point in points]
    _label(canvas, [(across(point.x[0]), up(point.y[0]), point.label) for point in front[:MOST_LABELS]], taken, top)
    columns = ("experiment", x.heading, "low", "high", y.heading, "low", "high", "on the front")
    data = csv_of(columns, [(each.name, *each.x, *each.y, bool(each.label)) for each in points])
    return Picture(slug(title), title, canvas.svg(title), data, caption)


def _legend(series: Sequence[str], points: Sequence[Point]) -> list[tuple[str, str, str]]:
    found = []
    for index, name in enumerate(series if len(series) > 1 else ()):
        shape = next(point.shape for point in points if point.series == name)
        found.append((shape, f"mark f{index % NUM_COLOURS}", name))
    return [*found, ("line", "front", "Pareto front")] if any(each.label for each in points) else found


def _draw_whiskers(canvas: Canvas, point: Point, across: Scale, up: Scale, kind: str) -> None:
    x, y = across(point.x[0]), up(point.y[0])
    if point.x[1] != point.x[2]:
        canvas.path([(across(point.x[1]), y), (across(point.x[2]), y)], kind)
    if point.y[1] != point.y[2]:
        canvas.path([(x, up(point.y[1])), (x, up(point.y[2]))], kind)


def _label(canvas: Canvas, places: Sequence[tuple[float, float, str]], marks: Sequence[tuple[float, float]],
           top: float) -> None:  # fmt: skip
    """Write names beside points, where they cover neither a mark nor another name."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]
    for x, y, name in places:
        text = cut(name, 24)
        width = width_of(text) * 0.86
        sides = [(x + 9, y + 4), (x - 9 - width, y + 4), (x - width / 2, y - 10), (x - width / 2, y + 17)]
        sides += [(x + 8, y - 9), (x - 8 - width, y - 9), (x + 8, y + 16), (x - 8 - width, y + 16)]
        for left, base in sides:
            box = (left, base - 8, left + width, base + 1)
            is_inside = box[0] > 56 and box[2] < canvas.width and top - 8 < box[1] and box[3] < 284
            if is_inside and not any(_overlap(box, other) for other in taken):
                canvas.text(left, base, text, "small halo")
                taken.append(box)
                break


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@dataclass(frozen=True)
class BudgetPoint:
    """A figure under one budget: the value, its interval, and what was predicted or is the lower bound."""

    budget: str
    series: str
    y: tuple[float, float, float]
    bound: float | None = None
    limit: float | None = None
    """Bytes of the budget, where the figure is memory."""
    row: str = ""


def against_budgets(title: str, points: Sequence[BudgetPoint], budgets: Sequence[str], y: Axis, bound: str,
                    caption: str = "") -> Picture:  # fmt: skip
    """Return a picture of a figure against budgets, which are names in their order. `bound` says what the bound is."""
    series = list(dict.fromkeys(point.series for point in points))
    canvas = Canvas(_WIDTH, 330)
    keys = [("circle", f"mark f{index % NUM_COLOURS}", name) for index, name in enumerate(series) if len(series) > 1]
    keys += [("circle", "hollow s7", bound)] if any(each.bound is not None for each in points) else []
    keys += [("line", "limit dashed", "budget")] if any(each.limit is not None for each in points) else []
    top = draw_legend(canvas, 16, keys) + 22
    across = named_scale(budgets, 58, _WIDTH - 18)
    known = [value for each in points for value in (*each.y, each.bound, each.limit) if value is not None]
    up = scale_of(known, 285, top, y.show, base=y.base, from_zero=True)
    draw_axes(canvas, across, up, "budget", y.title)
    step = across(1) - across(0) if len(budgets) > 1 else 200.0
    limits = {each.budget: each.limit for each in points if each.limit is not None}
    for name, limit in limits.items():
        middle = across(budgets.index(name))
        canvas.path([(middle - step * 0.42, up(limit)), (middle + step * 0.42, up(limit))], "limit dashed")
    for index, name in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * min(11.0, step * 0.7 / len(series))
        mine = [(across(budgets.index(each.budget)) + shift, each) for each in points if each.series == name]
        _draw_series(canvas, mine, up, y, index % NUM_COLOURS)
    rows = [(each.series, each.budget, *each.y, each.bound, each.limit) for each in points]
    data = csv_of(("experiment", "budget", y.heading, "low", "high", bound, "budget (B)"), rows)
    return Picture(slug(title), title, canvas.svg(title), data, caption)


def _draw_series(canvas: Canvas, points: Sequence[tuple[float, BudgetPoint]], up: Scale, y: Axis, colour: int) -> None:
    canvas.path([(x, up(point.y[0])) for x, point in points], f"line pale s{colour}")
    for x, point in points:
        if point.bound is not None:
            canvas.path([(x, up(point.bound)), (x, up(point.y[0]))], f"whisker s{colour}")
            canvas.mark(x, up(point.bound), f"hollow s{colour}", title=f"{point.series}: {y.show(point.bound)}")
        if point.y[1] != point.y[2]:
            canvas.path([(x, up(point.y[1])), (x, up(point.y[2]))], f"whisker s{colour}")
        text = f"{point.series}, budget {point.budget}: {y.title} {y.show(point.y[0])}"
        canvas.mark(x, up(point.y[0]), f"mark f{colour}", title=text, row=point.row)


def exit_histograms(title: str, rows: Sequence[tuple[str, Sequence[int]]], caption: str = "") -> Picture:
    """Return a picture of the inputs that leave at each exit. A row is a name, and a number for each exit."""
    num_exits = max(len(counts) for _, counts in rows)
    left, first, height = 166.0, 10, 24
    bottom = first + 34 * len(rows)
    step = min(30.0, (_WIDTH - left - 58) / num_exits)
    canvas = Canvas(_WIDTH, bottom + 36)
    for index, (name, counts) in enumerate(rows):
        base, total = first + 34 * index + height, sum(counts) or 1
        canvas.text(left - 8, base - 3, cut(name, 23), "", "end")
        canvas.path([(left, base), (left + step * num_exits, base)], "axis")
        for number, count in enumerate(counts):
            tall = height * count / total
            text = f"{name}: {count} of {total} inputs ({100 * count / total:.1f} %) leave at exit {number + 1}"
            if count:
                canvas.box(left + step * number + 1, base - max(tall, 1), step - 2, max(tall, 1), "f0", text)
        mean = sum((number + 1) * count for number, count in enumerate(counts)) / total
        canvas.path([(x := left + step * (mean - 0.5), base + 1), (x, base + 6)], "limit")
        canvas.text(left + step * num_exits + 8, base - 3, f"{mean:.2f}", "quiet")
    canvas.text(left + step * num_exits + 8, bottom + 8, "mean", "limit-text small")
    every = 1 if step >= 16 else 2 if step >= 9 else 4
    for number in range(0, num_exits, every):
        canvas.text(left + step * (number + 0.5), bottom + 8, str(number + 1), "quiet small", "middle")
    canvas.text(left + step * num_exits / 2, bottom + 26, "exit (layers)", "quiet", "middle")
    heads = ("experiment", *(f"exit {number + 1}" for number in range(num_exits)))
    data = csv_of(heads, [(name, *counts) for name, counts in rows])
    return Picture(slug(title), title, canvas.svg(title), data, caption)


@dataclass(frozen=True)
class Bars:
    """A row of bars from a common zero: negative values to the left. Values are in the order of the legend."""

    name: str
    values: tuple[float, ...]
    group: str = ""


def bar_rows(title: str, rows: Sequence[Bars], legend: Sequence[str], x: Axis, caption: str = "",
             *, on_one_line: bool = False) -> Picture:  # fmt: skip
    """Return a picture of rows of bars, one colour for each name of the legend: below each other, or on one line."""
    lines = [0] * len(legend) if on_one_line else list(range(len(legend)))
    thick = 13 if on_one_line else 7
    tall = thick * (max(lines) + 1) + 7
    heads = [bool(row.group) and (not index or row.group != rows[index - 1].group) for index, row in enumerate(rows)]
    canvas = Canvas(_WIDTH, 0)
    top = draw_legend(canvas, 16, [("box", f"f{index}", name) for index, name in enumerate(legend)]) + 6
    bottom = top + tall * len(rows) + 20 * sum(heads)
    values = [value for row in rows for value in row.values]
    across = scale_of([0.0, *values], 130, _WIDTH - 16, x.show, base=x.base, from_zero=min(values, default=0) >= 0)
    canvas.height = bottom + 40
    for value, text in across.ticks:
        canvas.path([(across(value), top), (across(value), bottom)], "grid")
        canvas.text(across(value), bottom + 16, text, "quiet small", "middle")
    y = top
    for row, has_head in zip(rows, heads, strict=True):
        if has_head:
            canvas.text(10, y + 14, cut(row.group, 60), "head")
            y += 20
        canvas.text(122, y + (tall - 7) / 2 + 4, cut(row.name, 17), "", "end")
        for index, value in enumerate(row.values):
            ends = sorted((across(0), across(value)))
            text = f"{row.group} {row.name}: {legend[index]} {x.show(value)}".strip()
            if value:
                canvas.box(ends[0], y + lines[index] * thick, ends[1] - ends[0], thick - 1, f"f{index}", text)
        y += tall
    canvas.path([(across(0), top), (across(0), bottom)], "axis")
    canvas.text((across.first + across.last) / 2, bottom + 33, x.title, "quiet", "middle")
    units = [f"{name} ({x.unit})" if x.unit else name for name in legend]
    data = csv_of(("group", "name", *units), [(row.group, row.name, *row.values) for row in rows])
    return Picture(slug(title), title, canvas.svg(title), data, caption)
