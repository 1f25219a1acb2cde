"""Compare this checkout with another commit on the main job: `python bench/main_job.py --out OUT --against COMMIT`.

Each side divides its own stores from the same random models and runs with its own `PYTHONPATH`. Before the first round
the pages of all stores are dropped from the page cache and read back: a freshly written store was streamed 8 % faster
than the same store read back. In a round each setting is measured once a side, each in a process of its own, and the
side that goes first alternates. Records are JSON lines in OUT; rounds that exist are not measured again.

Prints the table as Markdown, and ends with 1 if anything fails. Latency and memory alone are measured by
`offramp sweep recipes/main_job.py`, rivals by `python bench/rivals_page.py`.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commits import Side, sides_of
from folders import Folders, evict, read_back
from processes import failure, json_result, offramp, run
from records import add_record, read_records
from shapes import build

from offramp.measure import median
from offramp.measure.hardware import environment
from offramp.measure.statistics import Comparison, median_interval
from offramp.reporting.tables import Column, markdown, table_of

ONE_RUN = Path(__file__).with_name("one_run.py")
ROUNDS = 40
LATENCY_LIMIT, LATENCY_BOUND, NARROW = 1.02, 1.05, 0.03
"""Largest ratio of latencies (estimate, upper 95 % bound), and the width of an interval that settles an estimate."""
MIN_ROUNDS = 10
"""Rounds below which nothing but a failed process is judged: an interval over so few says little."""
PEAK_LIMIT_BYTES, START_LIMIT_SECONDS = 1 << 20, 0.030
MODELS = {"store": "bert-base", "store-exits": "bert-base-exits"}
HOLDS, FAILS, OPEN, FEW = "holds", "FAILS", "inconclusive", "too few rounds"
Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One way to run the main job; `exit` is a rule under which rows leave early."""

    name: str
    budget: str
    batch: int = 1
    exit: str = "none"
    store: str = "store"
    passes: int = 8

    def words(self) -> list[str]:
        """Return the options of one_run.py."""
        words = ("--budget", self.budget, "--batch", self.batch, "--exit", self.exit, "--passes", self.passes)
        return [str(word) for word in words]


SETTINGS = (
    Setting("resident", "1GiB"),
    Setting("192MiB", "192MiB"),
    Setting("128MiB", "128MiB"),
    Setting("96MiB", "96MiB"),
    Setting("batch-8", "192MiB", batch=8, passes=4),
    Setting("exits", "128MiB", exit="patience:4|stage:8", store="store-exits"),
)


def measured(side: Side, setting: Setting) -> Result:
    """Run one process. Returns what it printed, or `{"failed": reason}`."""
    command = [sys.executable, str(ONE_RUN), str(side.place / setting.store), *setting.words()]
    result = json_result([*command, "--began", repr(time.monotonic())], side.environment)
    if "code" in result and Path(result.pop("code")) != side.source:
        raise SystemExit(f"{side.name} did not run the code of {side.source}")
    return result


def prepare(sides: dict[str, Side], folders: Folders) -> None:
    """Build models and stores of both sides, and read the stores back into the page cache."""
    for stale in set((folders.out / "against").glob("new-*")) - {sides["new"].place}:
        if stale.is_dir():
            shutil.rmtree(stale)  # a store of earlier code takes 0.9 GB
    build(folders.models, *MODELS.values())
    for side in sides.values():
        for name, model in MODELS.items():
            if not (side.place / name).exists():
                done = run(offramp("divide", folders.models / model, side.place / name), side.environment)
                if reason := failure(done):
                    raise SystemExit(f"divide {model} ({side.name}): {reason}\n{done.errors}")
    stores = [side.place / name for side in sides.values() for name in MODELS]
    evict(*stores)
    read_back(*stores)
    for side in sides.values():
        for name in MODELS:
            measured(side, Setting("verify", "1GiB", store=name, passes=1))


def measure(sides: dict[str, Side], settings: Sequence[Setting], rounds: int, path: Path) -> None:
    """Add what is missing to the records: every setting on both sides, round by round."""
    known = {(each["setting"], each["side"], each["round"]) for each in read_records(path)}
    missing = [
        (number, setting, side)
        for number in range(rounds)
        for setting in settings
        for side in (("old", "new") if number % 2 == 0 else ("new", "old"))
        if (setting.name, side, number) not in known
    ]
    if missing:
        prepare(sides, Folders(sides["new"].out))
    for number, setting, side in missing:
        about = {"setting": setting.name, "side": side, "round": number, "load": os.getloadavg()[0]}
        result = measured(sides[side], setting)
        add_record(path, {**about, "result": result})
        shown = result.get("failed") or f"{1e3 * median(result['latency_seconds']):.1f} ms"
        print(f"round {number + 1}/{rounds} {setting.name} {side}: {shown}", file=sys.stderr, flush=True)


def latency_verdict(ratio: Comparison, num_rounds: int) -> str:
    """Return the verdict on a ratio of latencies, new / old."""
    if num_rounds < MIN_ROUNDS or ratio.low is None or ratio.high is None:
        return FEW
    if ratio.value <= LATENCY_LIMIT and ratio.high <= LATENCY_BOUND:
        return HOLDS
    is_settled = ratio.high - ratio.low <= NARROW
    return FAILS if ratio.low > LATENCY_LIMIT or (ratio.value > LATENCY_LIMIT and is_settled) else OPEN


