"""Kill each verb at each call that changes its files: `python -m tests.checks.kills --records FILE [VERB...]`.

The cases and their judgement are those of tests/cli/kills.py: SIGKILL comes when a call is entered, and the same
command must then end with 0 and leave the files of an undisturbed run. Each kill is one line of the records; what is
there is not done again. Prints a table by verb, and ends with 1 if a kill left something else. Linux with strace.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records import add_record, read_records
from offramp.cli.options import table
from tests.cli.kills import CASES, MEASURED, Place, differences

FAMILIES = {
    "rename": ("rename", "renameat", "renameat2"),
    "unlink": ("unlink", "unlinkat", "rmdir"),
    "mkdir": ("mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat"),
    "truncate": ("truncate", "ftruncate", "fallocate"),
    "write": ("write", "pwrite64", "writev", "pwritev"),
    "fsync": ("fsync", "fdatasync"),
}
"""Column of the table -> calls."""
LAST = 12
"""Number of the last calls of a verb, where files get their names: they are tried in every sample."""


def try_verb(place: Place, verb: str, every: int, records: Path) -> None:
    """Kill a verb at every N-th of its calls and at the last ones, those excepted that are in the records."""
    before = [each for each in read_records(records) if each["verb"] == verb]
    known = {(each["call"], each["when"]) for each in before}
    found = place.undisturbed(CASES[verb])
    if found is None:
        sys.exit("this user may not trace")
    tree, paths, kills = found
    others = [] if before else [place.in_new_process(CASES[verb], hash_seed) for hash_seed in (1, 2)]
    differing = sorted({name for other in others for name in differences(tree, other)})
    differing = before[-1]["differing"] if before else differing
    for index, (call, when) in enumerate(kills):
        is_chosen = index % every == 0 or index >= len(kills) - LAST
        if is_chosen and (call, when) not in known:
            is_killed, problem = place.kill(CASES[verb], call, when, paths, tree)
            record = {"verb": verb, "calls": len(kills), "differing": differing, "call": call, "when": when}
            add_record(records, {**record, "killed": is_killed, "problem": problem})
            if problem:
                print(f"{verb}: {call} {when}: {problem}", file=sys.stderr, flush=True)


def row_of(verb: str, records: Sequence[dict[str, Any]]) -> list[str]:
    """Return the row of a verb in the table."""
    killed = [each for each in records if each["killed"]]
    by_call = (sum(each["call"] in calls for each in killed) for calls in FAMILIES.values())
    bad = sum(each["problem"] is not None for each in records)
    last = records[-1]
    counts = (last["calls"], *by_call, len(killed), len(records) - len(killed), bad, len(last["differing"]))
    return [verb, *map(str, counts)]


def main() -> int:
    """Try what is not in the records yet, and print the table."""
    parser = argparse.ArgumentParser(description="Kill verbs at the calls that change their files.")
    parser.add_argument("verbs", nargs="*", metavar="VERB", help=", ".join(CASES))
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="each N-th call of a verb, and the last ones, alone"
    )
    args = parser.parse_args()
    verbs = args.verbs or list(CASES)
    with tempfile.TemporaryDirectory() as work, Place(Path(work), verbs) as place:
        for verb in verbs:
            try_verb(place, verb, args.every, args.records)
    records = read_records(args.records)
    rows = [row_of(verb, mine) for verb in CASES if (mine := [each for each in records if each["verb"] == verb])]
    head = ("verb", "calls", *FAMILIES, "kills", "not reached", "not completed", "files that differ between two runs")
    print(table(head, rows))
    print("\nmeasured, so not compared: " + "; ".join(f"`{name}` ({what})" for name, what in MEASURED.items()))
    return int(any(each["problem"] for each in records))


if __name__ == "__main__":
    raise SystemExit(main())
