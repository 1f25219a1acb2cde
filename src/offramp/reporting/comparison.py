"""Tables of a comparison with rivals, from its records: one row for each way to run the model.

Shapes: R rounds, N inputs, C scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.measure import median, percentile
from offramp.measure.statistics import paired_ratio
from offramp.units import format_duration, format_size

TOLERANCES = {"fp32": (0.001, 0.0), "fp16": (0.05, 0.8), "bf16": (0.1, 0.8), "int8": (0.25, 0.8)}
"""Precision -> largest difference of a score from the reference, as a fraction of the range of all scores, and smallest
fraction of inputs with the same label. Measured on random weights of BERT-base's shape, whose scores differ little:
fp32 1e-5, bf16 0.03, int8 0.03; another text gives 0.3. Float32 has no condition on labels: near ties may differ."""
Record = Mapping[str, Any]
"""One process: `name`, `round` (None: in the memory group), and `result` or `failed`."""


@dataclass(frozen=True)
class Row:
    """One way to run the model. Figures are None where there is a reason why it has none."""

    name: str
    precision: str
    versions: dict[str, str]
    reason: str | None = None
    """Why it was not measured, or why its figures do not count."""
    rounds: int = 0
    largest_load: float | None = None
    """Largest load average of the machine when a process began."""
    latency_seconds_median: float | None = None
    latency_seconds_p95: float | None = None
    ratio: float | None = None
    """Median over rounds of the ratio of median latencies to the baseline in the same round, and its 95 % interval."""
    ratio_low: float | None = None
    ratio_high: float | None = None
    peak_rss_bytes: int | None = None
    bytes_read_per_input: float | None = None
    difference: float | None = None
    """Largest difference of a score from the reference, as a fraction of the range of all scores."""
    same_labels: float | None = None
    group: str | None = None
    """Result in the memory group: `finished`, `killed`, `refused`, or another reason."""
    group_latency_seconds: float | None = None
    group_limit_hits: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A row to be: what it is, and its records, or the reason why it could not be run."""

    name: str
    precision: str
    versions: dict[str, str]
    records: Sequence[Record] = ()
    reason: str | None = None

    @property
    def results(self) -> dict[int, Record]:
        """Results by round."""
        return {
            each["round"]: each["result"] for each in self.records if "result" in each and each["round"] is not None
        }


def rows_of(candidates: Sequence[Candidate]) -> list[Row]:
    """Return a row for each candidate. The baseline is the first whose answers agree; the reference of the answers is
    the first that was measured in float32.
    """
    measured = [each for each in candidates if each.results]
    reference = next((each for each in measured if each.precision == "fp32"), None)
    baseline = next((each for each in measured if _fault(each, reference) is None), None)
    return [_row(each, baseline, reference) if each.results else _absent(each) for each in candidates]


def _absent(candidate: Candidate) -> Row:
    failed = [each["failed"] for each in candidate.records if "failed" in each and each["round"] is not None]
    reason = candidate.reason or (failed[-1] if failed else "not measured yet")
    return Row(candidate.name, candidate.precision, candidate.versions, reason, **_in_group(candidate))


def _fault(candidate: Candidate, reference: Candidate | None) -> str | None:
    """Return what is wrong with the answers of a candidate, or None."""
    if reference is None:
        return None
    difference, same_labels = compare(_first(candidate)["scores"], _first(reference)["scores"])
    largest, fewest = TOLERANCES[_precision(candidate)]
    if difference <= largest and same_labels >= fewest:
        return None
    return (
        f"its answers differ from those of {reference.name} by {difference:.2g} of the range of scores"
        f" ({largest:g} is allowed), {100 * same_labels:.0f} % equal labels"
    )


def _precision(candidate: Candidate) -> str:
    return _first(candidate).get("precision") or candidate.precision


