"""Pictures of a report, from its subjects: fronts, budgets, exits, classes, stages, memory over time.

Shapes: R rounds, N rows of data, K exits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from offramp.experiments.comparison import FIGURES
from offramp.experiments.results import Record
from offramp.experiments.searching import is_surpassed
from offramp.experiments.subjects import Group, Subject, estimate, values_of
from offramp.measure import MemorySample, Span, median
from offramp.program.consistency import MAX_STEPS
from offramp.reporting.layers import StageCost, add_passes, stage_names
from offramp.reporting.pictures import (
    Axis,
    Bars,
    BudgetPoint,
    Picture,
    Point,
    against_budgets,
    bar_rows,
    exit_histograms,
    scatter,
)
from offramp.reporting.svg import NUM_COLOURS
from offramp.reporting.tables import Cell, Column, Row, Table
from offramp.reporting.timeline import Run, draw_timeline
from offramp.tasks.examples import spread
from offramp.units import format_duration, format_size

MOST_TIMELINES = 20
_MOST_ROWS = 24
AXES = {
    "score": Axis("score", "%", lambda value: f"{value:.1f}"),
    "latency": Axis("latency", "s", format_duration),
    "memory": Axis("peak memory", "B", format_size, base=2),
    "bytes": Axis("read per input", "B", format_size, base=2),
}
"""Figure -> the axis that shows it."""
_SAME_ANSWERS = (
    "budget", "backend", "threads", "batch", "reads", "verify", "profile", "slots", "residency", "resident_layers",
    "prefetch", "trace",
)  # fmt: skip
"""Options that change how fast an answer is computed, and not which exit gives it."""
_BOUNDS = {"memory": ("predicted_memory", "predicted"), "latency": ("bound", "lower bound")}
"""Figure -> the figure that it is drawn beside, and what that is called."""
_MOST_MODELS = 4


def fronts(group: Group) -> list[Picture]:
    """Return the score against latency, memory and bytes read; without scores, the latency against memory."""
    pairs = [("latency", "score"), ("memory", "score"), ("bytes", "score")]
    if not any(subject.with_figure("score") for subject in group.subjects):
        pairs = [("memory", "latency")]
    found = []
    for x, y in pairs:
        able = [each for each in group.subjects if each.with_figure(x) and each.with_figure(y)]
        points = _points(group, able, x, y)
        if len({(point.x[0], point.y[0]) for point in points}) > 1:
            found.append(scatter(f"{group.title}: {AXES[y].title} and {AXES[x].title}", points, AXES[x], AXES[y]))
    return found


def _points(group: Group, subjects: Sequence[Subject], x: str, y: str) -> list[Point]:
    ends = {each: (_interval(each, x), _interval(each, y)) for each in subjects}
    sign = -1 if y == "score" else 1
    corners = {each: (across[0], sign * up[0]) for each, (across, up) in ends.items() if _shape(each) == "circle"}
    found = []
    for each, (across, up) in ends.items():
        is_first = each in corners and not is_surpassed(corners[each], corners.values())
        label = group.name(each, (group.coloured,)) if is_first else ""
        about = group.name(each), group.series(each)
        found.append(Point(*about, across, up, group.labels.get(each, ""), _shape(each), label))
    return found


def _shape(subject: Subject) -> str:
    if subject.flat.get("rival"):
        return "diamond"
    return "square" if subject.is_bound else "circle"


def _interval(subject: Subject, name: str) -> tuple[float, float, float]:
    """Return a figure and the ends of its interval; without an interval, the figure three times."""
    found = estimate(FIGURES[name], subject)
    return (
        found.value,
        found.value if found.low is None else found.low,
        found.value if found.high is None else found.high,
    )


def budgets(group: Group) -> list[Picture]:
    """Return peak memory and latency against the budget, each beside its bound; latencies of each model apart."""
    able = [each for each in group.subjects if each.with_figure("latency") and not each.flat.get("rival")]
    if len({each.flat["budget"] for each in able}) < 2:
        return []
    able.sort(key=lambda each: _budget_order(each.flat["budget"]))
    found = [_against_budgets(group, able, "memory", ("budget", "exit"), "")]
    models = sorted({group.show(each, "model") for each in able})
    for model in models[:_MOST_MODELS]:
        mine = [each for each in able if group.show(each, "model") == model]
        about = f", {model}" if len(models) > 1 else ""
        found.append(_against_budgets(group, mine, "latency", ("budget", "model"), about))
    return [picture for picture in found if picture is not None]


def _against_budgets(group: Group, subjects: Sequence[Subject], name: str, without: Sequence[str],
                     about: str) -> Picture | None:  # fmt: skip
    """Return a figure against the budget; subjects that differ in the options `without` alone are one series."""
    bound, meaning = _BOUNDS[name]
    points: dict[tuple[str, str], BudgetPoint] = {}
    for each in subjects:
        if each.with_figure(name):
            point = _budget_point(group, each, name, bound, group.name(each, without))
            points.setdefault((point.series, point.budget), point)
    series = sorted({point.series for point in points.values()})
    shown = series[:NUM_COLOURS]
    caption = f"{len(series) - NUM_COLOURS} more series are in the table." if len(series) > NUM_COLOURS else ""
    kept = [point for one in shown for point in points.values() if point.series == one]
    order = list(dict.fromkeys(group.show(each, "budget") for each in subjects))
    title = f"{group.title}: {AXES[name].title} and budget{about}"
    return against_budgets(title, kept, order, AXES[name], meaning, caption) if kept else None


def _budget_order(budget: object) -> tuple[int, int]:
    return (0, budget) if isinstance(budget, int) else (1 if budget != "resident" else 2, 0)


def _budget_point(group: Group, subject: Subject, name: str, bound: str, series: str) -> BudgetPoint:
    bounds = [record["figures"].get(bound) for record in subject.with_figure(name).values()]
    known = [value for value in bounds if value is not None]
    budget = subject.flat["budget"]
    limit = budget if name == "memory" and isinstance(budget, int) else None
    ends, where = _interval(subject, name), group.labels.get(subject, "")
    return BudgetPoint(group.show(subject, "budget"), series, ends, median(known) if known else None, limit, where)


def exits(group: Group) -> list[Picture]:
    """Return the histograms of the exits that inputs left at; subjects with the same answers are one row."""
    found: dict[str, tuple[int, ...]] = {}
    for subject in group.subjects:
        counts = Counter(exit for record in _first_rounds(subject) for exit in _exits_of(record))
        if counts:
            numbers = tuple(counts[number + 1] for number in range(max(counts)))
            name = group.name(subject, _SAME_ANSWERS)
            found.setdefault(name if found.get(name, numbers) == numbers else group.name(subject), numbers)
    if not found:
        return []
    most = max(map(len, found.values()))
    rows = [(name, counts + (0,) * (most - len(counts))) for name, counts in found.items()]
    caption = f"{_MOST_ROWS} of {len(rows)} are drawn." if len(rows) > _MOST_ROWS else ""
    return [exit_histograms(f"{group.title}: exits", spread(rows, _MOST_ROWS), caption)]


def _exits_of(record: Record) -> list[int]:
    """Return the exit of each input; converted records may hold something else by this name."""
    found = record["samples"].get("exits")
    is_sound = isinstance(found, list) and all(isinstance(each, int) and 0 < each <= MAX_STEPS for each in found)
    return found if is_sound else []


def _first_rounds(subject: Subject) -> list[Record]:
    """Return the first record of each seed."""
    return list({record["experiment"]["seed"]: record for record in reversed(subject.done)}.values())[::-1]


def classes_table(group: Group, name: str) -> Table | None:
    """Return overthinking and damage of each exit rule for each class, against the last exit on the same rows.

    Overthinking: the exit is right and the last one wrong (Kaya et al., ICML 2019). Damage: the reverse.
    """
    rows, seen = [], set()
    for subject in group.subjects:
        full, label = group.full_of(subject), group.name(subject, _SAME_ANSWERS)
        if full is None or full is subject or label in seen:
            continue
        counted = _per_class(subject, full)
        if counted:
            seen.add(label)
        for each, (inputs, gained, lost) in sorted(counted.items()):
            shares = [100 * count / inputs for count in (gained, lost)]
            rows.append(Row((Cell(label), Cell(each), Cell(str(inputs)), *(Cell(f"{x:.1f} %", x) for x in shares))))
    if not rows:
        return None
    columns = (
        Column("experiment", is_text=True), Column("class", is_text=True), Column("inputs"),
        Column("overthinking", "%", help="Inputs that the exit classifies correctly, and the last exit wrongly"),
        Column("damage", "%", help="Inputs that the exit classifies wrongly, and the last exit correctly"),
    )  # fmt: skip
    return Table(name, f"{group.title}: overthinking and damage by class", columns, tuple(rows))


def _per_class(subject: Subject, full: Subject) -> dict[str, list[int]]:
    """Return for each class the inputs, those that only the exit has right, and those that only the last exit has."""
    found: dict[str, list[int]] = {}
    whole = {record["experiment"]["seed"]: record["samples"] for record in _first_rounds(full)}
    for record in _first_rounds(subject):
        mine, other = record["samples"], whole.get(record["experiment"]["seed"])
        if other is None or mine.get("truth") is None or mine["truth"] != other.get("truth"):
            continue
        if {"pearson", "spearman"} & set(mine["metrics"]):
            continue
        for truth, answer, last in zip(mine["truth"], mine["answers"], other["answers"], strict=True):
            counts = found.setdefault(_class_name(mine, truth), [0, 0, 0])
            counts[0] += 1
            counts[1] += answer == truth != last
            counts[2] += answer != truth == last
    return found


def _class_name(samples: Record, truth: Any) -> str:
    """Return the name of a class: records may hold ids with or without names, or names."""
    if not isinstance(truth, int):
        return str(truth)
    labels = samples.get("labels") or ()
    return str(labels[truth]) if 0 <= truth < len(labels) else f"class {truth}"


def classes(table: Table) -> Picture:
    """Return the picture of a table of classes: damage to the left, overthinking to the right; whole experiments."""
    experiments: dict[str, list[Bars]] = {}
    for row in table.rows:
        label, name, inputs, gained, lost = row.cells
        ends = -float(lost.value or 0), float(gained.value or 0)
        experiments.setdefault(label.text, []).append(Bars(f"{name.text} ({inputs.text})", ends, label.text))
    number = max(1, _MOST_ROWS * len(experiments) // len(table.rows))
    rows = [row for label in spread(list(experiments), number) for row in experiments[label]][:_MOST_ROWS]
    caption = f"{len(rows)} of {len(table.rows)} rows are drawn." if len(rows) < len(table.rows) else ""
    axis = Axis("% of the inputs of a class: damage | overthinking", "%", lambda value: f"{abs(value):.3g}")
    return bar_rows(table.title, rows, ("damage", "overthinking"), axis, caption, on_one_line=True)


def runs_to_draw(groups: Sequence[Group]) -> set[Subject]:
    """Return at most `MOST_TIMELINES` subjects with traced runs, among which each value of each option is about
    equally frequent.
    """
    left = [(group, each) for group in groups for each in group.subjects if _traced_record(each) is not None]
    names = [name for name, values in values_of([each for _, each in left]).items() if len(values) > 1]
    used: Counter[tuple[str, str]] = Counter()
    values = {each: [*((name, str(each.flat.get(name))) for name in names), ("", group.title)] for group, each in left}
    kept: list[Subject] = []
    while len(kept) < min(MOST_TIMELINES, len(left)):
        rarest = min((each for each in values if each not in kept), key=lambda each: sum(used[v] for v in values[each]))
        kept.append(rarest)
        used.update(values[rarest])
    return set(kept)


def traced(group: Group, drawn: Collection[Subject]) -> tuple[list[Picture], list[Picture], tuple[str, ...]]:
    """Return the memory over time, and the times of stages, of the subjects of `drawn`, and a sentence that says how
    many other runs were traced, if any were.
    """
    over_time, stages, others = [], [], 0
    for subject in group.subjects:
        record = _traced_record(subject)
        if record is not None and subject in drawn:
            over_time.append(_timeline(group, subject, record))
            stages += _stages(group, subject, record)
        elif record is not None:
            others += 1
    number = len(over_time)
    left_out = (
        f"The memory over time of {number} of {number + others} traced experiments is drawn: a report has at most"
        f" {MOST_TIMELINES} such pictures. To see others, report some experiments alone, such as: --only exit=none."
    )
    return over_time, stages, (left_out,) if others else ()


def _traced_record(subject: Subject) -> Record | None:
    return next((each for each in subject.done if each["samples"].get("memory")), None)


def _spans(record: Record) -> list[Span]:
    return [Span(*each) for each in record["samples"].get("spans", ())]


def _timeline(group: Group, subject: Subject, record: Record) -> Picture:
    samples = [MemorySample(*each) for each in record["samples"]["memory"]]
    limit, peak = record.get("run", {}).get("budget_bytes"), record["figures"].get("memory")
    # The limit of a run without a budget is what the machine has.
    is_near = isinstance(limit, int) and limit <= 4 * max(sample.rss_bytes for sample in samples)
    run = Run(samples, _spans(record), limit if is_near else None, peak)
    return draw_timeline(f"{group.title}: memory over time, {group.name(subject)}", run)


def _stages(group: Group, subject: Subject, record: Record) -> list[Picture]:
    spans = _spans(record)
    if not any(span.kind == "compute" for span in spans):
        return []
    names = stage_names(spans)
    last = max(span.stage for span in spans)
    stages = [StageCost(names.get(index, f"stage {index}"), 0, 0) for index in range(last + 1)]
    add_passes(stages, spans)
    rows = [
        Bars(each.stage, tuple(ms / 1e3 for ms in (each.read_ms, each.compute_ms, each.wait_ms))) for each in stages
    ]
    axis = Axis("mean time of a pass", "s", format_duration)
    title = f"{group.title}: stages, {group.name(subject)}"
    return [bar_rows(title, rows, ("read", "compute", "wait"), axis)]


def bins_of(subject: Subject) -> tuple[int, ...]:
    """Return a histogram of the raw latencies of all rounds, without the slowest percent."""
    samples = [value for record in subject.done for value in record["samples"].get("latencies") or ()]
    if len(samples) < 10:
        return ()
    least, top = min(samples), np.percentile(samples, 99)
    is_wide = top - least > 1e-9 * abs(least)  # NumPy refuses bins that a float does not tell apart
    counts, _ = np.histogram(samples, bins=24, range=(least, top if is_wide else least + max(1.0, abs(least))))
    return tuple(counts.tolist())
