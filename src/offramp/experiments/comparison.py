"""Comparison of two results folders: paired, with intervals, and a verdict for each experiment that both have.

Experiments of two folders are the same if all options are, but for options that have one value in the whole of the one
folder and another one in the whole of the other: these are what is compared. Rounds of the same number are pairs.

Shapes: R rounds, U timed units, N rows.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from offramp.errors import RefusedError, UsageError, said
from offramp.experiments.results import Record
from offramp.experiments.specification import NOT_IDENTIFYING, specification_of, spelt
from offramp.measure import median
from offramp.measure.statistics import (
    INCONCLUSIVE,
    SIGNIFICANT,
    Comparison,
    holm,
    judged,
    median_interval,
    paired_ratio,
    table_verdicts,
)
from offramp.tasks.metrics import resampled_scores, score
from offramp.units import format_duration, format_size

NUM_SCORE_DRAWS = 500


@dataclass(frozen=True)
class Figure:
    """One figure of records, how two of them are compared, and what the comparison is called."""

    name: str
    words: tuple[str, str]
    """Verdicts if the second is lower, and if it is higher."""
    show: Callable[[float], str]
    samples: str | None = None
    """Key of its raw samples, one for each unit of a round."""


FIGURES = {
    each.name: each
    for each in (
        Figure("latency", ("faster", "slower"), format_duration, "latencies"),
        Figure("time_per_input", ("faster", "slower"), format_duration),
        Figure("memory", ("smaller", "larger"), format_size),
        Figure("bytes", ("fewer", "more"), format_size),
        Figure("mean_exit", ("earlier", "later"), lambda value: f"{value:.2f}"),
        Figure("score", ("worse", "better"), lambda value: f"{value:.1f}"),
    )
}
"""Figures that can be compared. All are compared by ratios, except the score: by differences in points."""


@dataclass(frozen=True)
class Row:
    """One experiment of both folders. The comparison is that of the second with the first."""

    name: str
    first: float
    second: float
    rounds: int
    compared: Comparison
    p: float
    """Corrected for the number of rows of the table; 1 without an interval."""
    verdict: str
    target: str | None
    """Verdict on the target, if there is one."""
    target_p: float | None
    """p-value of the target being the truth, corrected for the number of rows of the table."""


@dataclass(frozen=True)
class Table:
    """Result of a comparison."""

    figure: Figure
    changed: dict[str, tuple[Any, Any]]
    """Option that differs between the folders -> its value in each."""
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    """Experiments that could not be compared, one line each."""
    notices: tuple[str, ...] = ()
    """Differences between the folders besides options, one line each."""


def compare(first: Sequence[Record], second: Sequence[Record], name: str, at_most: float | None = None) -> Table:
    """Compare a figure of the records of two folders. `at_most` is a target for the ratio, or for the difference.

    Raises UsageError for an unknown figure, and if no experiment is in both, with this figure.
    """
    if name not in FIGURES:
        raise UsageError(f"no figure {name}", None, f"give --figure {', '.join(FIGURES)}")
    figure, sides = FIGURES[name], [_by_options(first), _by_options(second)]
    changed = _changed(*sides)
    groups = [{_without(options, changed): records for options, records in side.items()} for side in sides]
    shared = [options for options in groups[0] if options in groups[1]]
    if not shared:
        what = "no experiment is in both folders"
        raise UsageError(what, None, "compare sweeps of one recipe, or of recipes that differ in one option")
    varied = _varied(shared)
    found, left_out = [], []
    for number, (here, there) in enumerate((groups, groups[::-1]), 1):
        left_out += [f"only in folder {number}: {_named(each, _varied(here))}" for each in here if each not in there]
    for options in shared:
        pair = [_usable(side[options], name) for side in groups]
        rounds = sorted(pair[0].keys() & pair[1].keys())
        if not rounds:
            left_out.append(f"no round of both has the figure {name}: {_named(options, varied)}")
            continue
        records = [[side[number] for number in rounds] for side in pair]
        found.append((_named(options, varied), records, paired(figure, *records)))
    if not found:
        pairs = [[side[options] for side in groups] for options in shared]
        known = [each for each in FIGURES if any(all(_usable(side, each) for side in pair) for pair in pairs)]
        remedy = f"give --figure {', '.join(known)}" if known else "offramp report shows why their jobs failed"
        raise UsageError(f"no round of both folders has the figure {name}", None, remedy)
    notices = _notices([sides for _, sides, _ in found])
    return Table(figure, changed, _rows(figure, found, at_most), tuple(left_out), notices)


def _notices(pairs: Sequence[Sequence[Sequence[Record]]]) -> tuple[str, ...]:
    """Return notices of pairs of records that were measured on other data or another machine."""
    data = [{str(record["inputs"]["data"]) for record in side} - {"None"} for sides in pairs for side in sides]
    machines = [{machine_of(record) for record in side} - {None} for sides in pairs for side in sides]
    num_data, num_machines = (
        sum(bool(here and there and here != there) for here, there in zip(found[::2], found[1::2], strict=True))
        for found in (data, machines)
    )
    found = []
    if num_data:
        found.append(f"{num_data} of {len(pairs)} experiments were measured on other data in the second folder")
    if num_machines:
        found.append(
            f"{num_machines} of {len(pairs)} experiments were measured on another kind of machine in the second folder:"
            " differences of times are not due to what was changed alone"
        )
    return tuple(found)


def machine_of(record: Record) -> tuple[Any, ...] | None:
    """Return what tells the machine of a record from others, its processor and cores; None: unknown."""
    known = record.get("environment")
    return tuple(str(known.get(name)) for name in ("cpu_model", "num_cores")) if known else None


def _rows(figure: Figure, found: Sequence[tuple[str, Any, Comparison]], at_most: float | None) -> tuple[Row, ...]:
    results = [result for _, _, result in found]
    corrected = holm([1.0 if each.p is None else each.p for each in results])
    targets: Sequence[tuple[str | None, float | None]] = [(None, None)] * len(results)
    if at_most is not None:
        targets = table_verdicts([_loss(each) for each in results] if figure.name == "score" else results, at_most)
    rows = []
    for (name, sides, result), p, target in zip(found, corrected, targets, strict=True):
        first, second = (median([record["figures"][figure.name] for record in side]) for side in sides)
        rows.append(Row(name, first, second, len(sides[0]), result, p, _verdict(figure, result, p), *target))
    return tuple(rows)


def _loss(gain: Comparison) -> Comparison:
    """Return the difference of a score as what is lost."""
    low, high = (None if end is None else -end for end in (gain.high, gain.low))
    return gain._replace(value=-gain.value, low=low, high=high)


def _verdict(figure: Figure, result: Comparison, p: float) -> str:
    return figure.words[result.value > _equal(figure)] if differs(figure, result, p) else INCONCLUSIVE


def differs(figure: Figure, result: Comparison, p: float) -> bool:
    """Return whether the sides of a comparison differ significantly. `p` is corrected for the table."""
    if result.low is None or result.high is None:
        return False
    return p <= SIGNIFICANT and not result.low <= _equal(figure) <= result.high


def _equal(figure: Figure) -> float:
    """Return the value of a comparison whose sides are equal."""
    return 0.0 if figure.name == "score" else 1.0


def paired(figure: Figure, first: Sequence[Record], second: Sequence[Record], *, are_seeds: bool = False) -> Comparison:
    """Return the paired comparison of a figure of rounds, or of one record of each seed, which have it: the second side
    with the first.
    """
    if figure.name == "score":
        return _score_difference(first, second, are_seeds)
    units = [[record["samples"].get(figure.samples) for record in side] for side in (first, second)]
    same_data = first[0]["inputs"]["data"] == second[0]["inputs"]["data"]
    lengths = {len(unit) for side in units for unit in side if unit is not None}
    if figure.samples is None or not same_data or len(lengths) != 1 or 0 in lengths or None in (*units[0], *units[1]):
        units = [[[record["figures"][figure.name]] for record in side] for side in (first, second)]
    base_RU, other_RU = (np.array(side, np.float64) for side in units)
    if (base_RU <= 0).any() or (other_RU <= 0).any():  # nothing was read: no ratio
        difference = float(np.median(other_RU) - np.median(base_RU))
        return Comparison(1.0 if difference == 0 else math.inf if difference > 0 else 0.0, None, None, None, None)
    return paired_ratio(base_RU, other_RU)


def _score_difference(first: Sequence[Record], second: Sequence[Record], are_seeds: bool) -> Comparison:
    """Return the difference in points, paired over rows, and over seeds where the rows are not the same. That of rounds
    then has no interval: their answers are equal, so that they do not show what other rows would give.
    """
    if num_rows := num_shared_rows((*first, *second)):
        (value, draws_D), (other, others_D) = (mean_score(side) for side in (first, second))
        return judged(other - value, others_D - draws_D, num_rows, 0.0)
    gains = np.array([b["figures"]["score"] - a["figures"]["score"] for a, b in zip(first, second, strict=True)])
    if not are_seeds:
        return Comparison(float(np.median(gains)), None, None, None, None)
    return median_interval(gains.tolist())


def num_shared_rows(records: Iterable[Record]) -> int:
    """Return the number of rows whose scores can be paired; 0 if the records are not all of the same rows."""
    first, *others = (record["samples"].get("truth") for record in records)
    return len(first) if first is not None and all(truth == first for truth in others) else 0


def mean_score(records: Sequence[Record]) -> tuple[float, np.ndarray]:
    """Return the mean score of runs of the same rows, and that of each resample of the rows [D]."""
    # The answers of rounds are equal, but for a deadline: each that differs counts as often as it was given.
    runs = Counter(tuple(record["samples"]["answers"]) for record in records)
    samples = records[0]["samples"]
    known = [_scores(tuple(samples["metrics"]), tuple(samples["truth"]), answers) for answers in runs]
    weights = [count / len(records) for count in runs.values()]
    value = sum(weight * value for weight, (value, _) in zip(weights, known, strict=True))
    return value, np.sum([weight * draws_D for weight, (_, draws_D) in zip(weights, known, strict=True)], axis=0)


@lru_cache(maxsize=4096)
def _scores(metrics: tuple[str, ...], truth: tuple[float, ...], answers: tuple[float, ...]) -> tuple[float, np.ndarray]:
    truth_N, answer_N = np.array(truth), np.array(answers)
    try:
        draws_D = resampled_scores(metrics, truth_N, answer_N, NUM_SCORE_DRAWS)
        return score(metrics, truth_N, answer_N)["score"], draws_D
    except (TypeError, ValueError) as error:  # such as F1 of texts
        what = f"records whose answers have no {', '.join(metrics)} ({said(error)})"
        raise RefusedError(what, None, "use the release that wrote it, or run the sweep again") from None


Options = tuple[tuple[str, Any], ...]


def _by_options(records: Iterable[Record]) -> dict[Options, list[Record]]:
    """Return the records by the options of their experiments."""
    found: dict[Options, list[Record]] = {}
    for record in records:
        options = flat_options(record)
        found.setdefault(options, []).append(record)
    return found


def flat_options(record: Record) -> Options:
    """Return the options of the experiment of a record, by name, as a value that can be compared."""
    flat = specification_of(record, record.get("key", "")).flat()
    kept = {name: tuple(value) if isinstance(value, list) else value for name, value in flat.items()}
    return tuple(sorted((name, value) for name, value in kept.items() if name not in NOT_IDENTIFYING))


def _changed(first: Mapping[Options, Any], second: Mapping[Options, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the options that have one value in the first and another in the second."""
    sides = [_values(side) for side in (first, second)]
    found = {}
    for name in sides[0].keys() | sides[1].keys():
        here, there = (side.get(name, {None}) for side in sides)
        if len(here) == len(there) == 1 and here != there:
            found[name] = next(iter(here)), next(iter(there))
    return dict(sorted(found.items()))


