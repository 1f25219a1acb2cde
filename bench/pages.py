"""A page for each section of the benchmark: its verdicts, computed from the records, and its table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from figures import (
    NONE,
    Records,
    Result,
    Verdict,
    at_most,
    each_of,
    good,
    mib,
    ms,
    peak_at_most,
    ratios,
    spread,
    table,
    trouble,
    yes,
)

from offramp.measure import median, percentile

Found = dict[str, Records]
"""Rival -> its records."""
Drawn = tuple[list[Verdict], list[str]]
NUM_WARM_UP = 2
"""Passes of a traced run that do not count."""

# latency --------------------------------------------------------------------------------------------------------------

RESIDENT = "transformers resident"
LATENCY_LIMITS = {96: 1.6, 128: 1.15, 192: 1.0}
"""Budget in MiB -> of the resident rival's latency."""
LATENCY_HEAD = (
    "rival, median, p95, of transformers resident, largest peak, median peak, read a pass, bound, of bound, reads"
)
LATENCY_NOTE = """\
Peaks are those of the whole process (VmHWM). Ratios are between the medians of one round: median (least..most) over the
rounds. What a pass reads are read calls: the first fill of residents is shared among all passes of the process, and
transformers maps its files, which no read call shows. The bound is max(sum of computing, sum of reading) + fill (what
nothing could hide: gathering rows, waiting for the first shard), as measured in the same passes."""


def latency(rivals: Found) -> Drawn:
    verdicts = [verdict for budget_mib in LATENCY_LIMITS for verdict in _budget_verdicts(budget_mib, rivals)]
    rows = [_latency_row(name, records, rivals[RESIDENT]) for name, records in rivals.items()]
    return [*verdicts, *_disk_verdicts(rivals)], table(LATENCY_HEAD.split(", "), rows)


def _round_latency(result: Result) -> float:
    return median(result["latencies_seconds"])


def _budget_verdicts(budget_mib: int, rivals: Found) -> list[Verdict]:
    records, what = rivals[f"offramp {budget_mib}MiB"], f"`--budget {budget_mib}MiB`: "
    peak = peak_at_most(f"{what}largest peak of the whole process", budget_mib, each_of(records, "peak_rss_bytes"))
    if any("failed" in each["result"] for each in records):
        peak = Verdict(peak.what, peak.target, trouble(records) or "failed", False)
    found = ratios(records, rivals[RESIDENT], _round_latency)
    return [peak, at_most(f"{what}latency of transformers resident", LATENCY_LIMITS[budget_mib], found)]


def _disk_verdicts(rivals: Found) -> list[Verdict]:
    ours, disk = rivals["offramp 120MiB"], rivals["transformers disk"]
    what = '`--budget 120MiB` against `device_map={"": "disk"}`: '
    speed_ups, peaks = ratios(disk, ours, _round_latency), each_of(disk, "peak_rss_bytes")
    faster = median(speed_ups) >= 1.5 if speed_ups else None
    shares = [peak / median(peaks) for peak in each_of(ours, "peak_rss_bytes")] if peaks else []
    return [
        Verdict(f"{what}times as fast", ">= 1.50x", spread(speed_ups), faster),
        at_most(f"{what}of its median peak", 0.3, shares),
    ]


def _latency_row(name: str, records: Records, resident: Records) -> Sequence[str]:
    if reason := trouble(records):
        return (name, reason)
    results = list(good(records).values())
    latencies = [seconds for result in results for seconds in result["latencies_seconds"]]
    peaks, read_bytes = each_of(records, "peak_rss_bytes"), median(each_of(records, "bytes_read_per_input"))
    row = (
        name,
        ms(median(latencies)),
        ms(percentile(latencies, 95)),
        spread(ratios(records, resident, _round_latency)),
        mib(max(peaks)),
        mib(median(peaks)),
    )
    if "bound_seconds" not in results[0]:
        return (*row, mib(read_bytes) if read_bytes > 1 << 20 else "mapped")
    bound = median(each_of(records, "bound_seconds"))
    reads = ", ".join(sorted({result["reads"] for result in results}))
    return (*row, mib(read_bytes), ms(bound), f"{100 * bound / median(latencies):.0f} %", reads)


