"""Score every exit of a model or a store, and exit policies on their outputs.

offramp eval runs/mnli --task mnli --data glue
offramp eval runs/mine --dev dev.tsv --text-column sentence --label-column label --exit confidence:0.9
offramp eval runs/mnli --task mnli --data glue --split tune,certify,dev --transcript transcripts/mnli
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offramp.cli.options import (
    add_columns,
    add_data,
    count,
    data_record,
    emit,
    labelled_data,
    log,
    percents,
    table,
    warn,
)
from offramp.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of eval."""
    parser.add_argument("model", help="a run folder, a store, or a classifier: a folder or an id on the hub")
    add_data(parser)
    add_columns(parser)
    parser.add_argument("--split", default="dev", metavar="NAME[,NAME...]", help="train, tune, certify, dev")
    parser.add_argument(
        "--exit", action="append", default=[], metavar="POLICY", help="also score a policy; may be given several times"
    )
    parser.add_argument("--transcript", metavar="DIR", help="write the outputs of every exit for every row")
    parser.add_argument("--features", action="store_true", help="also write the hidden states of the first token")
    parser.add_argument("--batch", type=count, default=32, metavar="N", help="rows that run together (default: 32)")
    parser.add_argument(
        "--max-length",
        type=count,
        metavar="N",
        help="truncate texts to N tokens (default: as in training, else the limit of the model)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line per split")


def main(args: argparse.Namespace) -> int:
    """Evaluate the splits and print the tables."""
    from offramp.checkpoints.hub import resolve
    from offramp.experiments.evaluation import EvalSettings, classifier_facts, evaluate, require_same_cut
    from offramp.policies import parse
    from offramp.policies.evidence import REGRESSION

    if args.features and not args.transcript:
        raise UsageError("--features are written to a transcript", None, "give --transcript DIR")
    policies = tuple(parse(text) for text in args.exit)
    folder = resolve(args.model, args.offline)
    facts = classifier_facts(folder)
    data = labelled_data(args, () if facts.problem == REGRESSION else facts.labels)
    for sentence in data.partial:
        warn(f"no score of {data.name}: {sentence}")
    names = args.split.split(",")
    require_same_cut(folder, data_record(args, data), names)
    transcript = Path(args.transcript) if args.transcript else None
    settings = EvalSettings(policies, args.batch, args.max_length, transcript, args.features)
    reports = evaluate(folder, data, names, settings, log=log)
    for report in reports:
        _show(report, bool(data.labels), args.json)
    return 0


def _show(report: Any, is_classification: bool, as_json: bool) -> None:
    if as_json:
        emit(asdict(report))
        return
    names = list(percents(report.exits[0].scores))
    overthought = "correct here, wrong at last exit" if is_classification else "nearer than last exit"
    head = ("", *names, "agrees with last exit", overthought)
    rows = [
        (f"exit {row.exit}", *percents(row.scores).values(), f"{row.agreement:.1f}", f"{row.overthought:.1f}")
        for row in report.exits
    ]
    print(f"{report.split}: {report.num_rows} rows, in percent")
    print(table(head, rows))
    what = "correct at some exit and wrong at the last" if is_classification else "nearer at some exit than at the last"
    print(f"overthinking: {report.overthinking:.1f} % of the rows are {what}")
    if report.policies:
        head = ("policy", *names, "mean exit")
        rows = [(row.policy, *percents(row.scores).values(), f"{row.mean_exit:.2f}") for row in report.policies]
        print(table(head, rows))
    if report.transcript:
        log(f"transcript: {report.transcript}")
    print(flush=True)
