"""Picture of the memory of one run over time: budget, stages as bands, and lanes of reads and waits below.

Start-up, which takes longer than a short run, is compressed into a narrow panel on the left.

The curve has the resolution of the samples, so the peak of the kernel can be higher.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import import_error
from offramp.units import format_duration, format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from offramp.measure import MemorySample, Span

_MIB = 1 << 20
_LONGEST_LABEL = 80
_LABEL_POINTS = 7.5
_INK, _QUIET, _LINE = "#1f2933", "#616e7c", "#c3cad1"
_RSS, _ANON, _BUDGET, _WAIT = "#1d4e89", "#a9c6e3", "#c62828", "#e08e45"
_BANDS = ("#f5efdf", "#e6eee0")  # stages with even and odd numbers
_LANES = {"read": _RSS, "idle_read": _ANON, "wait": _WAIT}  # from top to bottom
_MEANING = {"read": "reading weights", "idle_read": "reading between passes", "wait": "waiting for weights"}
_START_UP_WIDTH = 0.08  # of the whole picture
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _QUIET),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _LINE),
    "text.usetex": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "svg.fonttype": "none",  # text stays searchable and accessible to screen readers
    "svg.hashsalt": "offramp",  # equal inputs give equal bytes
}


@dataclass(frozen=True)
class _Band:
    """One stage in a pass. `bars` are its computations as (begin, width) in milliseconds of the picture."""

    stage: int
    name: str
    bars: list[tuple[float, float]]

    @property
    def ends(self) -> tuple[float, float]:
        """Begin and end in milliseconds of the picture."""
        return self.bars[0][0], sum(self.bars[-1])


def draw_memory(
    path: str | PathLike[str],
    samples: Sequence[MemorySample],
    spans: Sequence[Span],
    budget_bytes: int | None,
    title: str = "Memory of one run",
    begin_seconds: float | None = None,
) -> None:
    """Draw the memory of a run to `path`, an `.svg` or `.png` file.

    Args:
        path: output file; its suffix selects the format.
        samples: at least one sample, on the same clock as `spans`.
        spans: `compute` and `head` spans become bands; `read`, `idle_read` and `wait` spans become lanes below.
        budget_bytes: drawn as a dashed line; None draws no line.
        title: title of the picture. The title and the names of spans may contain any text.
        begin_seconds: when the first input was given; earlier samples are start-up. None: when the first span began.

    Raises:
        ValueError: another suffix, or no samples.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise ValueError(f"path must end in .svg or .png, got {str(path)!r}")
    if not samples:
        raise ValueError("samples must not be empty")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise import_error(error, "matplotlib", "report") from None
    no_timestamp = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Missing glyphs: the viewer of an SVG substitutes a font, a PNG shows a box.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        found = [span.start_seconds for span in spans] if begin_seconds is None else [begin_seconds]
        begin = min(found, default=samples[0].seconds)
        _figure(samples, spans, budget_bytes, title, begin).savefig(path, dpi=160, metadata=no_timestamp)


def _figure(
    samples: Sequence[MemorySample], spans: Sequence[Span], budget_bytes: int | None, title: str, begin: float
) -> Figure:
    from matplotlib.figure import Figure

    end = max([samples[-1].seconds, *(span.end_seconds for span in spans)])
    lanes = [kind for kind in _LANES if any(span.kind == kind for span in spans)]
    widths = [_START_UP_WIDTH, 1 - _START_UP_WIDTH] if samples[0].seconds < begin else [1]

    figure = Figure(figsize=(9.6, 4.8))
    edges = {"left": 0.075, "right": 0.98, "top": 0.80, "bottom": 0.105, "hspace": 0.05, "wspace": 0.02}
    ratios = {"height_ratios": [20, 1 + len(lanes)], "width_ratios": widths}
    grid = {"sharex": "col", "sharey": "row", "squeeze": False, "gridspec_kw": edges}
    panels, rows = figure.subplots(2, len(widths), **grid, **ratios)
    memory, activity = panels[-1], rows[-1]
    panels[0].set_ylabel("memory (MiB)")
    if len(widths) > 1:
        _prepare_start_up(panels[0], rows[0], begin - samples[0].seconds)
    memory.set_xlim(0, (end - begin) * 1e3 or 1)
    for axes in panels:
        _draw_curve(axes, samples, begin)
    _draw_limits(panels, samples, begin, budget_bytes)
    bands = _bands(spans, begin)
    _draw_bands(memory, bands)
    _draw_exits(memory, spans, begin)
    _draw_lanes(activity, spans, lanes, begin)
    _draw_legend(memory, lanes, has_bands=bool(bands))
    figure.text(0.075, 0.93, _label(title), fontsize=12, fontweight="bold", parse_math=False)
    return figure


