"""Measure latency, peak memory and bytes read of a store for one or several budgets, each in processes of its own,
interleaved.

Without --input, the inputs are random (128 tokens, or random pixels) and there are no exits, because policies leave at
other exits on random inputs than on real ones.

With --task, or --dev and --label-column, measure the cost and gain of an exit policy on a split at batch 1, 8 and bulk,
compared with the plain model (no exit heads) and the model truncated after each layer, under one budget:

offramp bench STORE --task sst2 --data glue --exit confidence:0.9
offramp bench STORE --dev dev.tsv --text-column body --label-column kind --exit policy.json --budget 128MiB
"""

import argparse
from typing import Any

from offramp.cli import options
from offramp.cli.options import count, emit, log, percents, table_of
from offramp.errors import UsageError
from offramp.units import format_size, parse_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of bench."""
    add, sizes = parser.add_argument, options.argument(lambda text: [parse_size(part) for part in text.split(",")])
    budgets = "memory budgets of the whole process, such as 128MiB,192MiB"
    add("store")
    add("--budget", type=sizes, dest="budgets", default=[], metavar="SIZE[,SIZE...]", help=budgets)
    add("--repeat", type=count, default=5, metavar="N", help="rounds, each with a new process per budget (default: 5)")
    add("--passes", type=count, default=10, metavar="N", help="batches of random inputs per process (default: 10)")
    options.add_engine(parser, omit=("budget",))
    options.add_inputs(parser)
    options.add_data(parser)
    options.add_columns(parser)
    add("--split", default="dev", metavar="NAME", help="train, tune, certify or dev (default: dev)")
    add("--rows", type=count, default=200, metavar="N", help="number of evenly spaced rows of the split (default: 200)")
    add("--json", action="store_true", help="print one JSON line per budget, or per rival and the record last")


def main(args: argparse.Namespace) -> None:
    """Measure budgets, or a task."""
    if args.task or args.data or args.train or args.dev:
        _bench_task(args)
        return
    inputs = options.input_source(args)
    if args.exit != "none" and not inputs:
        what = "policies leave at other exits on random inputs than on real ones"
        raise UsageError(what, None, "give --input, or --exit none")
    if inputs.is_stream:
        raise UsageError("each process reads the inputs again", None, "give --input a file")
    if not args.budgets:
        raise UsageError("no budget", None, "give --budget 128MiB, or several: 128MiB,192MiB")
    from offramp.experiments.bench import bench
    from offramp.experiments.jobs import WorkerJob

    for _ in inputs.read(log):  # errors and irregular rows are reported once, not by each process
        pass
    config = options.engine_config(args)
    job = WorkerJob("inputs" if inputs else "passes", args.store, config, inputs, args.passes)
    records = bench(job, args.budgets, args.repeat, log)
    if args.json:
        for record in records:
            emit(record)
        return
    print(table_of(records, _BUDGET_COLUMNS))


_BUDGET_COLUMNS = {
    "budget": lambda record: format_size(record["budget_bytes"]),
    "predicted peak": lambda record: format_size(record["predicted_peak_bytes"]),
    "measured peak": lambda record: format_size(record["peak_rss_bytes"]),
    "median latency": lambda record: f"{record['latency_seconds_median'] * 1e3:.1f} ms",
    "p95 latency": lambda record: f"{record['latency_seconds_p95'] * 1e3:.1f} ms",
    "latency bound": lambda record: f"{record['bound_seconds'] * 1e3:.1f} ms",
    "bound / median": lambda record: f"{100 * record['bound_seconds'] / record['latency_seconds_median']:.0f} %",
    "bytes read per input": lambda record: format_size(record["bytes_read_per_input"]),
}


def _bench_task(args: argparse.Namespace) -> None:
    """Measure a store on labelled data."""
    if args.text or args.pair or args.input:
        raise UsageError("labelled data and something else to measure", None, "give --task or --dev alone")
    if args.batch != 1 or args.profile:
        raise UsageError("--batch and --profile are for one batch size", None, "a task is measured at 1, 8 and bulk")
    if len(args.budgets) > 1:
        raise UsageError("several budgets", None, "a task is measured under one")
    from offramp.experiments.evaluation import require_same_cut
    from offramp.experiments.task_bench import bench_task, take_sample
    from offramp.store import Store
    from offramp.store.manifest import require_head

    config = options.engine_config(args, budget=args.budgets[0] if args.budgets else None)
    with Store(args.store, "never") as store:
        require_head(store.manifest, store.path)
        data = options.labelled_data(args, store.program.problem, store.labels)
        require_same_cut(store.path, options.data_record(args, data), [args.split])
        sample = take_sample(store, data, args.split, args.rows)
        found, record = bench_task(store, sample, config, args.repeat, log)
    if args.json:
        for measured in found:
            emit(vars(measured))
        emit({"record": record})
        return
    rows = f"{record['num_texts']} rows of {record['split']}, {', '.join(record['metrics'])} in percent"
    engine = f"{record['backend']}, {record['threads']} threads, budget {format_size(record['budget_bytes'])}"
    print(f"{record['task']}: {rows}; {engine}; medians of {record['rounds']} rounds")
    print(table_of(found, _RIVAL_COLUMNS))
    print(_NOTES)


def _interval(form: str, measured: Any, name: str) -> str:
    """Format a value and its interval; a dash for None."""
    value, low, high = (getattr(measured, name + suffix) for suffix in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


_RIVAL_COLUMNS = {
    "policy": lambda measured: measured.rival if measured.rival == "plain" else measured.exit,
    "batch": lambda measured: measured.batch,
    "p50 latency": lambda measured: f"{measured.latency_seconds_p50 * 1e3:.2f} ms",
    "p90 latency": lambda measured: f"{measured.latency_seconds_p90 * 1e3:.2f} ms",
    "p99 latency": lambda measured: f"{measured.latency_seconds_p99 * 1e3:.2f} ms",
    "inputs / s": lambda measured: f"{measured.texts_per_second:.1f}",
    "peak memory": lambda measured: format_size(measured.peak_rss_bytes),
    "bytes read / input": lambda measured: format_size(measured.bytes_read_per_text),
    "score (%)": lambda measured: " / ".join(percents(measured.scores).values()),
    "score - plain (points) [95 %]": lambda measured: _interval("+.1f", measured, "score_difference"),
    "speed-up [95 %]": lambda measured: _interval(".2f", measured, "speedup"),
    "by layer count": lambda measured: f"{measured.layer_count_speedup:.2f}",
}
_NOTES = """\
Latencies are per batch. Speed-ups are wall-clock ratios to the plain model at the same batch size; their intervals are
paired bootstraps over rounds and texts (batch 8: rounds and batches; bulk: rounds). "by layer count" is the number of
layers divided by the mean exit: it is not measured and omits heads, embeddings and reads. stage:K is the model
truncated after layer K."""
