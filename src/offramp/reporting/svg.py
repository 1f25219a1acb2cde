"""Parts of a picture as SVG text: a canvas, scales with round ticks, axes and a legend.

Colours are classes of templates/picture.css, so that a page can draw them light and dark: `f0` to `f7` fill with the
colour of a series, `s0` to `s7` stroke with it. A picture that stands alone has the light style. All text is escaped:
names of models and stages may be anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from offramp.reporting.tables import printable

TEMPLATES = Path(__file__).parent / "templates"
NUM_COLOURS = 8
_CHAR_WIDTH = 6.1
_TINY = 1e-12
"""Smallest value, and smallest difference of values, that a scale shows: a picosecond."""


def width_of(text: str) -> float:
    """Return the approximate width of a text."""
    return _CHAR_WIDTH * len(text)


_UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"
"""Drawn for characters that XML does not allow, and for ends of lines."""


def _safe(text: str) -> str:
    return escape(printable(text, _UNPRINTABLE))


def cut(text: str, length: int) -> str:
    """Return a text as one printable line of at most `length` letters, without its middle if it is longer."""
    shown = printable(text, _UNPRINTABLE)
    if len(shown) <= length:
        return shown
    return shown[: (length - 1) // 2] + "…" + shown[len(shown) - length // 2 :]


def number(value: float) -> str:
    """Return a coordinate with one decimal."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass
class Canvas:
    """A drawing area that collects elements. Coordinates grow to the right and downwards."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Write a text; `anchor` is `start`, `middle` or `end`."""
        place = "" if anchor == "start" else f' text-anchor="{anchor}"'
        style = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text x="{number(x)}" y="{number(y)}"{style}{place}>{_safe(text)}</text>')

    def path(self, points: Sequence[tuple[float, float]], kind: str, *, closed: bool = False) -> None:
        """Draw a line through points, or the area that they enclose."""
        steps = " ".join(f"{number(x)},{number(y)}" for x, y in points)
        self.parts.append(f'<poly{"gon" if closed else "line"} points="{steps}" class="{kind}"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
        """Draw a rectangle, with the text that is shown where the pointer is."""
        size = f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 0.4))}" height="{number(max(height, 0))}"'
        self.parts.append(_titled(f'<rect {size} class="{kind}"', "rect", title))

    def mark(self, x: float, y: float, kind: str, *, shape: str = "circle", title: str = "", row: str = "") -> None:
        """Draw a mark that refers to a row of a table. Shapes: `circle`, `diamond`, `square`, `triangle`."""
        if shape == "circle":
            drawn = _titled(f'<circle cx="{number(x)}" cy="{number(y)}" r="4.6" class="{kind}"', "circle", title)
        else:
            corners = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in _SHAPES[shape])
            drawn = _titled(f'<polygon points="{corners}" class="{kind}"', "polygon", title)
        self.parts.append(f'<a href="#{_safe(row)}">{drawn}</a>' if row else drawn)

    def svg(self, title: str) -> str:
        """Return the elements as a picture that stands alone."""
        size = f'width="{number(self.width)}" height="{number(self.height)}"'
        view = f'viewBox="0 0 {number(self.width)} {number(self.height)}" role="img" aria-label="{_safe(title)}"'
        return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view}>', *self.parts, "</svg>"])


_SHAPES = {
    "diamond": ((0, -6), (6, 0), (0, 6), (-6, 0)),
    "square": ((-4.4, -4.4), (4.4, -4.4), (4.4, 4.4), (-4.4, 4.4)),
    "triangle": ((-5, -7), (5, -7), (0, 1)),
}


def _titled(element: str, name: str, title: str) -> str:
    return f"{element}><title>{_safe(title)}</title></{name}>" if title else f"{element}/>"


