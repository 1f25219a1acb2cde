"""Draw the memory of a run over time, with a band for each stage and the budget as a line. Without inputs, random
token ids or random pixels are classified.
"""

import argparse

from offramp.cli import options
from offramp.cli.options import count, emit, log, require_writable, warn


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of memory."""
    add = parser.add_argument
    add("store")
    add("--out", default="memory.svg", metavar="FILE", help="picture to write, .svg or .png (default: memory.svg)")
    add("--passes", type=count, default=2, metavar="N", help="number of batches to draw (default: 2)")
    add("--trace", metavar="FILE", help="also write the timed events as JSON lines")
    options.add_engine(parser)
    options.add_inputs(parser)
    options.add_columns(parser)
    add("--json", action="store_true", help="print the record as one JSON line")


def main(args: argparse.Namespace) -> None:
    """Run the batches, then draw the picture."""
    from itertools import islice

    from offramp.measure import MemorySampler, read_memory
    from offramp.profiling.random_inputs import random_length, random_sweep
    from offramp.session import prepare_engine

    require_writable(args.out, (".svg", ".png"))
    if args.trace:
        require_writable(args.trace)
    inputs = options.input_source(args)
    length = None if inputs else random_length(args.store, args.max_length)
    config = options.engine_config(args, longest=length)
    sampler = MemorySampler()
    known = inputs.known(log)
    with sampler, prepare_engine(args.store, config, texts=known, warn=warn) as classifier:
        num_rows = classifier.settings.num_rows
        if length is None:
            num_inputs = args.passes * num_rows * classifier.settings.num_batches
            source = inputs if known else inputs.read(log)
            classifier.predict(list(islice(source, num_inputs)), more=False)
        else:
            for index in range(args.passes):
                sweep = random_sweep(classifier, num_rows, length, index)
                classifier.predict_batches(sweep, more=index + 1 < args.passes)
        record = {**classifier.record(), "peak_rss_bytes": read_memory().peak_bytes}
    if args.trace:
        classifier.trace.to_jsonl(args.trace)
    from offramp.reporting.memory import draw_memory  # imports matplotlib, so only after the measurement

    title = f"{record['model']}, {record['backend']}, exit {record['exit']}"
    draw_memory(args.out, sampler.samples, classifier.trace.spans(), args.budget, title)
    if args.json:
        emit({**record, "picture": args.out})
    log(f"{options.peak_line(record)}\npicture: {args.out}")
