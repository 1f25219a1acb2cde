"""Train exits on BBC News, divide the model, run it under a budget, and draw its memory. Needs no connection."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.cli.options import emit, log, size, table

if TYPE_CHECKING:
    from offramp.experiments.demo import Report, Row


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of demo."""
    parser.add_argument("--out", default="demo-out", metavar="DIR", help="folder for all results (default: demo-out)")
    parser.add_argument(
        "--budget",
        type=size,
        metavar="SIZE",
        help="memory budget of the streamed runs (default: slightly above the smallest)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON line")


def main(args: argparse.Namespace) -> int:
    """Run the demo."""
    from dataclasses import asdict

    from offramp.experiments.demo import demo

    report = demo(Path(args.out), args.budget, log)
    if args.json:
        emit(asdict(report))
    else:
        _print(report, args.out)
    return 0


def _print(report: Report, out: str) -> None:
    head = (
        "run", "accuracy [95 %]", "mean exit", "bytes read per text", "median latency", "predicted peak",
        "measured peak", "budget",
    )  # fmt: skip
    print(f"\n{report.num_texts} test articles of BBC News, five sections, MiniLM-L6; exits: {report.policy}\n")
    print(table(head, [_cells(row) for row in report.rows]))
    print(
        "\naccuracy of exits 1 to 6 on the tune split: "
        + " ".join(f"{accuracy:.3f}" for accuracy in report.exit_accuracies)
    )
    print(f"picture: {report.picture}, figures: {Path(out) / 'demo.json'}, store: {Path(out) / 'store'}")


def _cells(row: Row) -> tuple[str, ...]:
    from offramp.units import format_size

    def optional(num_bytes: float | None) -> str:
        return "-" if num_bytes is None else format_size(num_bytes)

    return (
        row.name,
        f"{row.accuracy:.3f} [{row.accuracy_low:.3f} {row.accuracy_high:.3f}]",
        "-" if row.mean_exit is None else f"{row.mean_exit:.2f}",
        optional(row.bytes_read_per_input),
        f"{row.latency_seconds_median * 1e3:.1f} ms",
        optional(row.predicted_peak_bytes),
        format_size(row.peak_rss_bytes),
        optional(row.budget_bytes),
    )
