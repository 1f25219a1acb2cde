"""Open, predict and close many times, and report threads, descriptors and resident memory on the way.

    python -m tests.checks.soak                              # 1,000 times each case, each in a process of its own
    python -m tests.checks.soak --times 300 ort-texts stream

Prints one JSON line for each case. Ends with 1 where threads or descriptors grow, or where resident memory grows by
1 MiB or more between a tenth of the times and the last time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MAX_GROWTH_BYTES = 1 << 20
SECONDS = 3600
"""Time after which a case counts as failed."""


def main() -> int:
    """Run the cases named on the command line, or all. Returns the exit code."""
    from tests.opening import CASES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--alone", action="store_true", help="run one case in this process, and print what it held")
    args = parser.parse_args()
    if set(args.cases) - set(CASES):
        parser.error(f"the cases are {', '.join(CASES)}")
    if args.alone:
        return print_case(*args.cases, args.times)
    failed = [name for name in args.cases or CASES if not is_constant(name, args.times)]
    print(f"failed: {', '.join(failed)}" if failed else "threads, descriptors and memory are constant")
    return bool(failed)


def print_case(name: str, times: int) -> int:
    """Run one case in this process, with a cache of its own."""
    from tests.opening import run_case

    at = tuple(sorted({times // 10, times // 4, times // 2, times}))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["OFFRAMP_CACHE"] = folder
        for number, found in run_case(name, Path(folder), times, at):
            print(json.dumps({"times": number, **found._asdict()}), flush=True)
    return 0


def is_constant(name: str, times: int) -> bool:
    """Run one case in another process, print what it held, and return whether it was constant."""
    command = [sys.executable, "-m", "tests.checks.soak", "--alone", name, "--times", str(times)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return False
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    first, last = rows[0], rows[-1]
    growth = last["rss_bytes"] - first["rss_bytes"]
    print(json.dumps({"case": name, "rss_growth_bytes": growth, "held": rows}), flush=True)
    is_same = all(row[key] == first[key] for row in rows for key in ("threads", "descriptors"))
    return is_same and growth < MAX_GROWTH_BYTES


if __name__ == "__main__":
    sys.exit(main())
