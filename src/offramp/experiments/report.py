"""A report of the records of sweeps: tables of results, of failures and of machines. `page_of` makes the page.

A subject is an experiment apart from its seed: the rounds of all its seeds are one row. All statistics are those of
`measure.statistics`. A page of equal records is equal, in whichever order they were recorded and after however many
interruptions: times of day and attempts of toys are no part of it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import PurePath
from typing import Any

from offramp.errors import UsageError
from offramp.experiments.comparison import FIGURES, SIGNIFICANT, Figure, equal_value, mean_score, paired
from offramp.experiments.grid import matching
from offramp.experiments.results import Record
from offramp.experiments.specification import NOT_IDENTIFYING, Experiment, option_names
from offramp.measure.statistics import FEWEST_SAMPLES, Comparison, holm, judged, median_interval
from offramp.reporting.tables import NONE, Cell, Column, Page, Row, Section, Table
from offramp.units import named_size

_SHOWN = {
    "score": Column("score", "%", help="Mean of the metrics of the task; of several seeds, the mean of their scores"),
    "latency": Column("latency", "s", help="Median of the times of an input, or of a batch; the median over rounds"),
    "memory": Column("peak memory", "B", help="Peak resident set of the whole process, as the kernel counts it"),
    "bytes": Column("read per input", "B", help="Bytes that read calls returned, divided by the number of inputs"),
    "mean_exit": Column("mean exit", "layers", help="Mean number of layers that an input ran through"),
}
"""Figure of `FIGURES` -> its column, in the order of a table."""
_AGAINST = {"score": "points", "latency": "of baseline", "memory": "of baseline"}
"""Figure -> heading of its paired comparison with the baseline."""
_HIGHER_IS_BETTER = ("score",)


class Subject:
    """One experiment apart from its seed, with its records: a row of a table."""

    def __init__(self, specification: Experiment) -> None:
        self.specification, self.flat = specification, specification.flat()
        self.records: list[Record] = []

    @cached_property
    def done(self) -> list[Record]:
        """Records with figures, by seed and round."""
        return [record for record in self.records if record["figures"]]

    @cached_property
    def failed(self) -> list[Record]:
        """Records of failures, by seed and round."""
        return [record for record in self.records if record.get("reason") is not None]

    def with_figure(self, name: str) -> dict[tuple[Any, int], Record]:
        """Return the records with a figure that is a number, by seed and round."""
        return {_place(record): record for record in self.done if record["figures"].get(name) is not None}


def _place(record: Record) -> tuple[Any, int]:
    return record["experiment"]["seed"] or 0, record["round"]


class Group:
    """Subjects of the same rows of data, which one table compares."""

    def __init__(self, subjects: Sequence[Subject], baseline: Sequence[str]) -> None:
        self.subjects = subjects
        values = {name: {str(each.flat.get(name)) for each in subjects} for name in option_names()}
        constant = ("seed", *NOT_IDENTIFYING)
        self.varied = [name for name, found in values.items() if len(found) > 1 and name not in constant] or ["model"]
        """Options that tell the subjects apart."""
        self._prefix = _common_folder([each.flat["model"] for each in subjects])
        self.baseline = self._baseline(baseline)

    def _baseline(self, baseline: Sequence[str]) -> Subject | None:
        """Return the subject that the others are compared with: the first that has figures and leaves at no exit."""
        able = [each for each in self.subjects if each.done]
        if baseline:
            chosen = set(matching([each.specification for each in able], baseline, "--baseline"))
            return next((each for each in able if each.specification in chosen), None)
        full = [each for each in able if each.flat["exit"] == "none"] or able
        return next((each for each in full if each.flat["budget"] == "resident"), full[0] if full else None)

    @property
    def title(self) -> str:
        """Name of the data."""
        flat = self.subjects[0].flat
        data = flat.get("task") or flat.get("dev") or flat.get("train")
        return "random inputs" if data is None else f"{PurePath(data).name}, {flat['split']}"

    def show(self, subject: Subject, name: str) -> str:
        """Return the value of an option as people read it."""
        value = subject.flat.get(name)
        if name == "model":
            return str(value)[len(self._prefix) :]
        if name == "budget" and isinstance(value, int):
            return named_size(value)
        return "none" if value is None else str(value)

    def name(self, subject: Subject) -> str:
        """Return the options that tell a subject from the others of its group."""
        return ", ".join(self.show(subject, name) for name in self.varied)


def _common_folder(models: Sequence[str]) -> str:
    """Return what all names of models begin with, up to the last name of a folder."""
    folders = {str(PurePath(model).parent) for model in models}
    shared = folders.pop() if len(folders) == 1 else ""
    return "" if shared in ("", ".") else shared.rstrip("/") + "/"


def page_of(folders: Mapping[str, Sequence[Record]], title: str, baseline: Sequence[str] = ()) -> Page:
    """Return the page of the records of results folders, by the names of the folders.

    `baseline`: values of options, as `matching` takes them, of the subject that the others of its table are compared
    with. Raises UsageError for values that no subject has.
    """
    records = [record for found in folders.values() for record in found]
    groups = groups_of(records, baseline)
    subjects = [each for group in groups for each in group.subjects]
    if baseline and not any(group.baseline for group in groups):
        raise UsageError("no experiment with figures is such a baseline", " ".join(baseline), "give another --baseline")
    failed = sum(len(each.failed) for each in subjects)
    facts = ((str(len(subjects)), "experiments"), (str(len(records)), "records"), (str(failed), "failures"))
    tables = tuple(results_table(group, f"results-{number}") for number, group in enumerate(groups, 1))
    return Page(title, facts, (Section("Results", tables=tables),))


def groups_of(records: Iterable[Record], baseline: Sequence[str] = ()) -> list[Group]:
    """Return the subjects of records in groups, sorted by their options."""
    by_subject: dict[Experiment, Subject] = {}
    for record in sorted(records, key=lambda record: (record["key"], record["round"])):
        each = _without_seed(Experiment.from_json(record["experiment"]))
        by_subject.setdefault(each, Subject(each)).records.append(record)
    by_data: dict[str, list[Subject]] = {}
    for subject in sorted(by_subject.values(), key=_order):
        subject.records.sort(key=_place)
        by_data.setdefault(_data_of(subject), []).append(subject)
    return [Group(subjects, baseline) for _, subjects in sorted(by_data.items())]


def _without_seed(each: Experiment) -> Experiment:
    neutral = {name: Experiment.__dataclass_fields__[name].default for name in NOT_IDENTIFYING}
    return replace(each, seed=None, training=each.training and replace(each.training, seed=0), **neutral)


def _data_of(subject: Subject) -> str:
    each = subject.specification
    rows = None if each.data is None else (each.data.to_json(), each.split, each.rows, each.include_training_rows)
    return json.dumps(rows, sort_keys=True, default=str)


def _order(subject: Subject) -> tuple[Any, ...]:
    """Return the key by which subjects are sorted: numbers in texts as numbers."""
    return tuple(_natural(subject.flat.get(name)) for name in option_names())


def _natural(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (int, float)):
        return (0, value, ())
    parts = re.split(r"(\d+)", str(value))
    return (1, 0, tuple(part if index % 2 == 0 else int(part) for index, part in enumerate(parts)))


def results_table(group: Group, name: str) -> Table:
    """Return the table of a group: figures with intervals, and the paired difference of each with the baseline."""
    figures = [FIGURES[each] for each in _SHOWN if any(subject.with_figure(each) for subject in group.subjects)]
    has_reason = any(subject.failed or not subject.done for subject in group.subjects)
    options = [Column(each, is_text=True) for each in group.varied]
    columns, cells = [*options], [[_option_cell(group, each, name) for name in group.varied] for each in group.subjects]
    for figure in figures:
        best, against = _best(group, figure), _AGAINST.get(figure.name)
        columns += [_SHOWN[figure.name], *([Column(against)] if against else [])]
        for row, subject in zip(cells, group.subjects, strict=True):
            row.append(_figure_cell(figure, subject, subject is best))
            row += [_against_baseline(group, figure, subject)] if against else []
    columns += [Column("rounds"), *([Column("failure", is_text=True)] if has_reason else [])]
    for row, subject in zip(cells, group.subjects, strict=True):
        row += [Cell(str(len(subject.done))), *([_reason_cell(subject)] if has_reason else [])]
    rows = tuple(Row(tuple(row)) for row in cells)
    return Table(name, group.title, tuple(columns), rows, _notes(group))


def _notes(group: Group) -> tuple[str, ...]:
    if group.baseline is None:
        return ("No experiment of this table has figures.",)
    return (
        f"Baseline: {group.name(group.baseline)}. Ratios are paired by round, differences of scores in points by row of"
        f" data. In brackets: 95 % intervals, for figures other than scores from {FEWEST_SAMPLES} rounds on. Bold: the"
        f" best of its column, if it differs from each other row significantly (p < {SIGNIFICANT:g}, corrected by"
        " Holm).",
    )


def _option_cell(group: Group, subject: Subject, name: str) -> Cell:
    value = subject.flat.get(name)
    return Cell(group.show(subject, name), None if value is None else str(value))


def _reason_cell(subject: Subject) -> Cell:
    reasons = sorted({record["reason"]["what"] for record in subject.failed})
    if not subject.failed:
        return Cell(NONE if subject.done else "no figures")
    several = f"{len(subject.failed)} of {len(subject.records)} rounds: " if subject.done else ""
    return Cell(several + "; ".join(reasons))


def _figure_cell(figure: Figure, subject: Subject, is_best: bool) -> Cell:
    records = list(subject.with_figure(figure.name).values())
    if not records:
        return Cell(NONE)
    found = estimate(figure, records)
    detail = "" if found.low is None or found.high is None else _interval(figure, found.low, found.high)
    return Cell(figure.show(found.value), found.value, found.low, found.high, detail, is_best)


def estimate(figure: Figure, records: Sequence[Record]) -> Comparison:
    """Return the value of a figure of records, with its interval if there is one."""
    truths = [record["samples"].get("truth") for record in records]
    if figure.name == "score" and truths[0] is not None and all(truth == truths[0] for truth in truths):
        return judged(*mean_score(records), len(truths[0]), equal=0.0)
    return median_interval([record["figures"][figure.name] for record in records])


def _interval(figure: Figure, low: float, high: float) -> str:
    ends = [figure.show(low), figure.show(high)]
    units = [end.partition(" ")[2] for end in ends]
    return f"[{ends[0].partition(' ')[0] if units[0] == units[1] else ends[0]}, {ends[1]}]"


def _compared(figure: Figure, first: Subject, second: Subject) -> Comparison | None:
    """Return the paired comparison of two subjects; None without rounds that both have."""
    sides = [each.with_figure(figure.name) for each in (first, second)]
    shared = sorted(sides[0].keys() & sides[1].keys())
    return paired(figure, *([side[place] for place in shared] for side in sides)) if shared else None


def _against_baseline(group: Group, figure: Figure, subject: Subject) -> Cell:
    base = group.baseline
    found = None if base is None or base is subject else _compared(figure, base, subject)
    if found is None or not math.isfinite(found.value):
        return Cell(NONE)
    form: Callable[[float], str] = (lambda x: f"{x:+.1f}") if figure.name == "score" else (lambda x: f"{x:.2f}")
    detail = "" if found.low is None or found.high is None else f"[{form(found.low)}, {form(found.high)}]"
    sign = "" if figure.name == "score" else "×"
    return Cell(form(found.value) + sign, found.value, found.low, found.high, detail)


def _best(group: Group, figure: Figure) -> Subject | None:
    """Return the subject with the best figure if it differs significantly from each other one."""
    sign = -1 if figure.name in _HIGHER_IS_BETTER else 1
    able = [each for each in group.subjects if each.with_figure(figure.name)]
    if len(able) < 2:
        return None
    first, *others = sorted(able, key=lambda each: sign * _value(figure, each))
    found = [_compared(figure, first, each) for each in others]
    corrected = holm([1.0 if each is None or each.p is None else each.p for each in found])
    equal = equal_value(figure)
    is_best = all(each is not None and not _contains(each, equal) for each in found) and max(corrected) <= SIGNIFICANT
    return first if is_best else None


def _contains(found: Comparison, value: float) -> bool:
    """Return whether a value may be that of a comparison: its interval contains it, or there is none."""
    return found.low is None or found.high is None or found.low <= value <= found.high


def _value(figure: Figure, subject: Subject) -> float:
    return estimate(figure, list(subject.with_figure(figure.name).values())).value
