"""A report of the records of sweeps as a page: results of each task, pictures, failures, machines, and definitions.

A page of equal records is equal, after however many interruptions: attempts are no part of it, and times of day only
where a machine was measured.
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from offramp.errors import UsageError
from offramp.experiments.comparison import FIGURES, SIGNIFICANT, Figure, machine_of
from offramp.experiments.grid import matching
from offramp.experiments.prerequisites import rule_of
from offramp.experiments.report_pictures import (
    bins_of,
    budgets,
    classes,
    classes_table,
    exits,
    fronts,
    runs_to_draw,
    traced,
)
from offramp.experiments.report_streams import COLUMNS as STREAMED
from offramp.experiments.report_streams import streams_table
from offramp.experiments.results import Record
from offramp.experiments.specification import specification_of, spelt
from offramp.experiments.subjects import (
    FOLDER,
    Group,
    Subject,
    best,
    compared,
    contents_of,
    estimate,
    groups_of,
    values_of,
)
from offramp.measure.statistics import FEWEST_SAMPLES, Comparison
from offramp.policies.own import python_files
from offramp.reporting.pages import rivals
from offramp.reporting.tables import NONE, Cell, Column, Page, Row, Section, Table, table_of
from offramp.units import format_duration, format_size

_SHOWN = {
    "score": Column("score", "%", help="Mean of the metrics of the task over the rows; of several seeds, the mean"),
    "latency": Column(
        "latency", "s", help="Median of the times of an input, or of a batch; of rounds and of seeds, the median"
    ),
    "memory": Column("peak memory", "B", help="Peak resident set of the whole process, as the kernel counts it"),
    "bytes": Column("read per input", "B", help="Bytes that read calls returned, divided by the number of inputs"),
    "mean_exit": Column("mean exit", "layers", help="Mean number of layers that an input ran through"),
}
"""Figure of `FIGURES` -> its column, in the order of a table."""
_AGAINST = {
    "score": Column("points", help="Difference of the score from the baseline, paired by row of data"),
    "latency": Column(
        "× latency",
        help="Ratio of mean times of an input (the latency beside it is a median) to the baseline, paired by round"
        " or seed",
    ),
    "memory": Column("× memory", help="Ratio of the peak memory to the baseline, paired by round or seed"),
}
"""Figure -> column of its paired comparison with the baseline."""


def page_of(
    folders: Mapping[str, Sequence[Record]], title: str, baseline: Sequence[str] = (), only: Sequence[str] = ()
) -> Page:
    """Return the page of the records of results folders, by the names of the folders.

    `baseline`: values of options, as `matching` takes them, of the subject that the others of its table are compared
    with. `only`: values of options of the experiments that are reported. Raises UsageError for values that no subject
    has, and the errors of `groups_of`.
    """
    groups = groups_of(_kept(folders, only), baseline)
    if baseline and not any(group.baselines for group in groups):
        raise UsageError("no experiment with figures is such a baseline", " ".join(baseline), "give another --baseline")
    subjects = [each for group in groups for each in group.subjects]
    numbers = itertools.count(1)
    for group in groups:
        group.labels = {each: f"row-{number}" for each, number in zip(group.subjects, numbers, strict=False)}
    records = [record for each in subjects for record in each.records]
    failed = sum(len(each.failed) for each in subjects)
    counts = ((len(subjects), "experiment"), (len(records), "record"), (failed, "failed record"))
    facts = tuple((f"{count:,}", name if count == 1 else name + "s") for count, name in counts)
    whole = [each for group in groups_of(folders) for each in group.subjects] if only else subjects
    varied = [name for name, values in values_of(whole).items() if len(values) > 1]  # of what the commands repeat
    drawn = runs_to_draw(groups)
    sections = [_group_section(group, number, varied, drawn) for number, group in enumerate(groups, 1)]
    found = (*_named_apart(sections), *_failures(groups), *_environment(records), _definitions(groups))
    return Page(title, facts, found)


def _kept(folders: Mapping[str, Sequence[Record]], only: Sequence[str]) -> Mapping[str, Sequence[Record]]:
    """Return the records of the experiments that have the values of `only`. Raises UsageError if none has."""
    if not only:
        return folders
    read = {name: [(specification_of(each, name), each) for each in records] for name, records in folders.items()}
    wanted = set(matching([each for pairs in read.values() for each, _ in pairs], only))
    found = {name: [record for each, record in pairs if each in wanted] for name, pairs in read.items()}
    if not any(found.values()):
        raise UsageError("no experiment has these values", " ".join(only), "leave out --only, which reports all")
    return {name: records for name, records in found.items() if records}


def _named_apart(sections: Iterable[Section]) -> Iterator[Section]:
    """Yield sections whose pictures have different names, which are those of files."""
    taken: set[str] = set()
    for section in sections:
        pictures = []
        for picture in section.pictures:
            names = itertools.chain([picture.name], (f"{picture.name}-{number}" for number in itertools.count(2)))
            name = next(each for each in names if each not in taken)
            taken.add(name)
            pictures.append(replace(picture, name=name))
        yield replace(section, pictures=tuple(pictures))


def _group_section(group: Group, number: int, varied: Sequence[str], drawn: Collection[Subject]) -> Section:
    """Return the section of a group, with the memory over time of the subjects of `drawn`."""
    if group.are_streamed:
        table = streams_table(group, f"streams-{number}", lambda each: (_facts(each), _command(each, varied)))
        return Section(group.title, tables=(table,))
    tables = [results_table(group, f"results-{number}", varied)]
    pictures = [*fronts(group), *budgets(group), *exits(group)]
    per_class = classes_table(group, f"classes-{number}")
    if per_class is not None:
        tables.append(per_class)
        pictures.append(classes(per_class))
    over_time, stages, left_out = traced(group, drawn)
    return Section(group.title, left_out, tuple(tables), (*pictures, *over_time, *stages))


def results_table(group: Group, name: str, varied: Sequence[str] = ()) -> Table:
    """Return the table of a group: figures with intervals, and the paired difference of each with the baseline.

    `varied`: options that differ in all of the report, which the commands of rows name.
    """
    figures = [FIGURES[each] for each in _SHOWN if any(subject.with_figure(each) for subject in group.subjects)]
    columns = [Column(each, is_text=True) for each in group.varied]
    subjects = _ordered(group)
    cells = [[_option_cell(group, each, name) for name in group.varied] for each in subjects]
    for figure in figures:
        first, against = best(group, figure), _AGAINST.get(figure.name)
        columns += [_SHOWN[figure.name], *([against] if against else [])]
        for row, subject in zip(cells, subjects, strict=True):
            row.append(_figure_cell(figure, subject, subject is first))
            row += [_against_baseline(group, figure, subject)] if against else []
    columns.append(Column("rounds"))
    if any(subject.failed or not subject.done for subject in group.subjects):
        columns.append(Column("failure", is_text=True))
    rows = []
    for row, subject in zip(cells, subjects, strict=True):
        row += [Cell(str(len(subject.done))), _reason_cell(subject)][: len(columns) - len(row)]
        kind = "failed" if not subject.done else "baseline" if subject in group.baselines else ""
        label, command = group.labels.get(subject, ""), _command(subject, varied)
        rows.append(Row(tuple(row), label, group.name(subject), _facts(subject), command, kind))
    return Table(name, f"{group.title}: results", tuple(columns), tuple(rows), _notes(group))


def _ordered(group: Group) -> list[Subject]:
    """Return the subjects of each baseline together, it first; then those that have none."""
    parts = [(base, [each for each in group.subjects if group.baseline_of(each) is base]) for base in group.baselines]
    found = [each for base, mine in parts for each in (base, *mine)]
    return list(dict.fromkeys([*found, *group.subjects]))


def _notes(group: Group) -> tuple[str, ...]:
    if not group.baselines:
        return ("No experiment of this table has figures.", *_left_out(group))
    heading = "Baseline" if len(group.baselines) == 1 else "Baseline of each model"
    return (
        f"{heading}: {'; '.join(map(group.name, group.baselines))}. Ratios are paired by round, differences of scores"
        " in points by row of data. In brackets: 95 % intervals. Those of scores are over the rows of data, for these"
        " models; others are"
        f" over rounds, or over seeds where a row has several, from {FEWEST_SAMPLES} on: each seed counts once, by the"
        " median of its rounds. Bold: the best of its column, but for the bounds oracle and random, if it differs"
        f" from each other row significantly (p < {SIGNIFICANT:g}, corrected by Holm).",
        *_left_out(group),
    )


def _left_out(group: Group) -> Iterator[str]:
    """Yield what the rows of a table do not show, or what is not compared: contents that changed, several machines."""
    num_earlier = _num_measured(group, "records") - _num_measured(group, "current")
    if num_earlier:
        yield (
            f"Left out: {num_earlier} records of other contents of a model, of data or of a file. Each row has those"
            " that were measured last."
        )
    digests: dict[tuple[Any, ...], set[str]] = {}
    for name, found in (pair for each in group.subjects for pair in contents_of(each).items()):
        digests.setdefault(name, set()).update(found)
    changed = sorted({"data" if name == ("data",) else str(name[1]) for name, each in digests.items() if len(each) > 1})
    if changed:
        yield (
            f"The contents of {', '.join(changed)} changed between measurements: rows of different contents are not"
            " compared. The sweep measures the present contents when it is repeated."
        )
    machines = {machine_of(record) for each in group.subjects for record in each.done} - {None}
    if len(machines) > 1:
        yield (
            f"Measured on {len(machines)} kinds of machine (see Environment): where two rows are of different ones,"
            " ratios of times are not due to their options alone."
        )


def _num_measured(group: Group, name: str) -> int:
    """Return the number of records that a sweep made, and that were not converted from a study."""
    return sum("study" not in record for each in group.subjects for record in getattr(each, name))


def _option_cell(group: Group, subject: Subject, name: str) -> Cell:
    value = subject.flat.get(name)
    return Cell(group.show(subject, name), None if value is None else str(value))


def _reason_cell(subject: Subject) -> Cell:
    reasons = sorted({record["reason"]["what"] for record in subject.failed})
    if not subject.failed:
        return Cell(NONE if subject.done else "no figures")
    several = f"{len(subject.failed)} of {len(subject.current)} rounds: " if subject.done else ""
    return Cell(several + "; ".join(reasons))


def _figure_cell(figure: Figure, subject: Subject, is_best: bool) -> Cell:
    if not subject.with_figure(figure.name):
        return Cell(NONE)
    found = estimate(figure, subject)
    detail = _interval(figure.show, found)
    bins = bins_of(subject) if figure.name == "latency" else ()
    return Cell(figure.show(found.value), found.value, found.low, found.high, detail, is_best, bins)


def _interval(show: Callable[[float], str], found: Comparison) -> str:
    """Return an interval as text, without units if they are those of the value; nothing for one without width."""
    if found.low is None or found.high is None:
        return ""
    value, *ends = map(show, (found.value, found.low, found.high))
    if ends == [value, value]:
        return ""
    units = {text.partition(" ")[2] for text in (value, *ends)}
    return f"[{', '.join(end.partition(' ')[0] if len(units) == 1 else end for end in ends)}]"


def _against_baseline(group: Group, figure: Figure, subject: Subject) -> Cell:
    base = group.baseline_of(subject)
    found = None if base is None or base is subject else compared(figure, base, subject)
    if found is None or not math.isfinite(found.value):
        return Cell(NONE)
    form: Callable[[float], str] = (lambda x: f"{x:+.1f}") if figure.name == "score" else (lambda x: f"{x:.2f}")
    detail = _interval(form, found)
    sign = "" if figure.name == "score" else "×"
    return Cell(form(found.value) + sign, found.value, found.low, found.high, detail, detectable=found.detectable)


def _command(subject: Subject, varied: Sequence[str]) -> str:
    """Return the command that measures a subject again: `offramp sweep` takes a results folder as a recipe.

    Where the exit is a Python file, the command needs the recipe itself: records must not name code that is run.
    """
    has_code = bool(python_files(rule_of(str(subject.flat.get("exit")))))
    words = ["offramp", "sweep", "RECIPE.py" if has_code else subject.folder, "--out", "again"]
    for name in varied:
        if name != FOLDER:
            words += ["--only", f"{name}={spelt(name, subject.flat.get(name))}"]
    return shlex.join(words)


def _facts(subject: Subject) -> str:
    """Return what a page shows of the records of a subject where the pointer is."""
    keys = sorted({record["key"] for record in subject.records})
    seeds = sorted({record["experiment"]["seed"] for record in subject.done} - {None})
    facts = [
        f"records {', '.join(f'{key}.*' for key in keys)}",
        *([f"seeds {', '.join(map(str, seeds))}"] if seeds else []),
    ]
    ended = sorted(record["ended"] for record in subject.done if "environment" in record and "ended" in record)
    facts += [f"measured {ended[0]} to {ended[-1]}"] if ended else []
    commits = sorted({record["git"]["commit"][:12] for record in subject.done if record.get("git")})
    return "; ".join([*facts, *([f"commit {', '.join(commits)}"] if commits else [])])


def _failures(groups: Iterable[Group]) -> list[Section]:
    """Return the section of failures with their reasons and remedies, if there are any."""
    columns = [Column(name, is_text=True) for name in ("data", "experiment", "reason", "where", "what to do")]
    rows = []
    for group in groups:
        for subject in group.subjects:
            reasons = [record["reason"] for record in subject.failed]
            counted = Counter(tuple(reason.get(name) for name in ("what", "where", "remedy")) for reason in reasons)
            rows += [
                (group.title, group.name(subject), *reason, count)
                for reason, count in sorted(counted.items(), key=lambda pair: str(pair[0]))
            ]
    table = table_of("failures", "Failures", [*columns, Column("rounds")], rows)
    return [Section("Failures", tables=(table,))] if rows else []


_MACHINE: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "processor": lambda e: e.get("cpu_model"),
    "cores": lambda e: e.get("num_cores"),
    "caches": lambda e: ", ".join(f"{name} {size}" for name, size in (e.get("caches") or {}).items()) or None,
    "memory": lambda e: e.get("total_memory_bytes") and format_size(e["total_memory_bytes"]),
    "memory limit": lambda e: e.get("memory_limit_bytes") and format_size(e["memory_limit_bytes"]),
    "storage": lambda e: ", ".join(f"{name} {value}" for name, value in (e.get("storage") or {}).items()) or None,
    "governor": lambda e: e.get("governor"),
    "system": lambda e: " ".join(str(e[name]) for name in ("platform", "kernel") if e.get(name)) or None,
    "python": lambda e: e.get("python_version"),
    "offramp": lambda e: e.get("offramp_version"),
    "libraries": lambda e: ", ".join(f"{n} {v}" for n, v in sorted((e.get("library_versions") or {}).items())) or None,
}
"""Fact of a machine that does not change while it measures -> its text."""


def _environment(records: Iterable[Record]) -> list[Section]:
    """Return the section of the machines: one column for each that differs, and what changed during measurements."""
    machines: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record.get("environment"):
            key = tuple(
                NONE if (text := show(record["environment"])) is None else str(text) for show in _MACHINE.values()
            )
            machines.setdefault(key, []).append(record)
    if not machines:
        return []
    found = sorted(machines.items())
    rows: list[list[object]] = [[name, *(key[index] for key, _ in found)] for index, name in enumerate(_MACHINE)]
    rows += [[name, *(show(mine) for _, mine in found)] for name, show in _CHANGING.items()]
    heads = ["machine"] if len(found) == 1 else [f"machine {number + 1}" for number in range(len(found))]
    columns = [Column("", is_text=True), *(Column(head, is_text=True) for head in heads)]
    return [Section("Environment", tables=(table_of("environment", "Environment", columns, rows),))]


def _range(name: str, show: Callable[[Any], str]) -> Callable[[Sequence[Record]], str | None]:
    """Return a function that shows the least and the largest value of a condition."""
    return lambda records: _spread(
        [value for record in records if (value := record["environment"].get(name)) is not None], show
    )


def _spread(values: Sequence[Any], show: Callable[[Any], str]) -> str | None:
    if not values:
        return None
    first, last = show(min(values)), show(max(values))
    return first if first == last else f"{first} to {last}"


def _commits(records: Sequence[Record]) -> str | None:
    found = {(git["commit"][:12], git["changed_files"] > 0) for record in records if (git := record.get("git"))}
    return ", ".join(commit + (" and changes" if changed else "") for commit, changed in sorted(found)) or None


_CHANGING: dict[str, Callable[[Sequence[Record]], str | None]] = {
    "load, 1 minute": _range("load_1min", lambda value: f"{value:.1f}"),
    "memory available": _range("available_memory_bytes", format_size),
    "frequency": _range("frequency_khz", lambda value: f"{value / 1e6:.2f} GHz"),
    "times throttled": _range("throttle_count", str),
    "commit": _commits,
    "rival versions": lambda records: "; ".join(rivals(record.get("run") or {} for record in records)) or None,
    "records": lambda records: str(len(records)),
    "time of a job": lambda records: _spread(
        [record["seconds"] for record in records if "seconds" in record], format_duration
    ),
    "measured": lambda records: _spread(
        [record["ended"][:16] for record in records if "ended" in record], "{} UTC".format
    ),
}
"""Fact of measurements that changes between them -> its text."""


def _definitions(groups: Sequence[Group]) -> Section:
    """Return the section that says what each figure is and how it was measured."""
    figures = [name for name in _SHOWN if any(each.with_figure(name) for group in groups for each in group.subjects)]
    found = [each for name in figures for each in (_SHOWN[name], _AGAINST.get(name)) if each is not None]
    found += STREAMED if any(group.are_streamed for group in groups) else ()
    rows = [(column.title, column.help + ".") for column in found]
    text = (
        "Each round of an experiment is a process of its own, which measures itself after two passes to warm up; rounds"
        " of different experiments alternate. Intervals are percentile bootstraps, corrected for few rounds"
        " (offramp.measure.statistics). Beside each paired comparison, the table as CSV has the smallest deviation from"
        " equality that this number of samples finds in 80 % of studies (detectable)."
    )
    columns = [Column("figure", is_text=True), Column("definition", is_text=True)]
    return Section("How each figure was measured", (text,), (table_of("definitions", "Figures", columns, rows),))
