"""Pages: Markdown that a template makes from records.

A template is Jinja2, run in its sandbox: it computes and prints, and reaches neither files nor Python. It sees `rows`,
the records as flat names and values, and the functions below as filters. What it prints is escaped so that it ends no
cell and begins no HTML: a bar of a table stands outside of `{{ }}`, or is that of `cells`. Equal records give equal
pages.

    {% for row in rows | where(part="speed") %}
    | {{ row.task }} | {{ rows | where(task=row.task) | of("latency") | median | ms }} |
    {% endfor %}
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp.errors import UsageError, import_error, innermost_line, missing, said
from offramp.measure import median
from offramp.measure.statistics import FEWEST_SAMPLES, INCONCLUSIVE, MET, MISSED, median_interval
from offramp.measure.statistics import verdict as by_interval
from offramp.reporting.tables import NONE, printable
from offramp.units import mib, ms

Row = dict[str, Any]


def page_from(template: Path, records: Iterable[Mapping[str, Any]]) -> str:
    """Return the page of a template. Raises UsageError with the line of the template that is wrong."""
    try:
        from jinja2 import TemplateSyntaxError
    except ImportError as error:
        raise import_error(error, "jinja2", "report") from None
    environment = _environment()
    try:
        text = template.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise missing(template, "template") from None
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read a template ({said(error)})", template, "name a text file") from None
    try:
        made = environment.from_string(text).render(rows=[flat(record) for record in records])
    except Exception as error:  # a template may do anything that its sandbox allows
        line = error.lineno if isinstance(error, TemplateSyntaxError) else innermost_line(error, "<template>")
        what = f"the template is wrong: {said(error)}"
        raise UsageError(what, f"{template}, line {line}", "correct the template") from None
    lines = "\n".join(line.rstrip(" \t") for line in made.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


def _environment() -> Any:
    """Return the environment of templates, which escapes what they print; outputs of macros were escaped inside."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, extensions=["jinja2.ext.do"], autoescape=True,
        finalize=_harmless,
    )  # fmt: skip
    environment.filters.update(FILTERS)
    return environment


def flat(record: Mapping[str, Any]) -> Row:
    """Return the names and values of a record on one level: options, figures, what its study says of it, samples; of a
    job that failed, the reason as `failed`.
    """
    found: Row = dict(record.get("run") or {})
    for name, value in (record.get("experiment") or {}).items():
        found.update(value if isinstance(value, dict) else {name: value})
    for part in ("samples", "figures", "study"):  # in this order: `memory` is a figure, and of traced jobs also samples
        found.update(record.get(part) or {})
    found.update({name: record[name] for name in ("round", "environment") if name in record})
    if record.get("reason") is not None:
        found["failed"] = record["reason"]["what"]
    return found


def where(rows: Iterable[Row], /, **wanted: Any) -> list[Row]:
    """Return the rows with these values; a list of values means any of them."""
    return [row for row in rows if all(_is_one(row.get(name), value) for name, value in wanted.items())]


def of(rows: Iterable[Row], name: str) -> list[Any]:
    """Return the values of a name, without those of rows that lack it."""
    return [row[name] for row in rows if row.get(name) is not None]


def ratios(rows: Iterable[Row], bases: Iterable[Row], name: str, largest: bool = False) -> list[float]:
    """Return the values of a name divided by those of the same round of other rows, which are its bases.

    Where several rows of the bases have one round, the smallest or the largest counts.
    """
    base: dict[Any, float] = {}
    for row in bases:
        if row.get(name) is not None:
            base[row["round"]] = (max if largest else min)(row[name], base.get(row["round"], row[name]))
    return [row[name] / base[row["round"]] for row in rows if row.get(name) is not None and row["round"] in base]


def groups(rows: Iterable[Row], *names: str) -> list[tuple[Any, ...]]:
    """Return the values of these names that rows have together, each once, in the order of their first rows."""
    return list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))


def inverse(values: Iterable[float]) -> list[float]:
    """Return 1 / value of each: slow-downs as speed-ups."""
    return [1 / value for value in values]


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean."""
    return sum(values) / len(values)


def spread(values: Sequence[float], unit: str = "x", digits: int = 2) -> str:
    """Return "median (smallest..largest)"."""
    if not values:
        return NONE
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle}{unit} ({least}..{most})"


def interval(row: Row | None, name: str, form: str = "+.1f") -> str:
    """Return "value [low high]" of a name; the ends are called NAME_low and NAME_high. Of no row it is a dash."""
    if row is None:
        return NONE
    value, low, high = (row.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return ""
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}} {high:{form}}]"


def gain(rows: Iterable[Row], bases: Iterable[Row]) -> Row | None:
    """Return by how many points rows score more than their bases, as `interval` takes it: paired by seed and by text.

    A seed counts once: its rounds give equal answers. None where nothing can be paired.
    """
    import numpy as np

    from offramp.tasks.metrics import paired_interval

    mine, known = ({row["seed"]: row for row in side if "answers" in row} for side in (rows, bases))
    pairs = [(row, known[seed]) for seed, row in mine.items() if seed in known]
    truth = pairs[0][0]["truth"] if pairs else None
    if truth is None or any(each["truth"] != truth for pair in pairs for each in pair):
        return None
    ours, theirs = (np.array([pair[side]["answers"] for pair in pairs]) for side in (0, 1))
    found = paired_interval(tuple(pairs[0][0]["metrics"]), np.array(truth), ours, theirs)
    return dict(zip(("gain", "gain_low", "gain_high"), found, strict=True))


def machines(rows: Iterable[Row]) -> list[str]:
    """Return the machines that rows were measured on, with versions, each once."""
    found: dict[str, None] = {}
    for here in of(rows, "environment"):
        versions = {"offramp": here["offramp_version"], "python": here["python_version"], **here["library_versions"]}
        place = f"{here['cpu_model']}, {here['num_cores']} cores, {here['platform']}"
        found[f"{place}: {', '.join(f'{name} {version}' for name, version in versions.items())}"] = None
    return list(found)


def rivals(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the rivals that rows are of, each with the versions of what it ran, once."""
    found = {
        f"{row['rival']}: {', '.join(f'{name} {version}' for name, version in sorted(row['versions'].items()))}"
        for row in rows
        if row.get("rival") and row.get("versions")
    }
    return sorted(found)