@dataclass(frozen=True)
class Scale:
    """Maps values to coordinates from `first` to `last`; a scale of names has its places as values."""

    low: float
    high: float
    first: float
    last: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the coordinate of a value."""
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.first + (value - low) / ((high - low) or 1) * (self.last - self.first)


def scale_of(values: Sequence[float], first: float, last: float, show: Callable[[float], str], *,
             base: float = 10.0, from_zero: bool = False) -> Scale:  # fmt: skip
    """Return a scale that contains all values, with round ticks: of units of `base`, logarithmic over a wide range."""
    low, high = min(values), max(values)
    if low > _TINY and high / low > 30 and not from_zero:
        return _log_scale(low, high, first, last, show, base)
    low = min(low, 0.0) if from_zero else low
    spread = high - low if high - low > _TINY else abs(high) if abs(high) > _TINY else 1.0
    low, high = (low if from_zero else low - 0.06 * spread), high + (0.1 if from_zero else 0.06) * spread
    step = _round_step((high - low) / max(2, min(6, abs(last - first) / 62)), base)
    ticks, index = [], math.ceil(low / step - 1e-9)
    while index * step <= high + 1e-9 * step:
        ticks.append((index * step, _tidy(show(index * step))))
        index += 1
    return Scale(low, high, first, last, tuple(ticks))


def _log_scale(low: float, high: float, first: float, last: float, show: Callable[[float], str], base: float) -> Scale:
    low, high = low / 1.25, high * 1.25
    factor = 4 if base == 2 else 10
    unit = factor ** math.floor(math.log(low, factor))
    places = [unit * factor**power for power in range(int(math.log(high / unit, factor)) + 1)]
    if len(places) < 4:
        places = sorted(place * part for place in places for part in ((1, 2) if base == 2 else (1, 2, 5)))
    shown = [place for place in places if low <= place <= high]
    shown = shown[:: 1 + (len(shown) - 1) // 6]
    return Scale(low, high, first, last, tuple((place, _tidy(show(place))) for place in shown), is_log=True)


def _tidy(text: str) -> str:
    """Return a number without zeros behind its point, and zero without a unit."""
    shown = re.sub(r"\.0+(?= |$)", "", text)
    return "0" if shown.partition(" ")[0] in ("0", "-0") else shown


def _round_step(step: float, base: float) -> float:
    """Return a round number of at least `step`: 1, 2 or 5 times a power of 10, or for base 2 the same in MiB or KiB."""
    unit = next((float(1 << shift) for shift in (30, 20, 10) if step >= 1 << shift), 1.0) if base == 2 else 1.0
    power = 10 ** math.floor(math.log10(step / unit))
    return unit * power * next(each for each in (1, 2, 5, 10) if each * power >= step / unit * (1 - 1e-9))


def named_scale(names: Sequence[str], first: float, last: float) -> Scale:
    """Return a scale of names at equal distances: the place of a name is its index. Some of many are written."""
    every = -(-len(names) // 7)
    ticks = tuple((index, cut(names[index], 14)) for index in range(0, len(names), every))
    return Scale(-0.5, len(names) - 0.5, first, last, ticks)


def draw_axes(canvas: Canvas, x: Scale, y: Scale, x_title: str, y_title: str) -> None:
    """Draw grid, ticks and titles of two axes."""
    for value, text in y.ticks:
        canvas.path([(x.first, y(value)), (x.last, y(value))], "grid")
        canvas.text(x.first - 7, y(value) + 4, text, "quiet small", "end")
    for value, text in x.ticks:
        canvas.path([(x(value), y.first), (x(value), y.first + 4)], "axis")
        canvas.text(x(value), y.first + 16, text, "quiet small", "middle")
    canvas.path([(x.first, y.first), (x.last, y.first)], "axis")
    canvas.text((x.first + x.last) / 2, y.first + 33, x_title, "quiet", "middle")
    canvas.text(8, y.last - 12, y_title, "quiet")


def draw_legend(canvas: Canvas, top: float, entries: Sequence[tuple[str, str, str]]) -> float:
    """Draw shapes, classes and texts in lines; return where the next thing can begin."""
    x, y = 10.0, top
    for shape, kind, text in entries:
        shown = cut(text, 34)
        if x > 10 and x + 22 + width_of(shown) > canvas.width:
            x, y = 10.0, y + 17
        if shape in ("line", "box"):
            _draw_key(canvas, x, y, shape, kind)
        else:
            canvas.mark(x + 2, y - 4 + (3 if shape == "triangle" else 0), kind, shape=shape)
        canvas.text(x + 14, y, shown, "quiet")
        x += 36 + width_of(shown)
    return y + 10 if entries else top


def _draw_key(canvas: Canvas, x: float, y: float, shape: str, kind: str) -> None:
    if shape == "line":
        canvas.path([(x - 4, y - 4), (x + 9, y - 4)], kind)
    else:
        canvas.box(x - 3, y - 9, 11, 10, kind)


def alone(svg: str) -> str:
    """Return a picture with its own style, on white. Colours are written out: not all programs know variables."""
    light, _, rules = (TEMPLATES / "picture.css").read_text(encoding="utf-8").partition("@media")
    colours = dict(re.findall(r"--(\w+): ([^;]+);", light))
    rules = rules[rules.index("\nsvg") :]
    style = re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], rules).replace("\nsvg ", "\n")
    head, _, rest = svg.partition(">")
    return f'{head}><style>{style}</style><rect width="100%" height="100%" fill="#ffffff"/>{rest}\n'
