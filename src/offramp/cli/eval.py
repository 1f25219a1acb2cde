"""Score every exit of a model or a store, and exit policies on their outputs.

offramp eval runs/mnli --task mnli --data glue
offramp eval runs/mine --dev dev.tsv --text-column sentence --label-column label --exit confidence:0.9
offramp eval runs/mnli --task mnli --data glue --split tune,certify,dev --transcript transcripts/mnli
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from offramp.cli import options
from offramp.cli.options import count, emit, log, percents, table
from offramp.errors import UsageError


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of eval."""
    add = parser.add_argument
    add("model", help="a run folder, a store, or a classifier: a folder or an id on the hub")
    options.add_data(parser)
    options.add_columns(parser)
    add("--split", default="dev", metavar="NAME[,NAME...]", help="train, tune, certify, dev")
    policy = "also score a policy; may be given several times"
    add("--exit", action="append", default=[], metavar="POLICY", help=policy)
    add("--transcript", metavar="DIR", help="write the outputs of every exit for every row")
    add("--features", action="store_true", help="also write the hidden states of the first token")
    add("--batch", type=count, default=32, metavar="N", help="rows that run together (default: 32)")
    length = "truncate texts to N tokens (default: as in training, else the limit of the model)"
    add("--max-length", type=count, metavar="N", help=length)
    options.add_training_rows(parser)
    options.add_engine(parser, "trust_kernels")
    add("--json", action="store_true", help="print one JSON line per split")


def main(args: argparse.Namespace) -> None:
    """Evaluate the splits and print the tables."""
    from offramp.checkpoints.hub import resolve
    from offramp.experiments.evaluation import EvalSettings, classifier_facts, evaluate
    from offramp.experiments.held_out import require_same_cut
    from offramp.policies import parse

    if args.features and not args.transcript:
        raise UsageError("--features are written to a transcript", None, "give --transcript DIR")
    policies = tuple(parse(text, code=True) for text in args.exit)
    folder, names = resolve(args.model, args.offline), args.split.split(",")
    facts = classifier_facts(folder)
    data = options.labelled_data(args, facts.problem, facts.labels)
    if not args.include_training_rows:
        require_same_cut(folder, options.data_record(args, data), names)
    transcript = Path(args.transcript) if args.transcript else None
    settings = EvalSettings(
        policies,
        args.batch,
        args.max_length,
        transcript,
        args.features,
        args.include_training_rows,
        args.trust_kernels,
    )
    for report in evaluate(folder, data, names, settings, log=log):
        if args.json:
            emit(asdict(report))
        else:
            _show(report, is_classification=bool(data.labels))


def _show(report: Any, is_classification: bool) -> None:
    names = list(percents(report.exits[0].scores))
    overthought = "correct here, wrong at last exit" if is_classification else "nearer than last exit"
    rows = [
        (f"exit {row.exit}", *percents(row.scores).values(), f"{row.agreement:.1f}", f"{row.overthought:.1f}")
        for row in report.exits
    ]
    trained = (
        f", {report.training_rows} of which were trained on"
        if report.includes_training_rows and report.training_rows
        else ""
    )
    print(f"{report.split}: {report.num_rows} rows{trained}, in percent")
    print(table(("", *names, "agrees with last exit", overthought), rows))
    what = "correct at some exit and wrong at the last" if is_classification else "nearer at some exit than at the last"
    print(f"overthinking: {report.overthinking:.1f} % of the rows are {what}")
    if report.policies:
        rows = [(row.policy, *percents(row.scores).values(), f"{row.mean_exit:.2f}") for row in report.policies]
        print(table(("policy", *names, "mean exit"), rows))
    if report.transcript:
        log(f"transcript: {report.transcript}")
    print(flush=True)