def limit_verdict(difference: Comparison, num_rounds: int, limit: float) -> str:
    """Return the verdict on a difference that has an upper limit."""
    if num_rounds < MIN_ROUNDS or difference.low is None:
        return FEW
    return HOLDS if difference.value <= limit else FAILS if difference.low > limit else OPEN


def shown(found: Comparison, digits: int, scale: float = 1.0) -> str:
    """Return a value with its interval, if it has one."""
    value, *ends = (None if each is None else f"{scale * each:.{digits}f}" for each in found[:3])
    return f"{value} [{ends[0]}, {ends[1]}]" if ends[0] is not None else f"{value}"


def row_of(records: Sequence[Result], setting: Setting) -> list[str | None]:
    """Return one line of the table, or why there is none."""
    mine = [each for each in records if each["setting"] == setting.name]
    failed = [each["result"]["failed"] for each in mine if "failed" in each["result"]]
    good = {(each["side"], each["round"]): each["result"] for each in mine if "failed" not in each["result"]}
    rounds = sorted({number for side, number in good if side == "new" and ("old", number) in good})
    pairs = [(good["old", number], good["new", number]) for number in rounds]
    if not pairs:
        reason = failed[-1] if failed else "not measured"
        return [setting.name, "0", reason, *[None] * (len(HEAD) - 3)]
    latency = [[median(result["latency_seconds"]) for result in pair] for pair in pairs]
    ratio = median_interval([new / old for old, new in latency])
    peak = median_interval([new["peak_bytes"] - old["peak_bytes"] for old, new in pairs])
    starts = [
        median_interval([new[key] - old[key] for old, new in pairs]) for key in ("ready_seconds", "first_seconds")
    ]
    count = len(pairs)
    return [
        setting.name, f"{count}" + (f" ({len(failed)} failed)" if failed else ""),
        " / ".join(f"{1e3 * median(side):.1f}" for side in zip(*latency, strict=True)),
        f"{shown(ratio, 3)}: {latency_verdict(ratio, count)}",
        f"{shown(peak, 2, 2**-20)}: {limit_verdict(peak, count, PEAK_LIMIT_BYTES)}",
        *(f"{shown(each, 1, 1e3)}: {limit_verdict(each, count, START_LIMIT_SECONDS)}" for each in starts),
        "equal" if all(old["answers"] == new["answers"] for old, new in pairs) else "DIFFER",
    ]  # fmt: skip


HEAD = (
    "setting", "rounds", "latency old / new (ms)", "latency new / old", "peak difference (MiB)",
    "start to ready, difference (ms)", "start to first answer, difference (ms)", "answers",
)  # fmt: skip


def page(records: Sequence[Result], sides: dict[str, Side], settings: Sequence[Setting], command: str) -> str:
    """Return the page: how it was measured, and the table."""
    facts = environment(sides["new"].out)
    versions = {"python": facts["python_version"], **facts["library_versions"]}
    loads = [record["load"] for record in records]
    options = "; ".join(", ".join(f"{k} {v}" for k, v in asdict(each).items()) for each in settings)
    notes = (
        f"old: commit {sides['old'].version}; new: commit {sides['new'].version} (a second part is the digest of"
        f" changes that are not committed). {facts['cpu_model']}, {facts['num_cores']} cores,"
        f" {facts['storage']['file_system']}; {', '.join(f'{name} {version}' for name, version in versions.items())}."
        f" Settings: {options}. Load average when a process began: median {median(loads):.1f}, largest"
        f" {max(loads):.1f}.",
        "A classifier of BERT-base's shape with random weights, 128 tokens, 2 threads, warm page cache. Each round is"
        " one process a side, and latency is the median of its passes. Estimates are medians of ratios or differences"
        " within rounds (new against old) with 95 % intervals over rounds. Latency holds if the estimate is at most"
        f" {LATENCY_LIMIT} and its upper bound at most {LATENCY_BOUND}; peak if its difference is at most"
        f" {PEAK_LIMIT_BYTES >> 20} MiB; start if its difference is at most {1e3 * START_LIMIT_SECONDS:.0f} ms.",
    )
    columns = [Column(name, is_text=True) for name in HEAD]
    rows = [row_of(records, setting) for setting in settings]
    return f"`{command}`\n\n" + markdown(table_of("against", "New against old", columns, rows, notes))


def main() -> int:
    """Measure what is missing, print the page, and return 1 if anything fails, else 0."""
    names = [each.name for each in SETTINGS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="models, stores and records; 4 GB")
    parser.add_argument("--against", metavar="COMMIT", required=True)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="processes of each side (default: %(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=names, help=f"of {','.join(names)}")
    args = parser.parse_args()
    if unknown := set(args.only) - set(names):
        parser.error(f"not one of {','.join(names)}: {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running ends
    settings, sides = [each for each in SETTINGS if each.name in args.only], sides_of(args.against, args.out.resolve())
    path = sides["new"].out / "against" / f"{sides['old'].version}-{sides['new'].version}.jsonl"
    measure(sides, settings, args.rounds, path)
    selection = f" --only {','.join(args.only)}" if len(settings) < len(SETTINGS) else ""
    command = f"python bench/main_job.py --out {args.out} --against {args.against} --rounds {args.rounds}{selection}"
    records = [record for record in read_records(path) if record["setting"] in args.only]
    text = page(records, sides, settings, command)
    print(text)
    return int(FAILS in text or "DIFFER" in text or any("failed" in each["result"] for each in records))


if __name__ == "__main__":
    sys.exit(main())
