"""Classify inputs within a memory budget for the whole process; each input stops at the first exit where the policy is
confident.

offramp run STORE --budget 128MiB --exit patience:3 --text "..."
offramp run STORE --budget 128MiB --input texts.tsv --text-column body --json
offramp run STORE --budget 128MiB --input texts.csv --out answers.csv --all-scores
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from offramp.cli import options
from offramp.cli.options import emit, log, require_apart, require_writable, warn
from offramp.errors import UsageError, shown
from offramp.program.program import REGRESSION
from offramp.units import format_duration, format_size

if TYPE_CHECKING:
    from offramp.session import Classifier
    from offramp.session.inputs import InputSource


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of run."""
    parser.add_argument("store")
    options.add_inputs(parser)
    options.add_columns(parser)
    options.add_engine(parser)
    trace = "write the timed events: FILE.jsonl, or FILE.json for chrome://tracing and Perfetto"
    out = "write the results there instead of printing them: .csv, .jsonl or .parquet (which takes more memory)"
    add = parser.add_argument
    add("--all-scores", action="store_true", help="give the probability of every class")
    add("--out", metavar="FILE", help=out)
    add("--trace", metavar="FILE", help=trace)
    add("--quiet", action="store_true", help="print results, warnings and errors only: no notices, no closing line")
    add("--json", action="store_true", help="print one JSON line per input, and the record last")


def main(args: argparse.Namespace) -> None:
    """Classify the inputs."""
    started = time.perf_counter()
    from offramp.measure import read_memory
    from offramp.session import prepare_engine
    from offramp.tasks.lines import silent

    inputs, notify = options.input_source(args), silent if args.quiet else log
    if not inputs:
        raise UsageError("no input", _standard_input(), "give --text, --pair or --input")
    _require_outputs(args)
    known = inputs.known(notify)
    classifier = prepare_engine(args.store, options.engine_config(args), texts=known, warn=warn)
    if args.all_scores and classifier.store.program.problem == REGRESSION:
        raise UsageError("a regression has no classes", args.store, "leave out --all-scores")
    with classifier:
        ready = time.perf_counter() - started
        answers = _answers(classifier, inputs, inputs if known else inputs.read(notify), args)
        if args.out:
            from offramp.session.outputs import write_results

            write_results(args.out, answers)
        else:
            for text, result in answers:
                _show(result, text, classifier.num_exits, args.json)
        record = {**classifier.record(), "ready_seconds": ready, "peak_rss_bytes": read_memory().peak_bytes}
    if args.trace:
        (classifier.trace.to_jsonl if args.trace.lower().endswith(".jsonl") else classifier.trace.to_chrome)(args.trace)
    if args.json:
        emit({"record": record})
    for line in _closing_lines(record, classifier):
        notify(line)


def _standard_input() -> str | None:
    """Return what leads into the command if something does: a pipe or a file, which is not read unasked."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:  # it is closed
        return None
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a file" if stat.S_ISREG(mode) else None
    return kind and f"standard input is {kind}, which --input - reads"


def _require_outputs(args: argparse.Namespace) -> None:
    """Raise UsageError or OSError for files that cannot be written."""
    require_apart({"--out": args.out, "--trace": args.trace}, {"--input": args.input})
    if args.trace:
        require_writable(args.trace)
    if args.out:
        from offramp.session.outputs import FORMATS, require_library

        require_writable(args.out, tuple(FORMATS), atomic=True)
        require_library(args.out)


def _answers(
    classifier: Classifier, inputs: InputSource, source: Any, args: argparse.Namespace
) -> Iterator[tuple[Any, Any]]:
    """Yield each input with its result."""
    from offramp.session.requests import BULK_INPUTS, requests_of

    size = BULK_INPUTS if args.batch == "bulk" else args.batch
    for batch, more in requests_of(source, size, waits=inputs.is_stream):
        yield from zip(batch, classifier.predict(batch, more=more, all_scores=args.all_scores))


def _closing_lines(record: dict[str, Any], classifier: Classifier) -> list[str]:
    """Return the last lines of a run: on a terminal a summary, otherwise the line that programs know."""
    late = ""
    if record["deadline_seconds"] is not None:
        deadline = f"the deadline of {format_duration(record['deadline_seconds'])}"
        late = f"{record['late']} late for {deadline} (p99 {format_duration(record['latency_seconds_p99'])})"
    if sys.stderr is None or not sys.stderr.isatty():
        return [*([late] if late else []), options.peak_line(record)]
    number, kind = record["num_inputs"], "inputs" if classifier.store.program.texts is None else "texts"
    median, p95 = (format_duration(record[f"latency_seconds_{name}"]) for name in ("median", "p95"))
    batch = f" a batch of {record['batch']}" if record["batch"] > 1 else ""
    parts = [
        f"{number} {kind if number > 1 else kind[:-1]}",
        f"median {median} and p95 {p95}{batch}",
        f"{format_size(record['bytes_read_total'])} read",
        f"mean exit {record['stages_run_total'] / number:.2f} of {classifier.num_exits}",
        f"peak {format_size(record['peak_rss_bytes'])} of {format_size(record['budget_bytes'])}",
        late,
    ]
    return [", ".join(part for part in parts if part)]


def _show(result: Any, text: Any, num_layers: int, as_json: bool) -> None:
    if as_json:
        emit(asdict(result))
        return
    beginning = " ".join((" | ".join(text) if isinstance(text, tuple) else str(text))[:200].split())[:60]
    print(f"{_answer(result)}  exit {result.exit_stage}/{num_layers}  {shown(beginning)}", flush=True)


def _answer(result: Any) -> str:
    """Return label and score of a result, or all its scores or values, as text for a terminal."""
    if result.values is not None:
        return "  ".join(f"{value:.4f}" for value in result.values)
    if result.scores is not None:
        best_first = sorted(result.scores.items(), key=lambda item: -item[1])
        return "  ".join(f"{shown(name)}  {score:.4f}" for name, score in best_first)
    name = "value" if result.label is None else result.label
    name = name if result.labels is None else ", ".join(result.labels) or "none"
    return f"{shown(name)}  {result.score:.4f}"
