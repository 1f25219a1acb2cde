"""Draw the memory of a run over time, with a band for each stage and the budget as a line. Without inputs, random
token ids, or random pixels, are classified.
"""

from __future__ import annotations

import argparse

from offramp.cli.options import (
    add_budget,
    add_columns,
    add_engine,
    add_inputs,
    count,
    emit,
    engine_options,
    has_inputs,
    inputs,
    known_inputs,
    peak_line,
    require_writable,
    say,
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of profile."""
    parser.add_argument("store")
    add_budget(parser)
    parser.add_argument(
        "--out", default="memory.svg", metavar="FILE", help="picture to write, .svg or .png (default: memory.svg)"
    )
    parser.add_argument("--passes", type=count, default=2, metavar="N", help="batches to draw (default: 2)")
    parser.add_argument("--trace", metavar="FILE", help="also write the timed events as JSON lines")
    add_engine(parser)
    add_inputs(parser)
    add_columns(parser)
    parser.add_argument("--json", action="store_true", help="print the record as one JSON line")


def main(args: argparse.Namespace) -> int:
    """Run, then draw."""
    from itertools import islice

    import offramp
    from offramp.experiments.bench import random_length, random_sweep
    from offramp.measure import MemorySampler, read_memory

    require_writable(args.out, (".svg", ".png"))
    if args.trace:
        require_writable(args.trace)
    length = None if has_inputs(args) else random_length(args.store, args.max_length)
    with MemorySampler() as sampler:
        texts = known_inputs(args) if has_inputs(args) else None
        with offramp.load(args.store, args.budget, longest=length, texts=texts, **engine_options(args)) as classifier:
            if length is None:
                num_texts = args.passes * classifier.settings.num_rows * classifier.settings.num_batches
                classifier.predict(list(islice(inputs(args), num_texts)), more=False)
            else:
                num_rows = classifier.settings.num_rows
                for index in range(args.passes):
                    sweep = random_sweep(classifier, num_rows, length, index)
                    classifier.predict_batches(sweep, more=index + 1 < args.passes)
            record = {**classifier.record(), "peak_rss_bytes": read_memory().peak_bytes}
    if args.trace:
        classifier.trace.to_jsonl(args.trace)
    from offramp.reporting.memory import draw_memory  # matplotlib, after the measurement

    title = f"{record['model']}, {record['backend']}, exit {record['exit']}"
    draw_memory(args.out, sampler.samples, classifier.trace.spans(), args.budget, title)
    if args.json:
        emit({**record, "picture": args.out})
    say(f"{peak_line(record)}\npicture: {args.out}")
    return 0