def _prepare_start_up(panel: Axes, row: Axes, seconds: float) -> None:
    """Prepare the panel of start-up, whose time has a scale of its own, and the row below it."""
    panel.set_xlim(-seconds * 1e3, 0)
    panel.set_facecolor("#f4f5f6")
    row.set_xticks([])
    row.tick_params(axis="y", length=0)
    row.spines[:].set_visible(False)
    row.set_xlabel(f"start-up {format_duration(seconds)}", fontsize=_LABEL_POINTS, labelpad=17)


def _draw_legend(axes: Axes, lanes: Sequence[str], has_bands: bool) -> None:
    """Explain every mark of the picture, in lines above it."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    keys: list[Any]
    keys, labels = axes.get_legend_handles_labels()
    if has_bands:
        keys.append(tuple(Patch(facecolor=tint, edgecolor=_LINE, linewidth=0.4) for tint in _BANDS))
        labels.append("computing, by stage")
    keys += [Patch(color=_LANES[kind]) for kind in lanes]
    labels += [_MEANING[kind] for kind in lanes]
    place = {"loc": "lower left", "bbox_to_anchor": (0.067, 0.805), "bbox_transform": axes.figure.transFigure}
    style = {"ncols": 5, "frameon": False, "borderaxespad": 0.2, "fontsize": 8, "columnspacing": 1.4}
    axes.legend(keys, labels, handler_map={tuple: HandlerTuple(ndivide=None)}, **place, **style)


def _draw_curve(axes: Axes, samples: Sequence[MemorySample], begin: float) -> None:
    milliseconds = [(sample.seconds - begin) * 1e3 for sample in samples]
    rss_mib = [sample.rss_bytes / _MIB for sample in samples]
    anon_mib = [sample.anon_bytes / _MIB for sample in samples if sample.anon_bytes is not None]
    axes.plot(milliseconds, rss_mib, color=_RSS, linewidth=1.6, label="resident set", zorder=4)
    if len(anon_mib) == len(samples):
        axes.fill_between(milliseconds, anon_mib, color=_ANON, alpha=0.8, lw=0, label="anonymous part", zorder=2)
    axes.tick_params(axis="x", length=0, labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_limits(
    panels: Sequence[Axes], samples: Sequence[MemorySample], begin: float, budget_bytes: int | None
) -> None:
    """Draw the peak, which start-up may set, and the budget, with their labels."""
    memory, top = panels[-1], max(samples, key=lambda sample: sample.rss_bytes)
    peak_mib, budget_mib = top.rss_bytes / _MIB, (budget_bytes or 0) / _MIB
    height = 1.22 * max(peak_mib, budget_mib)
    memory.set_ylim(0, height)
    if budget_bytes is not None:
        for axes in panels:
            axes.axhline(budget_mib, color=_BUDGET, linewidth=1.3, linestyle=(0, (5, 3)), label="budget", zorder=3)
        end = memory.get_xlim()[1], budget_mib
        _note(memory, f"budget {format_size(budget_bytes)}", end, (-2, 4), "right", _BUDGET)

    axes = panels[0] if top.seconds < begin else memory
    peak = (top.seconds - begin) * 1e3, peak_mib
    exceeds = budget_bytes is not None and top.rss_bytes > budget_bytes
    beneath = abs(budget_mib - peak_mib) < 0.12 * height  # keeps the two labels from overlapping
    side = "right" if peak[0] > memory.get_xlim()[1] / 2 else "left"
    color = _BUDGET if exceeds else _RSS
    axes.plot(*peak, "o", color=color, markersize=5, zorder=5, clip_on=False)
    axes.set_zorder(1)  # the label may extend over the other panel
    axes.patch.set_visible(axes is not memory)
    offset = (-6 if side == "right" else 6, -18 if beneath else 7)
    _note(axes, f"peak {format_size(top.rss_bytes)}", peak, offset, side, color)


def _note(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], side: str, color: str
) -> None:
    """Write a text beside a point; the offset is in points of the page."""
    halo = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    style = {"ha": side, "color": color, "weight": "bold", "bbox": halo, "zorder": 6}
    axes.annotate(text, point, offset, textcoords="offset points", **style)


def _bands(spans: Sequence[Span], origin: float) -> list[_Band]:
    found: dict[tuple[int, int], _Band] = {}
    for span in sorted(spans, key=lambda span: span.start_seconds):
        if span.kind in ("compute", "head"):
            band = found.setdefault((span.pass_index, span.stage), _Band(span.stage, _label(span.name), []))
            band.bars.append(_bar(span, origin))
    return list(found.values())


def _bar(span: Span, origin: float) -> tuple[float, float]:
    return (span.start_seconds - origin) * 1e3, (span.end_seconds - span.start_seconds) * 1e3


def _draw_bands(axes: Axes, bands: Sequence[_Band]) -> None:
    """Tint the full height while the engine computes; waits stay white."""
    whole_height = axes.get_xaxis_transform()
    for parity, tint in enumerate(_BANDS):
        bars = [bar for band in bands if band.stage % 2 == parity for bar in band.bars]
        axes.broken_barh(bars, (0, 1), transform=whole_height, color=tint, linewidth=0, antialiased=False, zorder=0)
    for band, text in _fitting(axes, bands):
        style = {"fontsize": _LABEL_POINTS, "color": _QUIET, "ha": "center", "va": "center", "zorder": 6}
        axes.text(sum(band.ends) / 2, 0.955, text, transform=whole_height, parse_math=False, **style)


def _fitting(axes: Axes, bands: Sequence[_Band]) -> list[tuple[_Band, str]]:
    """Return the labels that fit their bands: names if most of them fit, otherwise numbers."""
    for text in (lambda band: band.name), (lambda band: str(band.stage)):
        fitting = [(band, text(band)) for band in bands if _text_width(text(band)) < _band_width(axes, band)]
        if 2 * len(fitting) > len(bands):
            return fitting
    return []


def _text_width(text: str) -> float:
    """Return the width of a text in points, including padding."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return 1.2 * text_to_path.get_text_width_height_descent(text, FontProperties(size=_LABEL_POINTS), False)[0]


