"""Subjects of a report: experiments apart from their seeds, with their records, in groups of the same data.

A subject is a row of a table: the rounds of all its seeds. All statistics are those of `measure.statistics`. Subjects
and groups are sorted by their options, so that equal records give an equal report in whichever order they were made.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any

import numpy as np

from offramp.experiments.comparison import Figure, differs, mean_score, measured_last, num_shared_rows, paired
from offramp.experiments.grid import matching
from offramp.experiments.jobs import BOUNDS
from offramp.experiments.results import Record, completed
from offramp.experiments.specification import (
    NOT_IDENTIFYING,
    OPTIONS,
    STREAM,
    Experiment,
    option_names,
    specification_of,
    specification_text,
)
from offramp.measure import median
from offramp.measure.statistics import Comparison, holm, judged, median_interval
from offramp.reporting.svg import NUM_COLOURS
from offramp.reporting.tables import NONE
from offramp.store.manifest import FP32
from offramp.units import named_size

FOLDER = "folder"
"""Name of the option that tells subjects of several results folders apart."""
_BARE = ("none", "yes", "no")
"""Values that are shown with the name of their option, as numbers are."""
_SERIES = ("model", "rival", "backend", "dtype", "batch", "residency", FOLDER)
"""Options that may give points of a picture their colours, the first that has several values; else the exit does."""

Place = tuple[int, int]


class Subject:
    """One experiment, with the records of all its seeds."""

    def __init__(self, specification: Experiment, folder: str) -> None:
        self.specification, self.folder = specification, folder
        self.flat = {**specification.flat(), FOLDER: folder}
        """Options by name. `seed` is None, except where a model is measured without seeds as well: see `groups_of`."""
        self.records: list[Record] = []
        self.estimates: dict[str, Comparison] = {}
        """Figure -> what `estimate` found of it."""

    @property
    def is_bound(self) -> bool:
        """True if its exits are a bound that policies are compared with, and not those of a policy."""
        return str(self.flat["exit"]).startswith(BOUNDS)

    @cached_property
    def family(self) -> str:
        """The model, or the source that it shares with stores of other precisions: what has one baseline."""
        found = {record["inputs"].get("source") for record in self.current if record["experiment"]["seed"] is None}
        known = found.pop() if len(found) == 1 and self.specification.training is None else None
        return known if isinstance(known, str) else self.flat["model"]

    @property
    def is_rounded(self) -> bool:
        """True if its weights have another precision than those of the model that it was made from."""
        stored = {record["inputs"].get("precision") for record in self.current}
        return self.flat["dtype"] != FP32 or not stored <= {None, FP32}

    @cached_property
    def current(self) -> list[Record]:
        """Records of the inputs that were measured last, by seed and round."""
        return sorted(measured_last(self.records, lambda record: record["experiment"]["seed"]), key=place_of)

    @cached_property
    def done(self) -> list[Record]:
        """Current records with figures."""
        return [record for record in self.current if record["figures"]]

    @cached_property
    def failed(self) -> list[Record]:
        """Current records of failures."""
        return [record for record in self.current if record.get("reason") is not None]

    def with_figure(self, name: str) -> dict[Place, Record]:
        """Return the records with a figure that is a number, by seed and round."""
        return {place_of(record): record for record in self.done if record["figures"].get(name) is not None}


def place_of(record: Record) -> Place:
    """Return the seed and the round of a record. No seed is -1: it is of another model than seed 0."""
    seed = record["experiment"]["seed"]
    return -1 if seed is None else seed, record["round"]


class Group:
    """Subjects of the same rows of data, which one table compares."""

    def __init__(self, subjects: Sequence[Subject], title: str, baseline: Sequence[str] = ()) -> None:
        self.subjects, self.title = subjects, title
        self.labels: dict[Subject, str] = {}
        """Subject -> place in the page of its row."""
        found = values_of(subjects)
        self.varied = _needed([name for name, values in found.items() if len(values) > 1], subjects) or ["model"]
        """Options that tell the subjects apart."""
        self._prefix = _common_folder([each.flat["model"] for each in subjects])
        self._baseline_of = self._baselines(baseline)
        self.baselines = list(dict.fromkeys(self._baseline_of.values()))
        """Subjects that others are compared with: one for each model, or a chosen one of another model."""
        several = [name for name in _SERIES if 1 < len(found.get(name, ())) <= NUM_COLOURS]
        self.coloured = several[0] if several else ""
        """Option that gives points their colours; "": the kind of exit does."""

    @property
    def are_streamed(self) -> bool:
        """True if `offramp.stream` runs the models of all subjects, which have figures of their own."""
        return self.subjects[0].specification.job == STREAM

    def baseline_of(self, subject: Subject) -> Subject | None:
        """Return the subject that this one is compared with, of the same model if there is one."""
        return self._baseline_of.get(subject.family)

    def _baselines(self, chosen: Sequence[str]) -> dict[str, Subject]:
        """Return the baseline of each family: by default one without exits, not rounded, all weights resident.

        A family of which nothing is chosen is compared with the first that is.
        """
        able = [each for each in self.subjects if each.done]
        families = list(dict.fromkeys(each.family for each in self.subjects))
        if chosen:
            wanted = set(matching([each.specification for each in able], chosen, "--baseline"))
            able = [each for each in able if each.specification in wanted]
            found = {family: next(iter(_of_family(able, family) or able), None) for family in families}
        else:
            found = {family: _plainest(_of_family(able, family)) for family in families}
        return {family: each for family, each in found.items() if each is not None}

    def show(self, subject: Subject, name: str) -> str:
        """Return the value of an option as people read it."""
        value = subject.flat.get(name)
        if name not in subject.flat:
            return NONE
        if name == "model":
            return str(value)[len(self._prefix) :]
        if name == "rival" and value is None:
            return "offramp"
        if name == "budget" and isinstance(value, int):
            return named_size(value)
        return "none" if value is None else str(value) if not isinstance(value, bool) else "yes" if value else "no"

    def name(self, subject: Subject, without: Sequence[str] = ()) -> str:
        """Return the options that tell a subject from the others of its group, but for some."""
        names = [name for name in self.varied if name not in without and name in subject.flat]
        parts = [_said(name, self.show(subject, name)) for name in names if name != "trace" or subject.flat[name]]
        return ", ".join(parts) or self.show(subject, "model")

    def series(self, subject: Subject) -> str:
        """Return what the points of a picture are coloured by: a model, another option, or a kind of exit."""
        if self.coloured:
            return self.show(subject, self.coloured)
        return re.split("[:&| ]", PurePath(subject.flat["exit"]).name)[0]

    def full_of(self, subject: Subject) -> Subject | None:
        """Return the subject that runs all layers on the same rows: with equal options, else of the same model."""
        own = [each for each in self.subjects if not each.flat.get("rival")]
        able = [each for each in own if each.flat["exit"] == "none" and each.done]
        able = [
            each for each in able if all(each.flat.get(x) == subject.flat.get(x) for x in ("model", "dtype", "loss"))
        ]
        others = [name for name in self.varied if name != "exit"]
        equal = [each for each in able if all(each.flat.get(x) == subject.flat.get(x) for x in others)]
        return next(iter(equal or able), None)


def _of_family(subjects: Iterable[Subject], family: str) -> list[Subject]:
    return [each for each in subjects if each.family == family]


def _plainest(able: Sequence[Subject]) -> Subject | None:
    """Return the first subject without exits, not rounded, with all weights resident, or what is closest to that."""
    own = [each for each in able if not each.flat.get("rival")] or able
    full = [each for each in own if each.flat["exit"] == "none"] or own
    full = [each for each in full if not each.is_rounded] or full
    return next((each for each in full if each.flat["budget"] == "resident"), full[0] if full else None)


def _said(name: str, value: str) -> str:
    if name == "trace":
        return "traced"
    return f"{name} {value}" if name == "seed" or value in _BARE or value.isdecimal() else value


def values_of(subjects: Iterable[Subject]) -> dict[str, set[str]]:
    """Return the values that the options of subjects have, without options that tell no subjects apart."""
    flats = [each.flat for each in subjects]
    names = [name for name in (*option_names(), FOLDER) if name not in NOT_IDENTIFYING]
    return {name: {str(flat.get(name)) for flat in flats} for name in names}


def _needed(varied: Sequence[str], subjects: Sequence[Subject]) -> list[str]:
    """Return the options without those of a training that tell no further subjects apart: several change together."""
    kept = list(varied)
    for name in [each for each in reversed(varied) if each in OPTIONS["training"]]:
        others = [each for each in kept if each != name]
        if len({tuple(str(each.flat.get(other)) for other in others) for each in subjects}) == len(subjects):
            kept = others
    return kept


def _common_folder(models: Sequence[str]) -> str:
    """Return the folder of all models, if it is one."""
    folders = {str(PurePath(model).parent) for model in models}
    shared = folders.pop() if len(folders) == 1 else ""
    return "" if shared in ("", ".") else shared.rstrip("/") + "/"


def groups_of(folders: Mapping[str, Iterable[Record]], baseline: Sequence[str] = ()) -> list[Group]:
    """Return the subjects of results folders in groups. `baseline`: see `Group` and `matching`.

    Subjects that several folders have are told apart by their folder, and a model from those of its seeds. Raises
    RefusedError for a record whose specification or measurements this release cannot read, UsageError for an unknown
    option in `baseline`.
    """
    known: dict[str, Experiment] = {}
    found: dict[tuple[Experiment, str, bool], Subject] = {}
    for folder, records in folders.items():
        for given in records:
            record, text = completed(given, folder), specification_text(given, folder)
            each = known.get(text) or known.setdefault(text, _without_seed(specification_of(record, folder)))
            has_seed = record["experiment"]["seed"] is not None
            found.setdefault((each, folder, has_seed), Subject(each, folder)).records.append(record)
    for (each, folder, has_seed), subject in found.items():
        if has_seed and (each, folder, False) in found:
            subject.flat["seed"] = ",".join(map(str, sorted({x["experiment"]["seed"] for x in subject.records})))
    if len({(each, has_seed) for each, _, has_seed in found}) == len(found):
        for subject in found.values():
            subject.flat[FOLDER] = None
    by_data: dict[str, list[Subject]] = {}
    for subject in sorted(found.values(), key=_order):
        by_data.setdefault(_data_of(subject), []).append(subject)
    titles = _titles([subjects[0] for _, subjects in sorted(by_data.items())])
    return [Group(by_data[key], title, baseline) for key, title in zip(sorted(by_data), titles, strict=True)]


def _without_seed(each: Experiment) -> Experiment:
    neutral = {field.name: field.default for field in fields(Experiment) if field.name in NOT_IDENTIFYING}
    return replace(each, seed=None, training=each.training and replace(each.training, seed=0), **neutral)


def _data_of(subject: Subject) -> str:
    """Return what tells groups apart; random inputs come last, and after them models that are streamed."""
    each = subject.specification
    if each.job == STREAM:
        return "2"
    rows = None if each.data is None else (each.data.to_json(), each.split, each.rows, each.include_training_rows)
    return ("1" if rows is None else "0") + json.dumps(rows, sort_keys=True, default=str)


def _titles(firsts: Sequence[Subject]) -> list[str]:
    """Return a title for each group, by its first subject: the data, and where needed the rows."""
    found = []
    for flat in (each.flat for each in firsts):
        if flat["job"] == STREAM:
            found.append("models streamed by offramp.stream")
            continue
        data = flat.get("task") or flat.get("dev") or flat.get("train")
        found.append("random inputs" if data is None else f"{PurePath(str(data)).name}, {flat['split']}")
    long = [f"{title}, {each.flat['rows']} rows" for title, each in zip(found, firsts, strict=True)]
    folders = {str(each.flat["data"]) for each in firsts if each.flat.get("data")}
    if len(folders) > 1:
        long = [f"{title}, {each.flat.get('data')}" for title, each in zip(long, firsts, strict=True)]
    titles = [more if found.count(title) > 1 else title for title, more in zip(found, long, strict=True)]
    counts = [titles[: index + 1].count(title) for index, title in enumerate(titles)]
    return [title if number == 1 else f"{title} ({number})" for title, number in zip(titles, counts, strict=True)]


def _order(subject: Subject) -> tuple[Any, ...]:
    """Return the key by which subjects are sorted: numbers in texts as numbers."""
    return tuple(_natural(subject.flat.get(name)) for name in (*option_names(), FOLDER))


def _natural(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (int, float)):
        return (0, value, ())
    parts = re.split(r"(\d+)", "" if value is None else str(value))
    return (1, 0, tuple(part if index % 2 == 0 else _digits(part) for index, part in enumerate(parts)))


def _digits(text: str) -> tuple[int, str]:
    """Return the key by which digits are sorted as a number, of any length."""
    shown = text.lstrip("0")
    return len(shown), shown


def estimate(figure: Figure, subject: Subject) -> Comparison:
    """Return the value of a figure of a subject that has it, with its interval if there is one.

    Of several seeds, each counts once, by the median of its rounds: rounds of one seed share its model.
    """
    known = subject.estimates
    if figure.name not in known:
        seeds = list(_by_seed(subject.with_figure(figure.name)).values())
        num_rows = num_shared_rows(itertools.chain(*seeds)) if figure.name == "score" else 0
        if num_rows:
            known[figure.name] = judged(*_mean_of_seeds(seeds), num_rows, equal=0.0)
        else:
            found = seeds[0] if len(seeds) == 1 else [_median_round(figure, rounds) for rounds in seeds]
            whole = median_interval([record["figures"][figure.name] for record in found])
            if figure.name == "score" and len(seeds) == 1:  # rounds have equal answers
                whole = Comparison(whole.value, None, None, None, None)
            known[figure.name] = whole
    return known[figure.name]


def compared(figure: Figure, first: Subject, second: Subject) -> Comparison | None:
    """Return the paired comparison of the second subject with the first; None without rounds that both have, and where
    the contents of their data or model differ: see `has_changed`.

    One seed of each side is paired by round, whichever they are; several are paired by seed, and each counts once.
    """
    if has_changed(first, second):
        return None
    sides = [_by_seed(each.with_figure(figure.name)) for each in (first, second)]
    if all(len(side) == 1 for side in sides):
        pairs = [_of_shared_rounds(*(rounds for side in sides for rounds in side.values()))]
        return paired(figure, *pairs[0]) if pairs[0][0] else None
    pairs = [_of_shared_rounds(sides[0][seed], sides[1][seed]) for seed in sides[0] if seed in sides[1]]
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        return None
    num_rows = num_shared_rows(record for pair in pairs for side in pair for record in side)
    if figure.name == "score" and num_rows:
        (value, draws_D), (other, others_D) = (_mean_of_seeds([pair[side] for pair in pairs]) for side in (0, 1))
        return judged(other - value, others_D - draws_D, num_rows, equal=0.0)
    sides_of_seeds = ([_median_round(figure, pair[side]) for pair in pairs] for side in (0, 1))
    return paired(figure, *sides_of_seeds, are_seeds=True)


def has_changed(first: Subject, second: Subject) -> bool:
    """Return whether two subjects were measured on other contents of the same data, or, in one folder, of one model."""
    here, there = contents_of(first), contents_of(second)
    return any(len(here[name] | there[name]) > 1 for name in here.keys() & there.keys())


def contents_of(subject: Subject) -> dict[tuple[Any, ...], set[str]]:
    """Return the digests of the data, and of the model of each seed, by what they are of."""
    found: dict[tuple[Any, ...], set[str]] = {}
    for record in subject.current:
        model = (subject.folder, subject.flat["model"], record["experiment"]["seed"])
        for name, digest in ((("data",), record["inputs"].get("data")), (model, record["inputs"].get("model"))):
            if digest is not None:
                found.setdefault(name, set()).add(str(digest))
    return found


def _mean_of_seeds(seeds: Sequence[Sequence[Record]]) -> tuple[float, np.ndarray]:
    """Return the mean score of seeds on the same rows, each counted once, and that of each resample of the rows [D]."""
    values, draws_SD = zip(*map(mean_score, seeds), strict=True)
    return sum(values) / len(seeds), np.mean(draws_SD, axis=0)


def _by_seed(records: Mapping[Place, Record]) -> dict[int, list[Record]]:
    found: dict[int, list[Record]] = {}
    for (seed, _), record in sorted(records.items()):
        found.setdefault(seed, []).append(record)
    return found


def _of_shared_rounds(first: Sequence[Record], second: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records of the rounds that both have."""
    rounds = {record["round"] for record in first} & {record["round"] for record in second}
    here, there = ([record for record in side if record["round"] in rounds] for side in (first, second))
    return here, there


def _median_round(figure: Figure, rounds: Sequence[Record]) -> Record:
    """Return a record that stands for the rounds of one seed: it has the median of the figure, and no samples."""
    value = median([record["figures"][figure.name] for record in rounds])
    return {**rounds[0], "figures": {figure.name: value}, "samples": {}}


def best(group: Group, figure: Figure) -> Subject | None:
    """Return the subject with the best figure, if it differs significantly from each other one; bounds are left out."""
    sign = -1 if figure.words[1] == "better" else 1
    able = [each for each in group.subjects if each.with_figure(figure.name) and not each.is_bound]
    if len(able) < 2:
        return None
    first, *others = sorted(able, key=lambda each: sign * estimate(figure, each).value)
    found = [compared(figure, first, each) for each in others]
    corrected = holm([1.0 if each is None or each.p is None else each.p for each in found])
    is_apart = all(each is not None and differs(figure, each, p) for each, p in zip(found, corrected, strict=True))
    return first if is_apart else None
