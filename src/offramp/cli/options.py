"""Options that several commands share, and what they turn into."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.backends import BACKENDS
from offramp.errors import UsageError

if TYPE_CHECKING:
    from offramp.tasks import Splits

ENGINE = ("exit", "deadline", "profile", "backend", "threads", "batch", "max_length", "reads", "verify")
"""The options that `add_engine` takes, by their names in `offramp.prepare`."""


def size(text: str) -> int:
    """A byte size, for argparse."""
    from offramp.units import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """An integer of at least 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text!r}")
    return int(text)


def batch_size(text: str) -> int | str:
    """A number of rows, or `bulk`, for argparse."""
    return text if text == "bulk" else count(text)


def duration(text: str) -> float:
    """Seconds, for argparse."""
    from offramp.units import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_engine(parser: argparse.ArgumentParser) -> None:
    """What decides how a store runs."""
    parser.add_argument(
        "--exit",
        default="none",
        metavar="POLICY",
        help="none, stage:K, patience:P, confidence:T, ... joined by | and &, or a policy file (default: none)",
    )
    parser.add_argument(
        "--deadline", type=duration, metavar="TIME", help="of each request, like 60ms: the best answer so far goes out"
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="what bench --save-profile measured: for a deadline (default: learn it), and for index policies",
    )
    parser.add_argument(
        "--backend", choices=tuple(BACKENDS), default="ort", help="the compute backend (default: ort, ONNX Runtime)"
    )
    parser.add_argument("--threads", type=count, metavar="N", help="threads of the backend (default: the processors)")
    parser.add_argument(
        "--batch", type=batch_size, default=1, metavar="N",
        help="rows that run together; bulk: as many as the budget holds, by length (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--max-length", type=count, metavar="N", help="cut texts to N tokens (default: what the model reads)"
    )
    parser.add_argument(
        "--reads",
        choices=("auto", "direct", "buffered"),
        default="auto",
        help="O_DIRECT or through the page cache (default: auto)",
    )
    parser.add_argument(
        "--verify",
        choices=("first", "always", "never"),
        default="first",
        help="when shards are hashed (default: first)",
    )


