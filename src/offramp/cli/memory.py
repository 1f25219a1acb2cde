"""Draw the memory of a run over time, with a band for each stage and the budget as a line, and print the bytes and
milliseconds of each stage. Without inputs, random token ids or random pixels are classified.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from offramp.cli import options
from offramp.cli.options import TABLES, count, emit, log, require_apart, require_writable, warn
from offramp.errors import MissingExtraError
from offramp.units import format_size

if TYPE_CHECKING:
    from offramp.reporting.layers import StageCost
    from offramp.session.classifier import Classifier


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of memory."""
    add = parser.add_argument
    add("store")
    add("--out", default="memory.svg", metavar="FILE", help="picture to write, .svg or .png (default: memory.svg)")
    add("--format", choices=tuple(TABLES), default="table", help="format of the table of stages (default: table)")
    add("--passes", type=count, default=2, metavar="N", help="number of batches to draw (default: 2)")
    add("--trace", metavar="FILE", help="also write the timed events as JSON lines")
    options.add_engine(parser)
    options.add_inputs(parser)
    options.add_columns(parser)
    add("--json", action="store_true", help="print the record as one JSON line")


def main(args: argparse.Namespace) -> None:
    """Run the batches, then draw the picture and print the table."""
    import time
    from itertools import islice

    from offramp.measure import MemorySampler, read_memory
    from offramp.profiling.random_inputs import random_length, random_sweep
    from offramp.session import prepare_engine

    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "report")
    require_apart({"--out": args.out, "--trace": args.trace}, {"--input": args.input})
    require_writable(args.out, (".svg", ".png"))
    if args.trace:
        require_writable(args.trace)
    inputs = options.input_source(args)
    length = None if inputs else random_length(args.store, args.max_length)
    config = options.engine_config(args, longest=length)
    sampler = MemorySampler()
    known = inputs.known(log)
    with sampler, prepare_engine(args.store, config, texts=known, warn=warn) as classifier:
        num_rows, begin = classifier.settings.num_rows, time.perf_counter()
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

    title, stages = f"{record['model']}, {record['backend']}, exit {record['exit']}", _stages(classifier)
    draw_memory(args.out, sampler.samples, classifier.trace.spans(), config.budget_bytes, title, begin)
    if args.json:
        emit({**record, "picture": args.out, "stages": [asdict(stage) for stage in stages]})
    else:
        _print_stages(stages, args.format)
    log(options.peak_line(record))
    log(f"picture: {args.out}")


def _stages(classifier: Classifier) -> list[StageCost]:
    """Return the bytes and times of each stage that the passes can reach."""
    from offramp.reporting.layers import StageCost, add_passes

    stages = []
    for index, stage in enumerate(classifier.schedule.stages):
        items = [item for item in classifier.items if item.stage == index]
        residents = [item for item in items if item.shard in classifier.plan.residents]
        sizes = (sum(item.num_bytes for item in part) for part in (items, residents))
        stages.append(StageCost(stage.name, *sizes))
    add_passes(stages, classifier.trace.spans())
    return stages


def _print_stages(stages: list[StageCost], name: str) -> None:
    """Print the table of stages: for people with units and sums, for programs (csv) as bytes and milliseconds."""
    from offramp.reporting.layers import total

    if name == "csv":
        rows = [asdict(stage) for stage in stages]
        print(TABLES[name](tuple(rows[0]), [tuple(map(_rounded, row.values())) for row in rows]))
        return
    columns = {title: [cell(stage) for stage in (*stages, total(stages))] for title, cell in _COLUMNS.items()}
    print(TABLES[name](tuple(columns), list(zip(*columns.values()))))


def _rounded(cell: Any) -> Any:
    """Return a time or a mean with three decimals."""
    return round(cell, 3) if isinstance(cell, float) else cell


_COLUMNS: dict[str, Any] = {
    "stage": lambda stage: stage.stage,
    "weights": lambda stage: format_size(stage.weight_bytes),
    "resident": lambda stage: format_size(stage.resident_bytes),
    "read a pass": lambda stage: format_size(stage.read_bytes),
    "reading (ms)": lambda stage: f"{stage.read_ms:.2f}",
    "waiting (ms)": lambda stage: f"{stage.wait_ms:.2f}",
    "computing (ms)": lambda stage: f"{stage.compute_ms:.2f}",
}
