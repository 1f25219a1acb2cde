"""Train exits on BBC News, divide the model, run it under a budget, and draw its memory. Needs no connection."""

import argparse
from dataclasses import asdict
from pathlib import Path

from offramp.cli.options import emit, log, size, table_of
from offramp.units import format_duration, format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of demo."""
    add = parser.add_argument
    add("--out", default="demo-out", metavar="DIR", help="folder for all results (default: demo-out)")
    budget = "memory budget of the streamed runs (default: slightly above the smallest)"
    add("--budget", type=size, metavar="SIZE", help=budget)
    add("--json", action="store_true", help="print the report as one JSON line")


def main(args: argparse.Namespace) -> None:
    """Run the demo."""
    from offramp.experiments.demo import demo

    report, out = demo(Path(args.out), args.budget, log), Path(args.out)
    if args.json:
        emit(asdict(report))
        return
    print(f"\n{report.num_texts} test articles of BBC News, five sections, MiniLM-L6; exits: {report.policy}\n")
    print(table_of(report.rows, _COLUMNS))
    accuracies = " ".join(f"{accuracy:.3f}" for accuracy in report.exit_accuracies)
    print(f"\naccuracy of exits 1 to 6 on the tune split: {accuracies}")
    print(f"picture: {report.picture}, figures: {out / 'demo.json'}, store: {out / 'store'}")


def _size_or_dash(num_bytes: float | None) -> str:
    return "-" if num_bytes is None else format_size(num_bytes)


_COLUMNS = {
    "run": lambda row: row.name,
    "accuracy [95 %]": lambda row: f"{row.accuracy:.3f} [{row.accuracy_low:.3f} {row.accuracy_high:.3f}]",
    "mean exit": lambda row: "-" if row.mean_exit is None else f"{row.mean_exit:.2f}",
    "bytes read per text": lambda row: _size_or_dash(row.bytes_read_per_input),
    "median latency": lambda row: format_duration(row.latency_seconds_median),
    "predicted peak": lambda row: _size_or_dash(row.predicted_peak_bytes),
    "measured peak": lambda row: format_size(row.peak_rss_bytes),
    "budget": lambda row: _size_or_dash(row.budget_bytes),
}
