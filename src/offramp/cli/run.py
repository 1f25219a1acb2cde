"""Classify inputs within a memory budget for the whole process; each input stops at the first exit where the policy is
confident.

offramp run STORE --budget 128MiB --exit patience:3 --text "..."
offramp run STORE --budget 128MiB --input texts.tsv --text-column body --json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

from offramp.cli import options
from offramp.cli.options import emit, log, require_writable, warn
from offramp.errors import UsageError, shown

BULK_INPUTS = 1024
"""Number of inputs that bulk mode sorts by length at a time."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of run."""
    parser.add_argument("store")
    options.add_inputs(parser)
    options.add_columns(parser)
    options.add_engine(parser)
    trace = "write the timed events: FILE.jsonl, or FILE.json for chrome://tracing and Perfetto"
    parser.add_argument("--trace", metavar="FILE", help=trace)
    parser.add_argument("--json", action="store_true", help="print one JSON line per input, and the record last")


def main(args: argparse.Namespace) -> None:
    """Classify the inputs."""
    started = time.perf_counter()
    from offramp.measure import read_memory
    from offramp.session import prepare_engine

    inputs = options.input_source(args)
    if not inputs:
        raise UsageError("no input", None, "give --text, --pair or --input")
    if args.trace:
        require_writable(args.trace)
    known = inputs.known(log)
    classifier = prepare_engine(args.store, options.engine_config(args), texts=known, warn=warn)
    with classifier:
        ready = time.perf_counter() - started
        size = BULK_INPUTS if args.batch == "bulk" else args.batch
        for batch, more in _batches(inputs if known else inputs.read(log), size, is_stream=inputs.is_stream):
            for text, result in zip(batch, classifier.predict(batch, more=more)):
                _show(result, text, classifier.num_exits, args.json)
        record = {**classifier.record(), "ready_seconds": ready, "peak_rss_bytes": read_memory().peak_bytes}
    if args.trace:
        (classifier.trace.to_jsonl if args.trace.endswith(".jsonl") else classifier.trace.to_chrome)(args.trace)
    if args.json:
        emit({"record": record})
    log(options.peak_line(record))


def _batches(inputs: Any, num_rows: int, is_stream: bool) -> Iterator[tuple[list[Any], bool]]:
    """Yield (batch, whether another follows), so that the last batch does not read ahead.

    A stream always reports that another follows: waiting for the next line would delay the answer.
    """
    rest = iter(inputs)
    batch = list(islice(rest, num_rows))
    while batch:
        following = [] if is_stream else list(islice(rest, num_rows))
        yield batch, is_stream or bool(following)
        batch = list(islice(rest, num_rows)) if is_stream else following


def _show(result: Any, text: Any, num_layers: int, as_json: bool) -> None:
    if as_json:
        emit(asdict(result))
        return
    beginning = " ".join((" | ".join(text) if isinstance(text, tuple) else str(text))[:200].split())[:60]
    print(f"{_answer(result)}  exit {result.exit_stage}/{num_layers}  {shown(beginning)}", flush=True)


def _answer(result: Any) -> str:
    """Return label and score of a result, or all its values, as text for a terminal."""
    if result.values is not None:
        return "  ".join(f"{value:.4f}" for value in result.values)
    name = "value" if result.label is None else result.label
    name = name if result.labels is None else ", ".join(result.labels) or "none"
    return f"{shown(name)}  {result.score:.4f}"