def _row(candidate: Candidate, baseline: Candidate | None, reference: Candidate | None) -> Row:
    results = list(candidate.results.values())
    about: dict[str, Any] = {"name": candidate.name, "precision": _precision(candidate), "versions": candidate.versions}
    if reference is not None:
        about["difference"], about["same_labels"] = compare(results[0]["scores"], _first(reference)["scores"])
    reason = _fault(candidate, reference)
    if reason is not None or baseline is None:
        return Row(**about, reason=reason)
    latencies = [seconds for result in results for seconds in result["latencies_seconds"]]
    ratio, low, high = _ratio(candidate, baseline)
    return Row(
        **about,
        rounds=len(results),
        largest_load=max(
            (each.get("load", 0.0) for each in candidate.records if each["round"] is not None), default=None
        ),
        latency_seconds_median=median(latencies),
        latency_seconds_p95=percentile(latencies, 95),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        peak_rss_bytes=max(result["peak_rss_bytes"] for result in results),
        bytes_read_per_input=median([result["bytes_read_per_input"] for result in results]),
        **_in_group(candidate),
    )


def _first(candidate: Candidate) -> Record:
    return next(iter(candidate.results.values()))


def compare(scores_NC: Sequence[Sequence[float]], others_NC: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return the largest difference of a score as a fraction of the range of `others`, and the fraction of inputs with
    the same label; infinity and 0 for arrays of other shapes.
    """
    found_NC, wanted_NC = np.array(scores_NC), np.array(others_NC)
    if found_NC.shape != wanted_NC.shape:
        return float("inf"), 0.0
    scale = float(np.ptp(wanted_NC)) or 1.0
    same = (found_NC.argmax(1) == wanted_NC.argmax(1)).mean()
    return float(np.abs(found_NC - wanted_NC).max()) / scale, float(same)


def _ratio(candidate: Candidate, baseline: Candidate) -> tuple[float | None, float | None, float | None]:
    """Return the ratio of latencies within rounds and its interval, which few rounds do not have."""
    mine, theirs = (
        {n: median(r["latencies_seconds"]) for n, r in each.results.items()} for each in (candidate, baseline)
    )
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return None, None, None
    found = paired_ratio(np.array([[theirs[number]] for number in both]), np.array([[mine[number]] for number in both]))
    return found.value, found.low, found.high


def _in_group(candidate: Candidate) -> dict[str, Any]:
    """Return the fields that say what became of a candidate in the memory group."""
    record = next((each for each in reversed(candidate.records) if each["round"] is None), None)
    if record is None:
        return {}
    hits = {"group_limit_hits": record.get("hits")}
    if "failed" in record:
        return {
            "group": "killed" if record.get("killed") else "refused" if record.get("refused") else record["failed"],
            **hits,
        }
    return {"group": "finished", "group_latency_seconds": median(record["result"]["latencies_seconds"]), **hits}


def table_cells(rows: Sequence[Row], group: str | None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the heading and the rows of the table; `group` is the limit of the memory group."""
    baseline = next((row.name for row in rows if row.ratio is not None), "the first")
    head = ["run", "precision", "median latency", "p95 latency", f"of {baseline} [95 %]", "peak memory"]
    head += ["bytes read per input", "largest difference", "same labels"] + (
        [f"in a group of {group}"] if group else []
    )
    found = []
    for row in rows:
        if row.latency_seconds_median is None:
            cells = [row.name, row.precision, *["-"] * 7]
        else:
            assert row.latency_seconds_p95 and row.peak_rss_bytes and row.bytes_read_per_input is not None
            cells = [row.name, row.precision, format_duration(row.latency_seconds_median)]
            cells += [format_duration(row.latency_seconds_p95), _interval(row), format_size(row.peak_rss_bytes)]
            cells += [_read_cell(row.bytes_read_per_input), *_agreement(row)]
        found.append((*cells, _group_cell(row)) if group else tuple(cells))
    return tuple(head), found


def _read_cell(num_bytes: float) -> str:
    """Format bytes read; the few bytes by which a process measures itself are none."""
    return format_size(num_bytes) if num_bytes >= 1 << 10 else "none"


def _interval(row: Row) -> str:
    if row.ratio is None:
        return "-"
    return f"{row.ratio:.2f}x" + ("" if row.ratio_low is None else f" [{row.ratio_low:.2f}, {row.ratio_high:.2f}]")


def _agreement(row: Row) -> tuple[str, str]:
    if row.difference is None or row.same_labels is None:
        return "-", "-"
    return f"{row.difference:.1g}", f"{100 * row.same_labels:.0f} %"


def _group_cell(row: Row) -> str:
    if row.group is None:
        return "-"
    latency = "" if row.group_latency_seconds is None else f" {format_duration(row.group_latency_seconds)}"
    hits = "" if row.group_limit_hits is None else f", {row.group_limit_hits:,} limit hits"
    return f"{row.group}{latency}{hits}"


def absences(rows: Sequence[Row]) -> list[str]:
    """Return a sentence for each row without figures."""
    return [f"{row.name}: {row.reason}" for row in rows if row.reason is not None]


NOTES = """\
Every run is a process of its own that measures itself: the peak is that of the whole process (VmHWM), imports and
loading included. All see the same token ids, one text at a time, after two passes to warm up, from a warm page cache.
Latencies are medians and 95th percentiles over all passes of all rounds; ratios are taken between medians of the same
round, with a bootstrap interval over rounds. Bytes read are those that read calls returned; pages of mapped files are
not among them. The largest difference of a score from the first run in float32 is a fraction of the range of all
scores; a run whose answers differ by more than {tolerances} has no figures.
Converting a model is not part of any figure."""
GROUP_NOTES = """\
In a memory cgroup of {group}, which counts the page cache too, each run starts from an empty page cache, and has
{seconds} to finish. *Killed*: the kernel ended it for lack of memory."""


@dataclass(frozen=True)
class About:
    """The facts of a page."""

    command: str
    measured: str
    """Date."""
    model: str
    environment: Mapping[str, Any]
    instructions: Sequence[str]
    threads: int
    group: str | None
    group_seconds: float


def page(rows: Sequence[Row], about: About) -> str:
    """Return a page in Markdown: command, machine, versions, table, runs without figures, and notes."""
    facts = about.environment
    memory = format_size(facts["total_memory_bytes"])
    versions = {name: version for row in rows for name, version in row.versions.items()}
    versions = {**facts["library_versions"], **versions, "python": facts["python_version"]}
    tolerances = ", ".join(f"{largest:g} ({precision})" for precision, (largest, _) in TOLERANCES.items())
    load = max(row.largest_load or 0.0 for row in rows)
    notes = NOTES.format(tolerances=tolerances)
    if about.group is not None:
        notes += "\n" + GROUP_NOTES.format(group=about.group, seconds=format_duration(about.group_seconds))
    lines = [
        "# Comparison with rivals",
        "",
        f"- command: `{about.command}`",
        f"- measured: {about.measured} (UTC)",
        f"- model: {about.model}",
        f"- machine: {facts['cpu_model']}, {about.threads} threads of {facts['num_cores']} cores, {memory} of memory,"
        f" {facts['platform']} {facts['kernel']}; instructions: {', '.join(about.instructions)}",
        f"- versions: offramp {facts['offramp_version']}, "
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        f"- rounds: {max(row.rounds for row in rows)}; largest load average when a process began: {load:.1f}; what else"
        " runs on the machine adds to it",
        "",
        *_markdown(*table_cells(rows, about.group)),
        "",
        *(f"- {_cell(line)}" for line in absences(rows)),
    ]
    return "\n".join([*lines, *([""] if absences(rows) else []), notes, ""])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in (head, ["---"] * len(head), *rows)]


def _cell(text: str) -> str:
    """Return text that ends no cell and begins no markup."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
