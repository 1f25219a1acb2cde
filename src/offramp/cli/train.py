"""Fine-tune a model with an exit after each layer. The run folder is a checkpoint of transformers plus the exits.

offramp train bert-base-uncased --task mnli --data glue --out runs/mnli
offramp train MODEL --train train.tsv --dev dev.tsv --text-column sentence --label-column label --out runs/mine

80 % of the data are for training, 10 % (tune) for choosing policies, 10 % (certify) for certificates. After an
interruption, the same command continues from the last checkpoint. torchrun -m offramp train ... uses several GPUs.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from offramp.cli import options
from offramp.cli.options import count, emit, log, percents, table
from offramp.errors import UsageError

NUMBERS = {
    "--epochs": ("epochs", count, "epochs of the whole model"),
    "--heads-epochs": ("heads_epochs", int, "further epochs of the heads only"),
    "--lr": ("learning_rate", float, "learning rate of the encoder"),
    "--head-lr": ("head_learning_rate", float, "learning rate of the heads"),
    "--batch": ("batch_size", count, "rows per batch"),
    "--accumulate": ("accumulate", count, "batches per step"),
    "--max-length": ("max_length", count, "tokens to which texts are truncated"),
    "--warmup": ("warmup", float, "fraction of the steps"),
}
"""Option -> field of TrainSettings, type, and help."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of train."""
    from offramp.training.settings import LOSSES, PRECISIONS, WEIGHTS, TrainSettings

    default = TrainSettings()
    parser.add_argument("model", help="a folder, or an id on the hub: of texts or images")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run folder; with several seeds DIR/seed-N")
    options.add_data(parser)
    options.add_columns(parser)
    add = parser.add_argument_group("training").add_argument
    heads = f"mean-linear, cls-linear, own or own-shared (default: {default.heads})"
    weights = f"weights of the losses of the exits (default: {default.exit_weights})"
    steps = "steps between checkpoints (default: a fifth of all steps, at most 500)"
    add("--loss", choices=LOSSES, default=default.loss, help=f"(default: {default.loss})")
    add("--heads", metavar="FORM", default=default.heads, help=heads)
    add("--exit-weights", choices=tuple(WEIGHTS), default=default.exit_weights, help=weights)
    for option, (field, kind, what) in NUMBERS.items():
        value = getattr(default, field)
        add(option, dest=field, type=kind, default=value, metavar="N", help=f"{what} (default: {value})")
    add("--save-steps", type=count, metavar="N", help=steps)
    add("--max-rows", type=count, metavar="N", help="train on N rows, evenly spaced in the train split")
    add("--precision", choices=PRECISIONS, default=default.precision, help="precision of the computation")
    add("--report-to", default=default.report_to, metavar="NAME", help="tensorboard, wandb, ...")
    add("--seed", type=_seeds, dest="seeds", default=(0,), metavar="N[,N...]", help="(default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON line per seed")


def main(args: argparse.Namespace) -> None:
    """Train one model per seed."""
    from offramp.checkpoints.hub import resolve
    from offramp.tasks.examples import counted, spread
    from offramp.training import TrainSettings, is_first_process, train_exits

    data = options.labelled_data(args)
    train, tune = spread(data.examples.get("train") or [], args.max_rows), data.examples.get("tune") or []
    if is_first_process():
        for name, found in data.examples.items():
            rows = train if name == "train" else found
            log(f"{name}: {len(rows)} rows: {counted([row.label for row in rows], data.labels)}")
    model, out = resolve(args.model, args.offline), Path(args.out)
    given = {each.name: getattr(args, each.name) for each in fields(TrainSettings) if hasattr(args, each.name)}
    facts = {"labels": data.labels, "metrics": data.metrics, "data": options.data_record(args, data)}
    for seed in args.seeds:
        folder = out if len(args.seeds) == 1 else out / f"seed-{seed}"
        try:
            settings = TrainSettings(**given, seed=seed)
        except ValueError as error:
            raise UsageError(str(error), None, "offramp train --help shows what is possible") from None
        progress = log if is_first_process() else lambda line: None
        with _hint_on_interrupt(folder):
            metrics = train_exits(model, train, tune, folder, settings=settings, progress=progress, **facts)
        if is_first_process():
            _show(str(folder), seed, metrics, args.json)


@contextmanager
def _hint_on_interrupt(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if folder.with_name(folder.name + ".partial").exists():
            log("the same command continues from the last checkpoint")
        raise


def _show(folder: str, seed: int, metrics: Any, as_json: bool) -> None:
    num_rows, scores = metrics.logits_KNC.shape[1], metrics.scores
    if as_json:
        emit({"run": folder, "seed": seed, "tune_rows": num_rows, "tune_scores": list(scores)})
        return
    rows = [(f"exit {number}", *percents(found).values()) for number, found in enumerate(scores, 1)]
    print(f"{folder}: the tune split, {num_rows} rows, in percent")
    print(table(("", *percents(scores[0])), rows), flush=True)


def _seeds(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"whole numbers, each once, not {text!r}")
    return tuple(map(int, parts))