def _values(side: Iterable[Options]) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}
    for options in side:
        for name, value in options:
            found.setdefault(name, set()).add(value)
    return found


def _without(options: Options, names: Mapping[str, Any]) -> Options:
    return tuple(pair for pair in options if pair[0] not in names)


def _varied(several: Iterable[Options]) -> set[str]:
    """Return the names of the options that have several values."""
    return {name for name, values in _values(several).items() if len(values) > 1}


def _named(options: Options, varied: set[str]) -> str:
    """Return the options that tell an experiment from the others of its table."""
    parts = [f"{name}={spelt(name, value)}" for name, value in options if name in varied]
    return " ".join(parts) or str(dict(options).get("model", "the experiment"))  # the models may be what differs


def current_records(records: Iterable[Record]) -> list[Record]:
    """Return the records of the contents that each experiment was measured on last: a model, data or a file may have
    changed since the others were made. Records that were converted from a study are all kept.
    """
    known = list(records)
    last = {id(record) for record in measured_last(known, _identity)}
    return [record for record in known if "study" in record or id(record) in last]


def measured_last(records: Iterable[Record], identity: Callable[[Record], Any]) -> list[Record]:
    """Return the records of the inputs that were measured last, of those with equal identities."""
    known = [(identity(record), record) for record in records]
    last = {name: record.get("key") for name, record in known}
    return [record for name, record in known if record.get("key") == last[name]]


def _identity(record: Record) -> str:
    tree = record.get("experiment")
    if isinstance(tree, dict):
        tree = {name: value for name, value in tree.items() if name not in NOT_IDENTIFYING}
    return json.dumps(tree, sort_keys=True)


def _usable(records: Iterable[Record], name: str) -> dict[int, Record]:
    """Return the records by round that have a figure which is a number, of the inputs that were measured last."""
    current = measured_last(records, lambda record: None)
    return {record["round"]: record for record in current if record["figures"].get(name) is not None}
