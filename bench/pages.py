"""Page section of each part of the benchmark: verdicts computed from the records, and a table."""

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
"""Number of warm-up passes of a traced run, which are excluded."""

# latency --------------------------------------------------------------------------------------------------------------

RESIDENT = "transformers resident"
LATENCY_LIMITS = {96: 1.6, 128: 1.15, 192: 1.0}
"""Budget in MiB -> largest acceptable latency relative to the resident rival."""
LATENCY_HEAD = (
    "rival, median latency, p95 latency, relative to transformers resident, peak memory (maximum),"
    " peak memory (median), bytes read per pass, lower bound, lower bound / median latency, reads"
)
LATENCY_NOTE = """\
Each row is one rival. Peaks are those of the whole process (VmHWM). Ratios are taken between the medians of one round:
median (minimum..maximum) over the rounds. Bytes read per pass are those returned by read calls: the first read of
residents is divided among all passes of the process, and transformers maps its files, which causes no read calls. The
lower bound is max(sum of computation, sum of reads) + fill (time that cannot overlap: gathering rows, waiting for the
first shard), as measured in the same passes."""


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
    return [peak, at_most(f"{what}latency relative to transformers resident", LATENCY_LIMITS[budget_mib], found)]


def _disk_verdicts(rivals: Found) -> list[Verdict]:
    ours, disk = rivals["offramp 120MiB"], rivals["transformers disk"]
    what = '`--budget 120MiB` against `device_map={"": "disk"}`: '
    speed_ups, peaks = ratios(disk, ours, _round_latency), each_of(disk, "peak_rss_bytes")
    faster = median(speed_ups) >= 1.5 if speed_ups else None
    shares = [peak / median(peaks) for peak in each_of(ours, "peak_rss_bytes")] if peaks else []
    return [
        Verdict(f"{what}speed-up", ">= 1.50x", spread(speed_ups), faster),
        at_most(f"{what}peak relative to its median peak", 0.3, shares),
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
Time from the start of the process to its first line on stdout, measured by the parent: one text of 128 tokens, all
files in the page cache, after one warm-up start of each. Median (minimum..maximum) over the rounds."""


def start(rivals: Found) -> Drawn:
    seconds = {name: each_of(records, "first_label_seconds") for name, records in rivals.items()}
    rows = [(name, trouble(rivals[name]) or spread(values, " s")) for name, values in seconds.items()]
    verdict = at_most("process start to first label, warm", 1.0, seconds["offramp 128MiB"], " s")
    return [verdict], table(("rival", "time to first label"), rows)


# cgroup ---------------------------------------------------------------------------------------------------------------

CGROUP_HEAD = "run, reads, first pass, later passes, relative to no group, charged memory (maximum), failcnt"
CGROUP_NOTE = """\
Twelve texts of 128 tokens, `--budget 120MiB`; later passes: median without the first two. The limit of the group
includes the page cache, so the charged memory approaches the limit whenever files are read; failcnt is the number of
times the limit was hit. All caches are dropped before each run in a group. Time limits: 120 s with buffered reads, 60 s
for transformers; a rival that exceeds its limit twice is not run again. transformers runs on random ids."""


def cgroup(rivals: Found) -> Drawn:
    jailed, free = rivals["128 MiB"], rivals["free"]
    what, num_good = "128 MiB memory cgroup, cold cache, `--budget 120MiB`: ", len(good(jailed))
    complete = (f"{num_good} of {len(jailed)}", num_good == len(jailed)) if jailed else (NONE, None)
    verdicts = [
        Verdict(f"{what}completes", "always", *complete),
        at_most(f"{what}latency relative to no group", 1.3, ratios(jailed, free, _later_seconds)),
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

THROTTLE_HEAD = (
    "computation, reads at 100 MB/s, lower bound, lower bound of the record, latency, latency / lower bound,"
    " latency / lower bound of the record"
)
THROTTLE_NOTE = """\
`--budget 128MiB --reads direct`, one row per round, medians over the passes after the first two. *Computation*: seconds
of computation in a run on the unthrottled disk in the same round. *Reads at 100 MB/s*: bytes read per pass divided by
the limit. The lower bound is the larger of both; the first read adds nothing, because with a stream of texts it starts
before the pass. The lower bound of the record uses the seconds measured by the throttled run, including the fill."""


def throttle(rivals: Found) -> Drawn:
    free, limited = good(rivals["free"]), good(rivals["100 MB/s"])
    rows = [_Throttled(free[number], limited[number]) for number in sorted(free.keys() & limited.keys())]
    what = "disk at 100 MB/s, `--budget 128MiB`: latency relative to the lower bound"
    verdicts = [
        at_most(f"{what} from bytes and limit", 1.1, [row.of_bound for row in rows]),
        at_most(f"{what} of its record", 1.1, [row.of_own_bound for row in rows]),
    ]
    if not rows:
        return verdicts, [f"{name}: {trouble(records) or 'done'}" for name, records in rivals.items()]
    return verdicts, table(THROTTLE_HEAD.split(", "), [row.cells() for row in rows])


class _Throttled:
    """Results of one round: the same command on the unthrottled and on the throttled disk."""

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
First table: largest difference of a logit from transformers, which tokenizes and pads the same texts itself. Its
weights are copied from the mapped file to memory that starts on 64-byte boundaries, as in offramp, because other
alignments change the last bits. Second table: the same three batches, one process per line, compared bit by bit with a
fully resident process; the budgets start near the smallest possible one."""


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
    """ONNX Runtime may differ slightly from transformers; torch must equal one of its attentions."""
    reason = trouble(records)
    largest = {} if reason else {key: max(batches.values()) for key, batches in records[-1]["result"].items()}
    shown = reason or ", ".join(f"{value:.1e} from {attention}" for attention, value in largest.items())
    if name.startswith("ort"):
        met = max(largest.values()) <= 1e-5 if largest else None
        return Verdict(f"{name}: largest difference of a logit", "<= 1e-5", shown, met)
    met = min(largest.values()) == 0 if largest else None
    return Verdict(f"{name}: difference of any logit, same attention", "0", shown, met)


def _budgets(records: Records) -> tuple[Verdict, list[str]]:
    reason, what = trouble(records), "answers bitwise equal for every budget, number of slots and way of reading"
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

EXITS_HEAD = "policy, exit, shards read, slots w, bytes read, required, allowed, within the allowance"
EXITS_NOTE = """\
One text in a new process, before any weight is resident. `stage:k` fixes the exit in advance; `from:k>confidence:0.01`
exits at the same place, but this is decided only there. Bytes read include rows of the embedding tables and reads that
the exit cancelled. *Required*: size of the stages up to k. *Allowed*: in addition the next w shards and the heads, with
w slots."""


def exits(rivals: Found) -> Drawn:
    kept = sum(_keeps(records[-1]) for records in rivals.values() if not trouble(records))
    what = "exit after stage k of 12: reads at most k stages, w more shards and the heads"
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
From the page cache to the disk, with every file flushed. The peak of the process is that reported to its parent by the
kernel."""


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
    """Title, drawing function and note of one section."""

    title: str
    draw: Callable[[Found], Drawn]
    note: str


PAGES = {
    "latency": Page("Latency and memory", latency, LATENCY_NOTE),
    "start": Page("Time to the first label", start, START_NOTE),
    "cgroup": Page("Small memory cgroup", cgroup, CGROUP_NOTE),
    "throttle": Page("Slow disk", throttle, THROTTLE_NOTE),
    "exact": Page("Equality of answers", exact, EXACT_NOTE),
    "exits": Page("Reads saved by exits", exits, EXITS_NOTE),
    "divide": Page("Dividing a checkpoint", divide, DIVIDE_NOTE),
}