# start ----------------------------------------------------------------------------------------------------------------

START_NOTE = """\
From the start of the process to its first line on stdout, seen from outside: one text of 128 tokens, everything in the
page cache, one start of each beforehand. Median (least..most) over the rounds."""


def start(rivals: Found) -> Drawn:
    seconds = {name: each_of(records, "first_label_seconds") for name, records in rivals.items()}
    rows = [(name, trouble(rivals[name]) or spread(values, " s")) for name, values in seconds.items()]
    verdict = at_most("process start to first label, warm", 1.0, seconds["offramp 128MiB"], " s")
    return [verdict], table(("rival", "first label after"), rows)


# cgroup ---------------------------------------------------------------------------------------------------------------

CGROUP_HEAD = "run, reads, first pass, later passes, of free, charged at most, failcnt"
CGROUP_NOTE = """\
Twelve texts of 128 tokens, `--budget 120MiB`; later passes: the median without the first two. The group's limit counts
the page cache, too, so what is charged comes near the limit wherever files are read; failcnt says how often the limit
was hit. All caches are dropped before each run in a group. Time limits: 120 s with buffered reads, 60 s for
transformers; a rival that ran into its limit twice is not tried again. transformers' passes are random ids."""


def cgroup(rivals: Found) -> Drawn:
    jailed, free = rivals["128 MiB"], rivals["free"]
    what, num_good = "128 MiB memory cgroup, cold cache, `--budget 120MiB`: ", len(good(jailed))
    complete = (f"{num_good} of {len(jailed)}", num_good == len(jailed)) if jailed else (NONE, None)
    verdicts = [
        Verdict(f"{what}completes", "always", *complete),
        at_most(f"{what}of its free latency", 1.3, ratios(jailed, free, _later_seconds)),
    ]
    return verdicts, table(CGROUP_HEAD.split(", "), [_cgroup_row(name, rivals[name], free) for name in rivals])


def _later_seconds(result: Result) -> float:
    return median([each["seconds"] for each in result["passes"][NUM_WARM_UP:]])


def _cgroup_row(name: str, records: Records, free: Records) -> Sequence[str]:
    usages = [each["result"] for each in records if "failcnt" in each["result"]]
    charged = mib(max(usage["charged_peak_bytes"] for usage in usages)) if usages else ""
    ends = (charged, f"{median([usage['failcnt'] for usage in usages]):,.0f}") if usages else ()
    if reason := trouble(records):
        num_texts = max((len(each["result"].get("line_seconds", ())) for each in records), default=0)
        return (name, "", f"{reason}{f', after {num_texts} texts' if num_texts else ''}", "", "", *ends)
    results = list(good(records).values())
    if "passes" not in results[0]:
        return (name, "", "finished", ms(median([_round_latency(result) for result in results])), "", *ends)
    return (
        name,
        ", ".join(sorted({result["record"]["reads"] for result in results})),
        ms(median([result["passes"][0]["seconds"] for result in results])),
        ms(median([_later_seconds(result) for result in results])),
        spread(ratios(records, free, _later_seconds)),
        *ends,
    )


# throttle -------------------------------------------------------------------------------------------------------------

THROTTLE_HEAD = "sum c, sum r, their bound, the record's bound, a pass, of their bound, of the record's bound"
THROTTLE_NOTE = """\
`--budget 128MiB --reads direct`, a row for each round, medians over the passes after the first two. sum c: the seconds
of computing of a run on the free disk in the same round. sum r: the bytes that a pass reads, at 100 MB/s. Their bound
is the larger one, with nothing for the first read, since a stream of texts begins it before the pass. The record's
bound is made of the seconds that the throttled run measured itself, its fill included."""


