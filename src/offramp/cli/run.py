"""Classify texts under a budget that the whole process keeps; each text leaves at the first exit that the policy is
sure of.

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

from offramp.cli.options import (
    add_budget,
    add_columns,
    add_engine,
    add_inputs,
    emit,
    engine_options,
    has_inputs,
    inputs,
    known_inputs,
    peak_line,
    require_writable,
    say,
)
from offramp.errors import UsageError, shown

BULK_TEXTS = 1024
"""Texts that bulk mode sorts by length at a time."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of run."""
    parser.add_argument("store")
    add_budget(parser)
    add_inputs(parser)
    add_columns(parser)
    add_engine(parser)
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write the timed events: FILE.jsonl, or FILE.json for chrome://tracing and Perfetto",
    )
    parser.add_argument("--json", action="store_true", help="one JSON line an input, the record last")


def main(args: argparse.Namespace) -> int:
    """Run."""
    started = time.perf_counter()
    import offramp
    from offramp.measure import read_memory

    if not has_inputs(args):
        raise UsageError("no input", None, "give --text, --pair or --input")
    if args.trace:
        require_writable(args.trace)
    classifier = offramp.prepare(args.store, args.budget, texts=known_inputs(args), **engine_options(args))
    num_layers = classifier.num_exits
    with classifier:
        ready = time.perf_counter() - started
        size = BULK_TEXTS if args.batch == "bulk" else args.batch
        for batch, more in _batches(inputs(args), size, live=args.input == "-"):
            for text, result in zip(batch, classifier.predict(batch, more=more), strict=True):
                _show(result, text, num_layers, args.json)
        record = {**classifier.record(), "ready_seconds": ready, "peak_rss_bytes": read_memory().peak_bytes}
    if args.trace:
        (classifier.trace.to_jsonl if args.trace.endswith(".jsonl") else classifier.trace.to_chrome)(args.trace)
    if args.json:
        emit({"record": record})
    say(peak_line(record))
    return 0


def _batches(texts: Any, num_rows: int, live: bool) -> Iterator[tuple[list[Any], bool]]:
    """(batch, whether another follows): the last batch must not read ahead for a next one. Live input is not kept
    waiting to find that out.
    """
    texts = iter(texts)
    batch = list(islice(texts, num_rows))
    while batch:
        following = [] if live else list(islice(texts, num_rows))
        yield batch, live or bool(following)
        batch = list(islice(texts, num_rows)) if live else following


def _show(result: Any, text: Any, num_layers: int, as_json: bool) -> None:
    if as_json:
        emit(asdict(result))
        return
    name = result.label or "value" if result.labels is None else ", ".join(result.labels) or "none"
    beginning = " ".join((" | ".join(text) if isinstance(text, tuple) else str(text))[:200].split())[:60]
    line = f"{shown(name)}  {result.score:.4f}  exit {result.exit_stage}/{num_layers}  {shown(beginning)}"
    print(line, flush=True)
