"""Picture of the stages of a model as SVG: values between stages, shared weights and possible exits.

Needs no library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, MARGIN = 760, 16
BOX_WIDTH, BOX_HEIGHT, GAP = 330, 46, 40
INK, PALE, LINE = "#1f2933", "#eef2f6", "#9aa5b1"
SHARED, EXIT = "#b45309", "#047857"
_FONT = 'font-family="ui-sans-serif, system-ui, sans-serif"'


@dataclass(frozen=True)
class StageBox:
    """One stage of the picture.

    `flows` describes its input values; `shared` names shards that other stages also use.
    """

    title: str
    detail: str
    flows: Sequence[str] = ()
    shared: Sequence[str] = ()
    has_exit: bool = False
    """True if an exit can be placed before this stage."""


def draw_stages(title: str, boxes: Sequence[StageBox]) -> str:
    """Return the picture as SVG text."""
    top = MARGIN + 34
    height = top + len(boxes) * (BOX_HEIGHT + GAP) - GAP + MARGIN
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {_FONT}>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(MARGIN, MARGIN + 14, title, 15, INK, bold=True),
    ]
    for index, box in enumerate(boxes):
        y = top + index * (BOX_HEIGHT + GAP)
        if index:
            parts += _arrow(y, box)
        parts += _box(y, box)
    return "\n".join([*parts, "</svg>", ""])


def _box(y: int, box: StageBox) -> list[str]:
    drawn = [
        f'<rect x="{MARGIN}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" fill="{PALE}" stroke="{LINE}"/>',
        _text(MARGIN + 12, y + 19, _cut(box.title, 44), 13, INK, bold=True),
        _text(MARGIN + 12, y + 36, _cut(box.detail, 52), 11, INK),
    ]
    if box.shared:
        x, middle = MARGIN + BOX_WIDTH, y + BOX_HEIGHT / 2
        line = f'x1="{x}" y1="{middle}" x2="{x + 26}" y2="{middle}" stroke="{SHARED}"'
        drawn.append(f'<line {line} stroke-dasharray="3 3"/>')
        drawn.append(_text(x + 32, middle + 4, _cut("shared: " + ", ".join(box.shared), 58), 11, SHARED))
    return drawn


def _arrow(y: int, box: StageBox) -> list[str]:
    x, start = MARGIN + 40, y - GAP
    drawn = [
        f'<line x1="{x}" y1="{start}" x2="{x}" y2="{y - 5}" stroke="{INK}"/>',
        f'<path d="M {x - 4} {y - 7} L {x} {y} L {x + 4} {y - 7} Z" fill="{INK}"/>',
        _text(x + 12, start + GAP / 2 + 4, _cut(", ".join(box.flows) or "no values", 84), 11, INK),
    ]
    if box.has_exit:
        middle = start + GAP / 2
        drawn.append(f'<circle cx="{x}" cy="{middle}" r="6" fill="white" stroke="{EXIT}" stroke-width="2"/>')
        drawn.append(_text(x - 34, middle + 4, "exit", 11, EXIT))
    return drawn


def _text(x: float, y: float, text: str, size: int, colour: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{weight}>{escape(text)}</text>'


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
