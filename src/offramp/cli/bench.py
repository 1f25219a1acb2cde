"""Measure latency, peak memory and bytes read of a store for one or several budgets, each in processes of its own,
interleaved.

Without --input, the inputs are random (128 tokens, or random pixels) and there are no exits, because policies leave at
other exits on random inputs than on real ones.

With --task, or --dev and --label-column, measure the cost and gain of an exit policy on a split at batch 1, 8 and bulk,
compared with the plain model (no exit heads) and the model truncated after each layer, under one budget:

offramp bench STORE --task sst2 --data glue --exit confidence:0.9
offramp bench STORE --dev dev.tsv --text-column body --label-column kind --exit policy.json --budget 128MiB
"""

from __future__ import annotations

import argparse

from offramp.cli.options import (
    add_columns,
    add_data,
    add_engine,
    add_inputs,
    argument,
    count,
    emit,
    engine_config,
    input_source,
    log,
    table,
)
from offramp.errors import UsageError
from offramp.units import parse_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of bench."""
    parser.add_argument("store")
    parser.add_argument(
        "--budget", type=argument(_sizes), dest="budgets", default=[], metavar="SIZE[,SIZE...]",
        help="memory budgets of the whole process, such as 128MiB,192MiB",
    )  # fmt: skip
    parser.add_argument(
        "--repeat", type=count, default=5, metavar="N", help="rounds, each with a new process per budget (default: 5)"
    )
    parser.add_argument(
        "--passes", type=count, default=10, metavar="N", help="batches of random inputs per process (default: 10)"
    )
    add_engine(parser, omit=("budget",))
    add_inputs(parser)
    add_data(parser)
    add_columns(parser)
    parser.add_argument("--split", default="dev", metavar="NAME", help="train, tune, certify or dev (default: dev)")
    parser.add_argument(
        "--rows", type=count, default=200, metavar="N", help="number of rows of the split, evenly spaced (default: 200)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON line per budget, or per rival and the record last"
    )


def main(args: argparse.Namespace) -> int:
    """Measure budgets, or a task."""
    if args.task or args.data or args.train or args.dev:
        return _bench_task(args)
    inputs = input_source(args)
    if args.exit != "none" and not inputs:
        what = "policies leave at other exits on random inputs than on real ones"
        raise UsageError(what, None, "give --input, or --exit none")
    if inputs.is_stream:
        raise UsageError("each process reads the inputs again", None, "give --input a file")
    if not args.budgets:
        raise UsageError("no budget", None, "give --budget 128MiB, or several: 128MiB,192MiB")
    return _bench_budgets(args)


def _bench_budgets(args: argparse.Namespace) -> int:
    from offramp.experiments.bench import bench
    from offramp.experiments.jobs import WorkerJob
    from offramp.units import format_size

    inputs = input_source(args)
    job = WorkerJob("inputs" if inputs else "passes", args.store, engine_config(args), inputs, args.passes)
    records = bench(job, args.budgets, args.repeat, log)
    if args.json:
        for record in records:
            emit(record)
        return 0
    rows = [
        (
            format_size(record["budget_bytes"]),
            format_size(record["predicted_peak_bytes"]),
            format_size(record["peak_rss_bytes"]),
            f"{record['latency_seconds_median'] * 1e3:.1f} ms",
            f"{record['latency_seconds_p95'] * 1e3:.1f} ms",
            f"{record['bound_seconds'] * 1e3:.1f} ms",
            f"{100 * record['bound_seconds'] / record['latency_seconds_median']:.0f} %",
            format_size(record["bytes_read_per_input"]),
        )
        for record in records
    ]
    head = (
        "budget", "predicted peak", "measured peak", "median latency", "p95 latency", "latency bound", "bound / median",
        "bytes read per input",
    )  # fmt: skip
    print(table(head, rows))
    return 0


def _bench_task(args: argparse.Namespace) -> int:
    from offramp.cli.bench_task import measure

    if args.text or args.pair or args.input:
        raise UsageError("labelled data and something else to measure", None, "give --task or --dev alone")
    if args.batch != 1 or args.profile:
        raise UsageError("--batch and --profile are for one batch size", None, "a task is measured at 1, 8 and bulk")
    if len(args.budgets) > 1:
        raise UsageError("several budgets", None, "a task is measured under one")
    return measure(args, engine_config(args, budget=args.budgets[0] if args.budgets else None))


def _sizes(text: str) -> list[int]:
    return [parse_size(part) for part in text.split(",")]
