"""Measure latency, peak memory and bytes read of a store for one or several budgets, each in processes of its own,
interleaved.

Without --input, random ids of 128 tokens, or random pixels, and no exits: exits leave elsewhere on random input than
on real text.

With --task, or --dev and --label-column, what an exit policy costs and gains on a split, at batch 1, 8 and bulk, beside
the plain model (no head of an exit run) and the model cut after each layer, under one budget:

offramp bench STORE --task sst2 --data glue --exit confidence:0.9
offramp bench STORE --dev dev.tsv --text-column body --label-column kind --exit policy.json --budget 128MiB
"""

from __future__ import annotations

import argparse

from offramp.cli.options import (
    ENGINE,
    add_columns,
    add_data,
    add_engine,
    add_inputs,
    count,
    emit,
    engine_options,
    has_inputs,
    inputs,
    say,
    size,
    table,
)
from offramp.errors import UsageError

PER_PROCESS = ("backend", "threads", "max_length", "reads", "verify")
"""Options of the engine that all rivals on a task have in common."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of bench."""
    parser.add_argument("store")
    parser.add_argument("--budget", metavar="SIZE[,SIZE...]", help="budgets of the whole process, like 128MiB,192MiB")
    parser.add_argument(
        "--save-profile",
        metavar="FILE",
        help="measure what leaving at each exit takes here, for --profile of tune and run",
    )
    parser.add_argument("--remembered", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--repeat",
        type=count,
        default=5,
        metavar="N",
        help="rounds; each budget gets a new process in each (default: 5)",
    )
    parser.add_argument(
        "--passes", type=count, default=10, metavar="N", help="batches of random ids a process (default: 10)"
    )
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    add_engine(parser)
    add_inputs(parser)
    add_data(parser)
    add_columns(parser)
    parser.add_argument("--split", default="dev", metavar="NAME", help="train, tune, certify or dev (default: dev)")
    parser.add_argument(
        "--rows", type=count, default=200, metavar="N", help="of the split, evenly spaced (default: 200)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line a budget, or a rival and the record last")


def main(args: argparse.Namespace) -> int:
    """Measure."""
    has_data = bool(args.task or args.data or args.train or args.dev)
    if has_data and (args.save_profile or args.text or args.pair or args.input):
        raise UsageError("labelled data and something else to measure", None, "give --task or --dev alone")
    if args.save_profile:
        return _profile(args)
    if has_data:
        return _task(args)
    if args.exit != "none" and not has_inputs(args):
        raise UsageError("exits leave elsewhere on random ids than on text", None, "give --input, or --exit none")
    if args.input == "-":
        raise UsageError("each process reads the inputs anew", None, "give --input a file")
    return _once(args) if args.once else _all(args)


def _once(args: argparse.Namespace) -> int:
    import offramp
    from offramp.experiments.bench import measure_texts, measure_tokens, random_length

    budget = None if args.budget is None else _size(args.budget)
    if has_inputs(args):
        with offramp.load(args.store, budget, texts=inputs(args), **engine_options(args)) as classifier:
            record = measure_texts(classifier, list(inputs(args)))
    else:
        length = random_length(args.store, args.max_length)
        with offramp.load(args.store, budget, longest=length, **engine_options(args)) as classifier:
            record = measure_tokens(classifier, classifier.settings.num_rows, length, args.passes)
    emit(record)
    return 0


def _profile(args: argparse.Namespace) -> int:
    from dataclasses import asdict, replace
    from pathlib import Path

    import offramp
    from offramp.experiments.bench import random_length
    from offramp.profiling.profiler import Scheduled, measure_profile
    from offramp.runtime.profile import cached_profile, fingerprint_of, save_profile

    if args.batch == "bulk":
        raise UsageError("a profile is of a fixed number of rows", None, "give --batch 8, or another number")
    longest = random_length(args.store, args.max_length)
    budget = None if args.budget is None else _size(args.budget)
    options = {**engine_options(args), "exit": Scheduled(), "deadline": None, "profile": None}
    classifier = offramp.prepare(args.store, budget, longest=longest, **options)
    profile = cached_profile(fingerprint_of(classifier), longest) if args.remembered else None
    if profile is None:
        with classifier:
            profile = measure_profile(classifier, longest, say)
        save_profile(profile)
    profile = replace(profile, budget_bytes=budget)
    save_profile(profile, Path(args.save_profile))
    if args.json:
        emit(asdict(profile))
        return 0
    head = ("tokens", *(f"exit {number}" for number in range(1, profile.num_exits + 1)))
    rows = [
        (length, *(f"{seconds / profile.batch * 1e3:.2f} ms" for seconds in row))
        for length, row in zip(profile.lengths, profile.seconds, strict=True)
    ]
    print(table(head, rows))
    if profile.batch > 1:
        print(f"an input's share of passes of {profile.batch} rows")
    return 0


def _all(args: argparse.Namespace) -> int:
    from offramp.experiments.bench import bench
    from offramp.units import format_size

    if args.budget is None:
        raise UsageError("no budget", None, "give --budget 128MiB, or several: 128MiB,192MiB")
    budgets = [str(_size(text)) for text in args.budget.split(",")]
    records = bench(args.store, budgets, _forwarded(args), args.repeat, say)
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
    print(table(("budget", "predicted", "peak", "median", "p95", "bound", "of bound", "read an input"), rows))
    return 0


def _task(args: argparse.Namespace) -> int:
    from offramp.cli.bench_task import measure

    if args.batch != 1 or args.profile:
        raise UsageError("--batch and --profile are of one batch size", None, "a task is measured at 1, 8 and bulk")
    if "," in (args.budget or ""):
        raise UsageError("several budgets", None, "a task is measured under one")
    budget = [] if args.budget is None else ["--budget", str(_size(args.budget))]
    return measure(args, [*budget, *_words(args, PER_PROCESS)])


def _size(text: str) -> int:
    try:
        return size(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error)) from None


def _forwarded(args: argparse.Namespace) -> list[str]:
    """The options of this call as the processes take them."""
    words = ["--passes", str(args.passes), *_words(args, (*ENGINE, "input", "text_column", "pair_column"))]
    for text in args.text or ():
        words += ["--text", text]
    for pair in args.pair or ():
        words += ["--pair", *pair]
    return words


def _words(args: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Those of these options that have a value, as words."""
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
