"""Measure latency, peak memory and bytes read of a store for one or several budgets, each in processes of its own,
interleaved.

Without --input, the inputs are random (128 tokens, or random pixels) and there are no exits, because policies leave at
other exits on random inputs than on real ones.

With --task, or --dev and --label-column, measure the cost and gain of an exit policy on a split at batch 1, 8 and bulk,
compared with the plain model (no exit heads) and the model truncated after each layer, under one budget:

offramp bench STORE --task sst2 --data glue --exit confidence:0.9
offramp bench STORE --dev dev.tsv --text-column body --label-column kind --exit policy.json --budget 128MiB

With --against, compare with other ways to run the same classifier of texts, on the same token ids and in the same
rounds. Each rival runs in a process of its own, by an interpreter of its own where one is named:

offramp bench STORE --budget resident,128MiB --against transformers,onnxruntime-int8,ctranslate2=venv/bin/python
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offramp.cli import options
from offramp.cli.options import count, emit, log, percents, table_of
from offramp.errors import UsageError
from offramp.units import format_duration, format_size, named_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of bench."""
    from offramp.runtime.config import parse_budget

    add, sizes = parser.add_argument, options.argument(lambda text: [parse_budget(part) for part in text.split(",")])
    budgets = "memory budgets of the whole process, such as 128MiB,192MiB,resident"
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
    options.add_training_rows(parser)
    _add_rivals(parser)
    add("--json", action="store_true", help="print one JSON line per budget, or per rival and the record last")