def throttle(rivals: Found) -> Drawn:
    free, limited = good(rivals["free"]), good(rivals["100 MB/s"])
    rows = [_Throttled(free[number], limited[number]) for number in sorted(free.keys() & limited.keys())]
    what = "disk at 100 MB/s, `--budget 128MiB`: a pass of max(sum c, sum r) + fill"
    verdicts = [
        at_most(f"{what}, from bytes and the limit", 1.1, [row.of_bound for row in rows]),
        at_most(f"{what}, as its record says", 1.1, [row.of_own_bound for row in rows]),
    ]
    if not rows:
        return verdicts, [f"{name}: {trouble(records) or 'done'}" for name, records in rivals.items()]
    return verdicts, table(THROTTLE_HEAD.split(", "), [row.cells() for row in rows])


class _Throttled:
    """One round: the same command on the free and on the throttled disk."""

    def __init__(self, free: Result, limited: Result) -> None:
        passes = limited["passes"][NUM_WARM_UP:]
        self.compute = median([each["compute_seconds"] for each in free["passes"][NUM_WARM_UP:]])
        self.read = median([each["bytes"] for each in passes]) / limited["limit_bytes_per_second"]
        self.bound, self.own_bound = max(self.compute, self.read), limited["record"]["bound_seconds"]
        self.seconds = _later_seconds(limited)
        self.of_bound, self.of_own_bound = self.seconds / self.bound, self.seconds / self.own_bound

    def cells(self) -> list[str]:
        seconds = (self.compute, self.read, self.bound, self.own_bound, self.seconds)
        return [*(f"{value:.3f} s" for value in seconds), f"{self.of_bound:.2f}x", f"{self.of_own_bound:.2f}x"]


# exact ----------------------------------------------------------------------------------------------------------------

EXACT_HEAD = "backend and shape; transformers' attention; four texts, 5 to 128 tokens; four pairs; one text, 128 tokens"
BUDGETS_HEAD = "budget, slots, residents, reads, equal"
BUDGETS = "budgets"
EXACT_NOTE = """\
Above: the largest difference of a logit from transformers, which tokenizes and pads the same texts itself. Its weights
are copied from the mapped file to memory that begins on 64-byte boundaries, as ours does: elsewhere the last bits
differ. Below it:
the same three batches, a process a line, compared bit by bit with a process in which everything stays resident; the
budgets begin near the smallest that is possible there."""


def exact(rivals: Found) -> Drawn:
    compared = {name: records for name, records in rivals.items() if name != BUDGETS}
    rows = [row for name, records in compared.items() for row in _exact_rows(name, records)]
    verdict, lines = _budgets(rivals[BUDGETS])
    verdicts = [*(_exact_verdict(name, records) for name, records in compared.items()), verdict]
    return verdicts, [*table(EXACT_HEAD.split("; "), rows), "", *lines]


def _exact_rows(name: str, records: Records) -> list[Sequence[str]]:
    if reason := trouble(records):
        return [(name, reason)]
    found = records[-1]["result"]
    return [(name, attention, *(f"{value:.1e}" for value in found[attention].values())) for attention in found]


def _exact_verdict(name: str, records: Records) -> Verdict:
    """ONNX Runtime may differ a little from either attention of transformers; torch from one of them not at all."""
    reason = trouble(records)
    largest = {} if reason else {key: max(batches.values()) for key, batches in records[-1]["result"].items()}
    shown = reason or ", ".join(f"{value:.1e} from {attention}" for attention, value in largest.items())
    if name.startswith("ort"):
        met = max(largest.values()) <= 1e-5 if largest else None
        return Verdict(f"{name}: largest difference of a logit", "<= 1e-5", shown, met)
    met = min(largest.values()) == 0 if largest else None
    return Verdict(f"{name}: difference of any logit, same attention", "0", shown, met)