def add_budget(parser: Any) -> None:
    """The one option that everything is about."""
    parser.add_argument(
        "--budget",
        type=size,
        metavar="SIZE",
        help="of the whole process: 128MiB, 0.3GB (default: what the machine allows)",
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Where texts come from; `add_columns` says what their columns are called."""
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text; may be given several times")
    parser.add_argument("--pair", action="append", nargs=2, metavar=("A", "B"), help="two texts that are read together")
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="FILE.txt, .tsv or .jsonl, - for a text a line on stdin; a file, folder or zip of images; .npz of arrays",
    )


def add_columns(parser: argparse.ArgumentParser) -> None:
    """What the columns of texts are called, in inputs and in labelled tables alike."""
    parser.add_argument(
        "--text-column", metavar="NAME", help="column of a table, or key of a .jsonl (with labels: sentence)"
    )
    parser.add_argument("--pair-column", metavar="NAME", help="the second text's column or key, if there are pairs")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tasks.DataSpec`, beside the columns that `add_columns` names."""
    group = parser.add_argument_group("data: a task of GLUE, or your own tables")
    group.add_argument("--task", metavar="NAME", help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli")
    group.add_argument("--data", metavar="DIR", help="GLUE's folders or zips (default: the hub)")
    group.add_argument(
        "--train",
        metavar="FILE",
        help="your data, cut into parts: .tsv, .csv, .jsonl or .parquet, a folder or zip of images, or .npz",
    )
    group.add_argument("--dev", metavar="FILE", help="data that are only reported (default: a part of --train)")
    group.add_argument("--label-column", default="label", metavar="NAME", help="(default: label)")
    group.add_argument("--regression", action="store_true", help="labels are numbers to be predicted")
    group.add_argument("--split-seed", type=int, default=0, metavar="N", help="seed of the cutting (default: 0)")
    parser.add_argument("--offline", action="store_true", help="read models and data of the hub from the cache only")


def labelled_data(args: argparse.Namespace, labels: Sequence[str] | None = None) -> Splits:
    """Load the data that `add_data` and `add_columns` name.

    `labels` are those of the model, where one is given: () for a regression. Raises UsageError for options that
    contradict each other, and the errors of `tasks.load`.
    """
    from offramp.tasks import DataSpec, load

    is_regression = args.regression or (labels is not None and not labels)
    names = ("task", "data", "train", "dev", "text_column", "pair_column", "label_column", "split_seed", "offline")
    options = {name: getattr(args, name) for name in names}
    own_labels = None if is_regression or labels is None else tuple(labels)
    return load(DataSpec(**options, labels=own_labels, regression=is_regression))


def data_record(args: argparse.Namespace, data: Splits) -> dict[str, Any]:
    """Return how the data were cut. Equal records assign an example to the same split."""
    return {"task": data.name, "split_seed": args.split_seed, "cuts_dev": data.cuts_dev}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `offramp.prepare` for a process that is there for one store."""
    return {**{name: getattr(args, name) for name in ENGINE}, "own_process": True, "warn": warn}


def has_inputs(args: argparse.Namespace) -> bool:
    """Return whether any input was given. Raises UsageError for column names without a file."""
    if (args.text_column or args.pair_column) and not args.input:
        raise UsageError("--text-column and --pair-column name columns of a file", None, "give --input FILE")
    return bool(args.text or args.pair or args.input)


def inputs(args: argparse.Namespace) -> Iterable[Any]:
    """Yield the inputs in the order --text, --pair, --input."""
    yield from args.text or ()
    yield from (tuple(pair) for pair in args.pair or ())
    if args.input:
        from offramp.tasks import read_inputs

        yield from read_inputs(args.input, args.text_column, args.pair_column)


def known_inputs(args: argparse.Namespace) -> Iterable[Any] | None:
    """Return the inputs, for the planner, if they can be read a second time; None for standard input and for pipes."""
    if args.input and not (Path(args.input).is_file() or Path(args.input).is_dir()):
        return None
    return inputs(args)


def require_writable(path: str, suffixes: tuple[str, ...] = ()) -> None:
    """Raise UsageError, before any work is done, for a file that could not be written in the end."""
    target = Path(path)
    if suffixes and target.suffix not in suffixes:
        raise UsageError(
            f"cannot write a {target.suffix or 'file without a suffix'}", path, f"use {' or '.join(suffixes)}"
        )
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(
            "is a folder" if target.is_dir() else "no such folder", path, "name a file in a folder that exists"
        )


def peak_line(record: dict[str, Any]) -> str:
    """How every run ends."""
    from offramp.units import format_size

    keys = ("predicted_peak_bytes", "peak_rss_bytes", "budget_bytes")
    predicted, measured, budget = (format_size(record[key]) for key in keys)
    return f"predicted peak {predicted} / measured peak {measured} / budget {budget}"


def emit(tree: dict[str, Any]) -> None:
    """One JSON line on stdout, at once. UTF-8 has no lone surrogates; a backslash makes of them what JSON does."""
    line = json.dumps(tree, ensure_ascii=False, allow_nan=False)
    print(line.encode("utf-8", "backslashreplace").decode(), flush=True)


def say(message: str) -> None:
    """One line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """One line about something that the user may not want."""
    say(f"offramp: warning: {message}")


def percents(scores: dict[str, float]) -> dict[str, str]:
    """Scores for a table; the mean of one metric is not said twice."""
    shown = {name: f"{value:.1f}" for name, value in scores.items()}
    return {name: value for name, value in shown.items() if name != "score" or len(shown) > 2}


def table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Columns of text; the first is aligned to the left, the others to the right."""
    lines = [tuple(str(cell) for cell in row) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