def failures(rows: Iterable[Row]) -> list[tuple[str, int]]:
    """Return the reasons of jobs that failed, and how many rows each has."""
    return list(Counter(of(rows, "failed")).items())


def fact(met: bool) -> str:
    """Return the verdict on what does not vary between measurements: bits, largest peaks, reads, bounds."""
    return MET if met else MISSED


def point(met: bool) -> str:
    """Return the verdict on one figure that has no interval, named as such: another measurement may give another."""
    return f"{fact(met)} (point)"


def verdict(rounds: Sequence[float], at_most: float | None = None, at_least: float | None = None) -> str:
    """Return the verdict on the median of the figures of rounds: `met`, `missed` or `inconclusive`, by its interval.

    It is that of this target alone, not of a table. Too few rounds for an interval are counted.
    """
    if len(rounds) < FEWEST_SAMPLES:
        return f"{INCONCLUSIVE} ({len(rounds)} round{'' if len(rounds) == 1 else 's'})"
    found = median_interval(rounds)
    return verdict_of({"it_low": found.low, "it_high": found.high}, "it", at_most, at_least)


def verdict_of(row: Row, name: str, at_most: float | None = None, at_least: float | None = None) -> str:
    """Return the verdict on a name whose interval is known: its ends are called NAME_low and NAME_high."""
    low, high = (row.get(f"{name}_{end}") for end in ("low", "high"))
    if at_most is not None:
        return by_interval(low, high, at_most)
    if at_least is None:
        raise ValueError("a verdict needs at_most or at_least")
    return by_interval(None if high is None else -high, None if low is None else -low, -at_least)


def joint(verdicts: Iterable[str]) -> str:
    """Return the verdict on a target of several conditions: missed if one is, met if all are."""
    known = list(verdicts)
    return MISSED if MISSED in known else next((each for each in known if each != MET), MET)


def enough(verdicts: Iterable[str], least: int) -> str:
    """Return the verdict on the number of verdicts that are met."""
    known = list(verdicts)
    num_met, num_missed = known.count(MET), known.count(MISSED)
    if num_met >= least or len(known) - num_missed < least:
        return fact(num_met >= least)
    return next(each for each in known if each not in (MET, MISSED))


def mean_of(rows: Sequence[Row], name: str) -> Row:
    """Return the mean of a name over rows of different data, as `interval` takes it: half widths add as squares."""
    value = mean([row[name] for row in rows])
    widths = (math.sqrt(sum((row[f"{name}_{end}"] - row[name]) ** 2 for row in rows)) for end in ("low", "high"))
    below, above = (width / len(rows) for width in widths)
    return {name: value, f"{name}_low": value - below, f"{name}_high": value + above}


def yes(met: bool) -> str:
    """Return the word of a table for what holds, or not."""
    return "yes" if met else "**no**"


def cells(values: Iterable[Any]) -> str:
    """Return values with the bars of a table between them."""
    from markupsafe import Markup

    return Markup(" | ".join(map(_harmless, values)))  # each is escaped  # nosec B704


_FILTERS = (
    where, of, groups, ratios, inverse, mean, median, spread, gain, interval, machines, rivals, failures, mib, ms, yes,
    cells, fact, point, verdict, verdict_of, joint, enough, mean_of,
)  # fmt: skip
FILTERS: dict[str, Callable[..., Any]] = {
    **{each.__name__: each for each in _FILTERS},
    "form": lambda value, form: NONE if value is None else f"{value:{form}}",
    "ordered": sorted,
}
"""Functions that a template calls after a bar."""


def _is_one(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, (list, tuple)) else value == wanted


def _harmless(value: Any) -> str:
    """Return a value as text on one line that ends no cell and begins no HTML, so that nothing escapes it again."""
    from markupsafe import Markup

    if isinstance(value, Markup):
        return value
    escaped = re.sub(r"([\\|])", r"\\\1", printable(str(value)))
    return Markup(re.sub(r"<(?=[A-Za-z/!?])", "&lt;", escaped))  # nosec B704