def _budgets(records: Records) -> tuple[Verdict, list[str]]:
    reason, what = trouble(records), "answers equal bit by bit, for every budget, number of slots and way of reading"
    if reason:
        return Verdict(what, "all", reason, None), [reason]
    runs = records[-1]["result"]["runs"]
    num_equal = sum(run["equal"] for run in runs)
    verdict = Verdict(what, "all", f"{num_equal} of {len(runs)}", num_equal == len(runs))
    return verdict, table(BUDGETS_HEAD.split(", "), [_budget_row(run) for run in runs])


def _budget_row(run: Result) -> Sequence[str]:
    if "failed" in run:
        return (run["failed"],)
    return (mib(run["budget_bytes"]), str(run["num_slots"]), str(run["num_residents"]), run["reads"], yes(run["equal"]))


# exits ----------------------------------------------------------------------------------------------------------------

EXITS_HEAD = "policy, left at, shards read, slots w, read, needed, allowed, kept"
EXITS_NOTE = """\
One text in a new process, nothing resident yet. `stage:k` says beforehand where it ends; `from:k>confidence:0.01`
leaves at the same exit, but only that exit can tell. What is read includes rows of the embedding tables and reads that
the exit broke off; needed is what the stages up to k hold, and allowed adds the next w shards and the heads."""


def exits(rivals: Found) -> Drawn:
    kept = sum(_keeps(records[-1]) for records in rivals.values() if not trouble(records))
    what = "exit after stage k of 12: reads at most k stages, w shards more and the heads"
    found = (f"{kept} of {len(rivals)}", kept == len(rivals)) if any(rivals.values()) else (NONE, None)
    verdict = Verdict(what, "always", *found)
    return [verdict], table(EXITS_HEAD.split(", "), [_exit_row(policy, rivals[policy]) for policy in rivals])


def _keeps(record: Result) -> bool:
    result = record["result"]
    return result["bytes_read"] <= result["allowed_bytes"] and result["exit_stage"] == record["settings"]["stage"]


def _exit_row(policy: str, records: Records) -> Sequence[str]:
    if reason := trouble(records):
        return (f"`{policy}`", reason)
    result = records[-1]["result"]
    numbers = (str(result[key]) for key in ("exit_stage", "shards_read", "num_slots"))
    sizes = (mib(result[key]) for key in ("bytes_read", "needed_bytes", "allowed_bytes"))
    return (f"`{policy}`", *numbers, *sizes, yes(_keeps(records[-1])))


# divide ---------------------------------------------------------------------------------------------------------------

DIVIDE_NOTE = """\
From the page cache onto the disk, every file synced. The peak is the process's as the kernel tells its parent."""


def divide(rivals: Found) -> Drawn:
    rows = [_divide_row(name, records) for name, records in rivals.items()]
    peaks = each_of(rivals["safetensors"], "peak_rss_bytes")
    verdict = peak_at_most("`offramp divide` from safetensors: largest peak", 80, peaks)
    return [verdict], table(("source", "seconds", "largest peak"), rows)


def _divide_row(name: str, records: Records) -> Sequence[str]:
    if reason := trouble(records):
        return (name, reason)
    return (name, spread(each_of(records, "seconds"), " s", 1), mib(max(each_of(records, "peak_rss_bytes"))))


@dataclass(frozen=True)
class Page:
    """How a section is shown."""

    title: str
    draw: Callable[[Found], Drawn]
    note: str


PAGES = {
    "latency": Page("Latency and memory", latency, LATENCY_NOTE),
    "start": Page("From nothing to the first label", start, START_NOTE),
    "cgroup": Page("In a small memory cgroup", cgroup, CGROUP_NOTE),
    "throttle": Page("On a slow disk", throttle, THROTTLE_NOTE),
    "exact": Page("The same answers", exact, EXACT_NOTE),
    "exits": Page("What an exit saves", exits, EXITS_NOTE),
    "divide": Page("Dividing a checkpoint", divide, DIVIDE_NOTE),
}
