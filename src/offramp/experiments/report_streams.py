"""The table of a report on models that `offramp.stream` runs under small budgets of weights: jobs `stream`."""

from __future__ import annotations

from collections.abc import Callable

from offramp.experiments.subjects import Group, Subject
from offramp.measure import median
from offramp.reporting.tables import NONE, Cell, Column, Row, Table
from offramp.units import format_size

COLUMNS = (
    Column("identical", is_text=True, help="Whether answers are those of the whole model, bit for bit"),
    Column("stages", help="Number of stages of the model"),
    Column("weights", "B", help="Size of all weights"),
    Column("smallest budget", "%", help="Smallest budget that holds the largest stage, as a share of all weights"),
    Column("peak of weights", "%", help="Largest peak of weights in memory, as a share of its budget"),
    Column("× module latency", help="Ratio of median times of a pass: at the smallest budget to the whole model"),
)
"""Columns of what is measured, with their definitions."""
_FIGURES: tuple[tuple[str, float, Callable[[float], str]], ...] = (
    ("num_stages", 1, lambda value: f"{value:g}"),
    ("weight_bytes", 1, format_size),
    ("budget_share", 100, lambda value: f"{value:.1f} %"),
    ("peak_share", 100, lambda value: f"{value:.1f} %"),
    ("slowdown", 1, lambda value: f"{value:.2f}×"),
)
"""Figure of a record, its factor, and its text, in the order of the columns after the first."""


def streams_table(group: Group, name: str, describe: Callable[[Subject], tuple[str, str]]) -> Table:
    """Return the table of models that were streamed. `describe`: returns the facts and the command of a row."""
    options = [Column(each, is_text=True) for each in group.varied]
    has_failures = any(subject.failed or not subject.done for subject in group.subjects)
    columns = (*options, *COLUMNS, Column("rounds"), *([Column("failure", is_text=True)] if has_failures else []))
    rows = []
    for subject in group.subjects:
        cells = [Cell(group.show(subject, each)) for each in group.varied]
        cells += [_identical(subject), *(_cell(subject, *each) for each in _FIGURES), Cell(str(len(subject.done)))]
        cells += [Cell(_reasons(subject))] if has_failures else []
        about = group.labels.get(subject, ""), group.name(subject), *describe(subject)
        rows.append(Row(tuple(cells), *about, "" if subject.done else "failed"))
    note = (
        "Each model is divided by a run, and runs under the smallest budget that holds its largest stage and under"
        " twice that: answers and peaks are of both. Pages of `--template` have the rest of what the records hold."
    )
    return Table(name, f"{group.title}: results", columns, tuple(rows), (note,))


def _identical(subject: Subject) -> Cell:
    """Return whether all answers are those of the whole model; where they are not, why."""
    if not subject.done:
        return Cell(NONE)
    faults = sorted(
        {str(fault) for each in subject.done if (fault := (each.get("run") or {}).get("fault")) is not None}
    )
    return Cell(f"no: {'; '.join(faults)}", "no") if faults else Cell("yes")


def _cell(subject: Subject, name: str, factor: float, show: Callable[[float], str]) -> Cell:
    values = [value for each in subject.done if (value := each["figures"].get(name)) is not None]
    if not values:
        return Cell(NONE)
    value = factor * median(values)
    return Cell(show(value), value)


def _reasons(subject: Subject) -> str:
    reasons = sorted({record["reason"]["what"] for record in subject.failed})
    return "; ".join(reasons) or (NONE if subject.done else "no figures")
