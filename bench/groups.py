"""Runs in containers: `python bench/groups.py --out OUT --records FILE [--runs N]` (root, memory cgroups of version 1).

Each run is `offramp run --budget auto` in a memory group that is cold: the pages of the store, of the interpreter and
of the project are dropped first, so that the group is charged for all that the run reads. (Pages that other processes
map stay: use an interpreter of its own.) The limits of a setting are the least one that a refusal names, and 8 and 32
MiB more. Major faults tell whether a run thrashed. `--free` runs the same budget without a group as well, read alike
(on a machine that does nothing else). One line of the records a run; what is there is not run again.

`--margins STORE` runs one setting in groups of one size with plans that leave 0 to 4 MiB of them to the kernel.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from budget_matrix import MIB, STORES, found_in
from folders import evict, words
from jail import jail
from jail import missing as missing_groups
from processes import Finished, offramp, run
from records import add_record, read_records

import offramp as project
from offramp.runtime.ledger import group_bytes

BACKENDS = {"names": ("ort", "numpy"), "export": ("ort",)}
LOADS = ((1, 16), (1, 128), (8, 128), ("bulk", 128))
"""Batch, and tokens of the longest text."""
STEPS = (0, 8, 32)
"""MiB by which a group is larger than the least that works."""
MARGINS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
THRASHING = 1000
"""Major faults of a run that thrashes. Measured: 80 to 250 of a cold start, 4,000 and more where code is evicted again
and again."""
MOST_SECONDS, NUM_TEXTS = 120.0, 16
"""Two batches of 8: the second one is gathered while the first has left its buffers."""
_WITH_MARGIN = """import sys
from offramp.runtime import ledger
ledger.GROUP_BYTES, ledger.GROUP_SHARE = int(sys.argv.pop(1)), 1 << 60
from offramp.cli import main
sys.exit(main())"""
SETTINGS = [
    {"store": store, "backend": backend, "batch": batch, "tokens": tokens}
    for store, (_, _, method) in STORES.items()
    for backend, (batch, tokens) in itertools.product(BACKENDS[method], LOADS)
]


class Groups:
    """Runs of the settings, recorded one by one."""

    def __init__(self, out: Path, records: Path, has_free: bool) -> None:
        self._out, self._records, self._has_free = out, records, has_free

    def run_setting(self, setting: dict[str, Any], repeat: int) -> None:
        """Run a setting in the groups of all steps."""
        least = self._least_budget(setting)
        if least is None:
            return
        for step in STEPS:
            limit = -(-group_bytes(least + (step * MIB)) // MIB) * MIB
            self._run({**setting, "repeat": repeat, "step": step}, limit)

    def run_margins(self, setting: dict[str, Any]) -> None:
        """Run the least plan of a setting in groups that are larger by what is left to the kernel."""
        least = self._least_budget(setting)
        assert least is not None, "1 MiB is too small"
        for margin in MARGINS:
            self._run({**setting, "margin_mib": margin}, least + int(margin * MIB))

    def _least_budget(self, setting: dict[str, Any]) -> int | None:
        named = found_in(run(self._command(setting, "--budget", "1MiB"), {"OMP_NUM_THREADS": "1"}))["named_mib"]
        return None if named is None else named * MIB

    def _run(self, key: dict[str, Any], limit: int) -> None:
        if any(key.items() <= record.items() for record in read_records(self._records)):
            return
        evict(self._out / key["store"], Path(sys.prefix), Path(project.__file__).parents[1])
        command = self._command(key, "--budget", "auto")
        if "margin_mib" in key:
            own = [sys.executable, "-c", _WITH_MARGIN, str(int(key["margin_mib"] * MIB))]
            command = own + command[command.index("run") :]
        with jail(memory_bytes=limit) as group:
            done = self._timed(group.around(command))
            usage = group.usage()
        inside = record_of(done)
        free = {}
        if inside and self._has_free:
            same = self._command(key, "--budget", f"{inside['budget_bytes']}B", "--reads", inside["reads"])
            free = record_of(self._timed(same))
        record = {
            **key, "limit_bytes": limit, **usage, "code": done.returncode, "seconds": done.seconds,
            "major_faults": done.major_faults,
            "error": (done.errors.strip().splitlines() or [""])[-1] if done.returncode else None,
            **{name: inside.get(name) for name in ("predicted_peak_bytes", "peak_rss_bytes", "reads", "num_slots")},
            "seconds_inside": inside.get("latency_seconds_median"), "seconds_free": free.get("latency_seconds_median"),
        }  # fmt: skip
        add_record(self._records, record)
        print(json.dumps(record), file=sys.stderr, flush=True)

    def _timed(self, command: list[str]) -> Finished:
        return run(command, {"OMP_NUM_THREADS": "1"}, MOST_SECONDS)

    def _command(self, key: dict[str, Any], *more: str) -> list[str]:
        texts = self._out / f"texts-{key['tokens']}.txt"
        if not texts.exists():
            texts.write_text("".join(f"{words(key['tokens'] - 2 - index % 3, index)}\n" for index in range(NUM_TEXTS)))
        options = ("--backend", key["backend"], "--batch", key["batch"], "--json", "--input", texts)
        return offramp("run", self._out / key["store"], *options, *more)


def record_of(done: Finished) -> dict[str, Any]:
    """Return the record that a run has printed, or nothing."""
    return json.loads(done.lines[-1][1])["record"] if done.returncode == 0 else {}


def show(records: list[dict[str, Any]]) -> None:
    """Print the figures."""
    runs = [record for record in records if "step" in record]
    ended = [record for record in runs if record["code"] == 0]
    print(f"{len(ended)} of {len(runs)} runs finish")
    print(f"{sum(each['charged_peak_bytes'] > each['limit_bytes'] for each in runs)} above the limit of their group")
    faults = [each["major_faults"] for each in runs]
    print(f"{sum(number > THRASHING for number in faults)} thrash: at most {max(faults, default=0)} major faults a run")
    margins = sorted((each["predicted_peak_bytes"] - each["peak_rss_bytes"]) / MIB for each in ended)
    if margins:
        print(f"prediction - peak: {margins[0]:.1f} to {margins[-1]:.1f} MiB; within 0 to 4 MiB:", end=" ")
        print(f"{sum(0 <= margin <= 4 for margin in margins)} of {len(margins)}")
    ratios = sorted(each["seconds_inside"] / each["seconds_free"] for each in ended if each["seconds_free"])
    if ratios:
        print(f"latency inside / free: median {ratios[len(ratios) // 2]:.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")
    for each in (record for record in records if "margin_mib" in record):
        beside = f"{(each['limit_bytes'] - (each['predicted_peak_bytes'] or 0)) / MIB:.1f} beside the prediction"
        faults = f"{each['major_faults']} major faults, {each['failcnt']} limit hits"
        print(f"margin {each['margin_mib']} MiB, {beside}: code {each['code']}, {each['seconds']:.1f} s, {faults}")


def main() -> None:
    """Run what is not recorded yet, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=200, help="runs, three for each setting in turn")
    parser.add_argument("--margins", metavar="STORE", help="a store in OUT: how much must be left to the kernel")
    parser.add_argument("--free", action="store_true", help="also run the same budgets without a group")
    args = parser.parse_args()
    reason = missing_groups(args.out)
    if reason is not None:
        sys.exit(f"groups.py: {reason}")
    groups = Groups(args.out, args.records, args.free)
    if args.margins:
        groups.run_margins({"store": args.margins, "backend": "ort", "batch": 1, "tokens": 128})
    else:
        for number in range(-(-args.runs // len(STEPS))):
            groups.run_setting(SETTINGS[number % len(SETTINGS)], number // len(SETTINGS))
    show(read_records(args.records))


if __name__ == "__main__":
    main()
