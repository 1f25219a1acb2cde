"""Fine-tune a model with an exit after each layer. The run folder is a checkpoint of transformers plus the exits.

offramp train bert-base-uncased --task mnli --data glue --out runs/mnli
offramp train MODEL --train train.tsv --dev dev.tsv --text-column sentence --label-column label --out runs/mine

80 % of the data are for training, 10 % (tune) for choosing policies, 10 % (certify) for certificates. After an
interruption, the same command continues from the last checkpoint. torchrun -m offramp train ... uses several GPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
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

SETTINGS = {
    "loss": "loss", "heads": "heads", "exit_weights": "exit_weights", "epochs": "epochs",
    "heads_epochs": "heads_epochs", "lr": "learning_rate", "head_lr": "head_learning_rate", "batch": "batch_size",
    "accumulate": "accumulate", "max_length": "max_length", "warmup": "warmup", "precision": "precision",
    "save_steps": "save_steps", "report_to": "report_to",
}  # fmt: skip
"""Option -> field of TrainSettings."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of train."""
    from offramp.training.settings import LOSSES, PRECISIONS, WEIGHTS, TrainSettings

    default = TrainSettings()
    parser.add_argument("model", help="a folder, or an id on the hub: of texts or images")
    parser.add_argument("--out", required=True, metavar="DIR", help="the run folder; with several seeds DIR/seed-N")
    add_data(parser)
    add_columns(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--loss", choices=LOSSES, default=default.loss, help=f"(default: {default.loss})")
    group.add_argument(
        "--heads", metavar="FORM", default=default.heads,
        help=f"mean-linear, cls-linear, own or own-shared (default: {default.heads})",
    )  # fmt: skip
    group.add_argument(
        "--exit-weights", choices=tuple(WEIGHTS), default=default.exit_weights,
        help=f"weights of the losses of the exits (default: {default.exit_weights})",
    )  # fmt: skip
    _number(group, "--epochs", count, default.epochs, "epochs of the whole model ")
    _number(group, "--heads-epochs", int, default.heads_epochs, "further epochs of the heads only ")
    _number(group, "--lr", float, default.learning_rate, "learning rate of the encoder ")
    _number(group, "--head-lr", float, default.head_learning_rate, "learning rate of the heads ")
    _number(group, "--batch", count, default.batch_size, "rows per batch ")
    _number(group, "--accumulate", count, default.accumulate, "batches per step ")
    _number(group, "--max-length", count, default.max_length, "tokens to which texts are truncated ")
    _number(group, "--warmup", float, default.warmup, "fraction of the steps ")
    group.add_argument(
        "--save-steps",
        type=count,
        metavar="N",
        help="steps between checkpoints (default: a fifth of all steps, at most 500)",
    )
    group.add_argument("--max-rows", type=count, metavar="N", help="train on N rows, evenly spaced in the train split")
    group.add_argument(
        "--precision", choices=PRECISIONS, default=default.precision, help="precision of the computation"
    )
    group.add_argument("--report-to", default=default.report_to, metavar="NAME", help="tensorboard, wandb, ...")
    group.add_argument("--seed", type=_seeds, default=(0,), metavar="N[,N...]", help="(default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON line per seed")


def main(args: argparse.Namespace) -> int:
    """Train one model per seed."""
    from offramp.checkpoints.hub import resolve
    from offramp.tasks.examples import spread
    from offramp.training import is_first_process, train_exits

    data = labelled_data(args)
    for sentence in data.partial:
        warn(f"no score of {data.name}: {sentence}")
    train = spread(data.examples.get("train") or [], args.max_rows)
    model, out = resolve(args.model, args.offline), Path(args.out)
    for seed in args.seed:
        folder = out if len(args.seed) == 1 else out / f"seed-{seed}"
        with _hint_on_interrupt(folder):
            metrics = train_exits(
                model, train, data.examples.get("tune") or [], folder,
                labels=data.labels, metrics=data.metrics, settings=_settings(args, seed), data=data_record(args, data),
                progress=log if is_first_process() else lambda line: None,
            )  # fmt: skip
        if is_first_process():
            _show(str(folder), seed, metrics, args.json)
    return 0


@contextmanager
def _hint_on_interrupt(folder: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if folder.with_name(folder.name + ".partial").exists():
            log("the same command continues from the last checkpoint")
        raise


def _settings(args: argparse.Namespace, seed: int) -> Any:
    from offramp.training import TrainSettings

    try:
        return TrainSettings(**{field: getattr(args, option) for option, field in SETTINGS.items()}, seed=seed)
    except ValueError as error:
        raise UsageError(str(error), None, "offramp train --help shows what is possible") from None


def _show(folder: str, seed: int, metrics: Any, as_json: bool) -> None:
    num_rows, scores = metrics.logits_KNC.shape[1], metrics.scores
    if as_json:
        emit({"run": folder, "seed": seed, "tune_rows": num_rows, "tune_scores": list(scores)})
        return
    rows = [(f"exit {number}", *percents(found).values()) for number, found in enumerate(scores, 1)]
    print(f"{folder}: the tune split, {num_rows} rows, in percent")
    print(table(("", *percents(scores[0])), rows), flush=True)


def _number(group: Any, name: str, kind: Any, default: Any, what: str) -> None:
    group.add_argument(name, type=kind, default=default, metavar="N", help=f"{what}(default: {default})")


def _seeds(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"whole numbers, each once, not {text!r}")
    return tuple(map(int, parts))
