"""The part of `offramp bench` that measures a task, and its output."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from offramp.cli.options import data_record, emit, labelled_data, log, percents, table, warn

if TYPE_CHECKING:
    from offramp.runtime.config import EngineConfig

_HEAD = (
    "policy", "batch", "p50 latency", "p90 latency", "p99 latency", "inputs / s", "peak memory", "bytes read / input",
    "score (%)", "score - plain (points) [95 %]", "speed-up [95 %]", "by layer count",
)  # fmt: skip
_NOTES = """\
Latencies are per batch. Speed-ups are wall-clock ratios to the plain model at the same batch size; their intervals are
paired bootstraps over rounds and texts (batch 8: rounds and batches; bulk: rounds). "by layer count" is the number of
layers divided by the mean exit: it is not measured and omits heads, embeddings and reads. stage:K is the model
truncated after layer K."""


def measure(args: argparse.Namespace, config: EngineConfig) -> int:
    """Measure a store on the labelled data that `args` name, with the engine options of `config`."""
    from offramp.experiments.evaluation import require_same_cut
    from offramp.experiments.task_bench import bench_task, take_sample
    from offramp.policies.evidence import REGRESSION
    from offramp.store import Store
    from offramp.store.manifest import require_head

    with Store(args.store, "never") as store:
        require_head(store.manifest, store.path)
        data = labelled_data(args, () if store.program.problem == REGRESSION else store.labels)
        for sentence in data.partial:
            warn(f"no score of {data.name}: {sentence}")
        require_same_cut(store.path, data_record(args, data), [args.split])
        sample = take_sample(store, data, args.split, args.rows)
        found, record = bench_task(store, sample, config, args.repeat, log)
    if args.json:
        for measured in found:
            emit(vars(measured))
        emit({"record": record})
        return 0
    print(_heading(record))
    print(table(_HEAD, [_row(measured) for measured in found]))
    print(_NOTES)
    return 0


def _heading(record: dict[str, Any]) -> str:
    from offramp.units import format_size

    rows = f"{record['num_texts']} rows of {record['split']}, {', '.join(record['metrics'])} in percent"
    engine = f"{record['backend']}, {record['threads']} threads, budget {format_size(record['budget_bytes'])}"
    return f"{record['task']}: {rows}; {engine}; medians of {record['rounds']} rounds"


def _row(measured: Any) -> tuple[str, ...]:
    from offramp.units import format_size

    latencies = (measured.latency_seconds_p50, measured.latency_seconds_p90, measured.latency_seconds_p99)
    return (
        measured.rival if measured.rival == "plain" else measured.exit,
        str(measured.batch),
        *(f"{seconds * 1e3:.2f} ms" for seconds in latencies),
        f"{measured.texts_per_second:.1f}",
        format_size(measured.peak_rss_bytes),
        format_size(measured.bytes_read_per_text),
        " / ".join(percents(measured.scores).values()),
        _interval("+.1f", measured.score_difference, measured.score_difference_low, measured.score_difference_high),
        _interval(".2f", measured.speedup, measured.speedup_low, measured.speedup_high),
        f"{measured.layer_count_speedup:.2f}",
    )


def _interval(form: str, value: float | None, low: float | None, high: float | None) -> str:
    """Format a value and its interval; a dash for None."""
    if value is None:
        return "-"
    return f"{value:{form}}" if low is None or high is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"
