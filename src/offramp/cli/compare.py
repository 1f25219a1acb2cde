"""Compare a figure of two results folders: paired by experiment and round, with intervals and verdicts.

offramp compare results/a results/b --figure latency

The ratio is that of the second folder to the first, the median over rounds; for the score it is the difference in
points. Verdicts, those on the target of --at-most too, hold for the whole table: p-values are corrected for the number
of rows (Holm). With fewer than 5 rounds there are no intervals, and every verdict is inconclusive; scores are paired
over rows, not over rounds, and have no interval where the rows are not the same.
"""

import argparse
from dataclasses import asdict
from math import isfinite
from pathlib import Path

from offramp.cli.options import emit, log, table_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of compare."""
    add = parser.add_argument
    add("first", help="a results folder of offramp sweep")
    add("second", help="the results folder that is compared with it")
    figures = "latency, time_per_input, memory, bytes, mean_exit or score (default: latency)"
    add("--figure", default="latency", metavar="NAME", help=figures)
    add(
        "--at-most",
        type=float,
        metavar="X",
        help="also say whether the ratio (of scores: the loss in points) is at most X",
    )
    add("--json", action="store_true", help="print one JSON line per experiment")


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    from offramp.experiments.comparison import Row, compare
    from offramp.experiments.results import completed, read_results
    from offramp.experiments.specification import spelt
    from offramp.reporting.tables import printable

    folders = (args.first, args.second)
    first, second = ([completed(each, folder) for each in read_results(Path(folder), log)] for folder in folders)
    found = compare(first, second, args.figure, args.at_most)
    for line in (*found.left_out, *found.notices):
        log(printable(line))
    if args.json:
        for row in found.rows:
            result = row.compared._asdict()  # a ratio to nothing is infinite, which JSON cannot say
            result["value"] = result["value"] if isfinite(result["value"]) else None
            tree = {**asdict(row), "compared": result}
            emit({"figure": args.figure, "changed": found.changed, **tree})
        return
    for name, (before, after) in found.changed.items():
        print(printable(f"{name}: {spelt(name, before)} in {args.first}, {spelt(name, after)} in {args.second}"))
    form = "+.2f" if args.figure == "score" else ".3f"

    def interval(row: Row) -> str:
        value, low, high = row.compared[:3]
        return f"{value:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")

    def detectable(row: Row) -> str:
        effect = row.compared.detectable
        return "-" if effect is None else f"{effect:.2f}" if args.figure == "score" else f"{100 * effect:.1f} %"

    show = found.figure.show
    columns = {
        "experiment": lambda row: printable(row.name),
        f"{args.figure}, first folder": lambda row: show(row.first),
        f"{args.figure}, second folder": lambda row: show(row.second),
        "difference [95 %]" if args.figure == "score" else "ratio [95 %]": interval,
        "rounds": lambda row: row.rounds,
        "p (Holm)": lambda row: f"{row.p:.3f}",
        "verdict": lambda row: row.verdict,
        "detectable": detectable,
    }
    columns |= {} if args.at_most is None else {f"at most {args.at_most:g}": lambda row: row.target}
    print(table_of(found.rows, columns))
    print("detectable: the smallest effect that this many rounds find in 80 % of studies")