def _band_width(axes: Axes, band: _Band) -> float:
    """Return the width of a band in points."""
    (begin, _), (end, _) = axes.transData.transform([(x, 0) for x in band.ends])
    return (end - begin) * 72 / axes.figure.dpi


def _draw_exits(axes: Axes, spans: Sequence[Span], origin: float) -> None:
    """Mark each evaluated exit; a filled mark is the last exit of its pass, the one whose answer is returned."""
    heads = sorted((span for span in spans if span.kind == "head"), key=lambda span: span.start_seconds)
    last = {span.pass_index: span for span in heads}
    answers = [span for span in heads if span is last[span.pass_index]]
    evaluated = [span for span in heads if span is not last[span.pass_index]]
    edge = {"markersize": 6, "markeredgecolor": _INK, "markeredgewidth": 0.8}
    style: dict[str, Any] = {**edge, "transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 6}
    for exits, face, label in ((evaluated, "white", "exit evaluated"), (answers, _INK, "exit taken")):
        if exits:
            ends = [sum(_bar(span, origin)) for span in exits]
            axes.plot(ends, [0.985] * len(exits), "v", markerfacecolor=face, label=label, **style)


def _draw_lanes(axes: Axes, spans: Sequence[Span], lanes: Sequence[str], origin: float) -> None:
    for height, kind in enumerate(reversed(lanes)):
        bars = [_bar(span, origin) for span in spans if span.kind == kind]
        seam = 0.0 if kind == "wait" else 0.3  # separates consecutive reads; it would hide a short wait
        axes.broken_barh(bars, (height - 0.3, 0.6), facecolor=_LANES[kind], edgecolor="white", linewidth=seam)
    axes.set_ylim(-0.6, len(lanes) - 0.4)
    axes.set_yticks(range(len(lanes)), [kind.replace("_", " ") for kind in reversed(lanes)])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("time (ms)")


def _label(text: str) -> str:
    """Return `text` as a short single line that is valid in XML.

    Names of stages come from stores, which are untrusted.
    """
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text[: _LONGEST_LABEL + 1])
    return shown if len(shown) <= _LONGEST_LABEL else shown[: _LONGEST_LABEL - 3] + "..."