def _add_rivals(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rivals: other ways to run the model").add_argument
    model = "model folder that the rivals read (default: the first store that transformers can load)"
    page = "also write the table, the machine, the versions and the command to a page in Markdown"
    records = "file of the records: what it holds is not measured again; name another after a change of code"
    group = "also run each in a memory cgroup of this limit, from an empty page cache: needs root"
    add("--against", type=options.argument(_parse_against), metavar="NAME[=PYTHON],...", help=_rivals_help())
    add("--model", metavar="FOLDER", help=model)
    add("--also", action="append", default=[], metavar="STORE", help="another store, such as one of int8 weights")
    add("--group", type=options.size, metavar="SIZE", help=group)
    add("--records", metavar="FILE", help=records)
    add("--markdown", metavar="FILE.md", help=page)


def _parse_against(text: str) -> Any:
    from offramp.experiments.rivals import parse_against

    return parse_against(text)


def _rivals_help() -> str:
    from offramp.experiments.rivals import RIVALS

    return f"rivals, and the interpreters that run them (default: this one): {', '.join(RIVALS)}"


def main(args: argparse.Namespace) -> None:
    """Measure budgets, a task, or rivals."""
    if args.against:
        _bench_against(args)
        return
    if args.model or args.also or args.group or args.records or args.markdown:
        what = "--model, --also, --group, --records and --markdown belong to a comparison"
        raise UsageError(what, None, "give --against transformers, or more rivals")
    if args.task or args.data or args.train or args.dev:
        _bench_task(args)
        return
    inputs = options.input_source(args)
    if args.exit != "none" and not inputs:
        what = "policies leave at other exits on random inputs than on real ones"
        raise UsageError(what, None, "give --input, or --exit none")
    _require_budgets(args)
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


def _require_budgets(args: argparse.Namespace) -> None:
    """Raise UsageError without a budget, and for inputs that only one process can read."""
    if options.input_source(args).is_stream:
        raise UsageError("each process reads the inputs again", None, "give --input a file")
    if not args.budgets:
        raise UsageError("no budget", None, "give --budget 128MiB, or several: 128MiB,192MiB")


def _budget(budget: int | str) -> str:
    return budget if isinstance(budget, str) else format_size(budget)


_BUDGET_COLUMNS = {
    "budget": lambda record: _budget(record["config"]["budget"]),
    "predicted peak": lambda record: format_size(record["predicted_peak_bytes"]),
    "measured peak": lambda record: format_size(record["peak_rss_bytes"]),
    "median latency": lambda record: format_duration(record["latency_seconds_median"]),
    "p95 latency": lambda record: format_duration(record["latency_seconds_p95"]),
    "latency bound": lambda record: format_duration(record["bound_seconds"]),
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
    from offramp.experiments.held_out import require_same_cut
    from offramp.experiments.task_bench import bench_task, take_sample
    from offramp.store import Store
    from offramp.store.manifest import require_head

    config = options.engine_config(args, budget=args.budgets[0] if args.budgets else None)
    with Store(args.store, "never") as store:
        require_head(store.manifest, store.path)
        data = options.labelled_data(args, store.program.problem, store.labels)
        if not args.include_training_rows:
            require_same_cut(store.path, options.data_record(args, data), [args.split])
        sample = take_sample(store, data, args.split, args.rows, include=args.include_training_rows, log=log)
        found, record = bench_task(store, sample, config, args.repeat, log)
    if args.json:
        for measured in found:
            emit(vars(measured))
        emit({"record": record})
        return
    trained = " with rows that were trained on" if record["includes_training_rows"] else ""
    rows = f"{record['num_texts']} rows of {record['split']}{trained}, {', '.join(record['metrics'])} in percent"
    engine = f"{record['backend']}, {record['threads']} threads, budget {format_size(record['budget_bytes'])}"
    print(f"{record['task']}: {rows}; {engine}; medians of {record['rounds']} rounds")
    print(table_of(found, _rival_columns(found)))
    print(_NOTES.format(_INTERVALS if record["rounds"] > 1 else _NO_INTERVALS))


def _rival_columns(found: Sequence[Any]) -> dict[str, Any]:
    """Return the columns of a table of rivals, named as columns of intervals where there is one."""
    has_interval = {name: any(getattr(each, f"{name}_low") is not None for each in found) for name in _COMPARED}
    marks = {name: " [95 %]" if has else "" for name, has in has_interval.items()}
    return {name.format(**marks): cell for name, cell in _RIVAL_COLUMNS.items()}


def _bench_against(args: argparse.Namespace) -> None:
    """Measure a store and its rivals."""
    _require_comparable(args)
    from offramp.experiments.against import Comparison, run_comparison
    from offramp.reporting.comparison import absences, rows_of, table_cells

    stores = tuple(Path(path) for path in (args.store, *args.also))
    comparison = Comparison(
        stores=stores,
        budgets=tuple(args.budgets),
        chosen=args.against,
        config=options.engine_config(args),
        source=options.input_source(args),
        model=Path(args.model) if args.model else None,
        passes=args.passes,
        rounds=args.repeat,
        group_bytes=args.group,
    )
    rows = rows_of(run_comparison(comparison, Path(args.records) if args.records else None, log))
    if args.json:
        for row in rows:
            emit(vars(row))
    else:
        head, cells = table_cells(rows, named_size(args.group) if args.group else None)
        print("\n".join([options.table(head, cells), *absences(rows)]))
    if args.markdown:
        _write_page(args, comparison, rows)


def _require_comparable(args: argparse.Namespace) -> None:
    """Raise UsageError for options that a comparison with rivals does not have."""
    if args.task or args.data or args.train or args.dev:
        raise UsageError("rivals and labelled data", None, "give --against without --task, --data, --train and --dev")
    if args.exit != "none" or args.deadline or args.profile or args.batch != 1:
        what = "rivals have no exits, deadlines and batches"
        raise UsageError(what, None, "give --against without --exit, --deadline, --profile and --batch")
    _require_budgets(args)
    for path, suffixes in ((args.records, ()), (args.markdown, (".md",))):
        if path:
            options.require_writable(path, suffixes)


def _write_page(args: argparse.Namespace, comparison: Any, rows: Any) -> None:
    """Write the page of a comparison."""
    import datetime as dt
    import sys

    from offramp.experiments.against import GROUP_SECONDS, describe
    from offramp.measure.hardware import default_threads, environment, instructions
    from offramp.reporting.comparison import About, page
    from offramp.store.files import write_atomic

    about = About(
        command=_command(sys.argv[1:]),
        measured=f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}",
        model=describe(comparison),
        environment=environment(args.store),
        instructions=instructions(),
        threads=args.threads or default_threads().number,
        group=named_size(args.group) if args.group else None,
        group_seconds=GROUP_SECONDS,
    )
    write_atomic(Path(args.markdown).absolute(), [page(rows, about).encode()])


def _command(words: Sequence[str]) -> str:
    """Return the command without the folders of the interpreters, which differ between machines."""
    import re
    import shlex

    return shlex.join(["offramp", *(re.sub(r"=[^,=]*/([^/,]+/bin/)", r"=\1", word) for word in words)])


def _interval(form: str, measured: Any, name: str) -> str:
    """Format a value and its interval; a dash for None."""
    value, low, high = (getattr(measured, name + suffix) for suffix in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


_COMPARED = ("score_difference", "speedup")
_RIVAL_COLUMNS = {
    "policy": lambda measured: measured.rival if measured.rival == "plain" else measured.exit,
    "batch": lambda measured: measured.batch,
    "p50 latency": lambda measured: format_duration(measured.latency_seconds_p50),
    "p90 latency": lambda measured: format_duration(measured.latency_seconds_p90),
    "p99 latency": lambda measured: format_duration(measured.latency_seconds_p99),
    "inputs / s": lambda measured: f"{measured.texts_per_second:.1f}",
    "peak memory": lambda measured: format_size(measured.peak_rss_bytes),
    "bytes read / input": lambda measured: format_size(measured.bytes_read_per_text),
    "score (%)": lambda measured: " / ".join(percents(measured.scores).values()),
    "score - plain (points){score_difference}": lambda measured: _interval("+.1f", measured, "score_difference"),
    "speed-up{speedup}": lambda measured: _interval(".2f", measured, "speedup"),
    "by layer count": lambda measured: f"{measured.layer_count_speedup:.2f}",
}
_INTERVALS = """\
their intervals, from 5 rounds on, are paired bootstraps over rounds and texts (batch 8: rounds and batches; bulk:
rounds), corrected for few rounds"""
_NO_INTERVALS = "one round has no intervals (see --repeat)"
_NOTES = """\
Latencies are per batch. Speed-ups are wall-clock ratios to the plain model at the same batch size; {}.
"by layer count" is the number of layers divided by the mean exit: it is not measured and omits heads, embeddings and
reads. stage:K is the model truncated after layer K."""
