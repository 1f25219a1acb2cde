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
    from offramp.tasks.examples import Splits

ENGINE = ("exit", "deadline", "profile", "backend", "threads", "batch", "max_length", "reads", "verify")
"""The options that `add_engine` takes, by their names in `offramp.prepare`."""
TEXT_COLUMN = "sentence"
"""Of a labelled table, unless another is named."""


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
        "--text-column", metavar="NAME", help=f"column of a table, or key of a .jsonl (with labels: {TEXT_COLUMN})"
    )
    parser.add_argument("--pair-column", metavar="NAME", help="the second text's column or key, if there are pairs")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Where labelled texts come from: a task of GLUE, or anyone's own tables, with the columns of `add_columns`."""
    group = parser.add_argument_group("data: a task of GLUE, or your own tables")
    group.add_argument("--task", metavar="NAME", help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli")
    group.add_argument("--data", metavar="DIR", help="GLUE's folders or zips (default: the hub)")
    group.add_argument(
        "--train",
        metavar="FILE",
        help="your table: .tsv, .csv, .jsonl or .parquet, a folder or zip of images, or .npz; it is cut in parts",
    )
    group.add_argument("--dev", metavar="FILE", help="a table that is only reported (default: a part of --train)")
    group.add_argument("--label-column", default="label", metavar="NAME", help="(default: label)")
    group.add_argument("--regression", action="store_true", help="labels are numbers to be predicted")
    group.add_argument("--split-seed", type=int, default=0, metavar="N", help="of the cutting (default: 0)")
    parser.add_argument("--offline", action="store_true", help="take models and data of the hub from the cache alone")


def labelled_data(args: argparse.Namespace, labels: Sequence[str] | None = None) -> Splits:
    """The splits that `add_data` names. `labels`: of the model, where one is given, for tables of one's own.

    Raises UsageError for options that contradict each other, and as the loaders do.
    """
    from offramp.tasks.glue import load_glue, task_of
    from offramp.tasks.hub import load_hub
    from offramp.tasks.own import Columns, load_own

    own = args.train or args.dev
    if bool(args.task) == bool(own):
        what = "both a task and a table" if own else "no data"
        raise UsageError(what, None, "give --task NAME, or --train FILE with --text-column and --label-column")
    if own and all(path.endswith(".npz") for path in (args.train, args.dev) if path):
        from offramp.tasks.arrays import load_arrays

        paths = [Path(path) if path else None for path in (args.train, args.dev)]
        return load_arrays(paths[0], paths[1], args.label_column, () if args.regression else labels, args.split_seed)
    if own and all(_has_images(path) for path in (args.train, args.dev) if path):
        from offramp.tasks.images import load_images

        if args.regression or labels == ():
            raise UsageError("folders of images are classes, and this is a regression", own, "take a classifier")
        if args.text_column or args.pair_column or args.data:
            what = "--text-column, --pair-column and --data are for texts, the data are images"
            raise UsageError(what, own, "leave them out")
        paths = [Path(path) if path else None for path in (args.train, args.dev)]
        return load_images(paths[0], paths[1], labels, args.split_seed)
    if own:
        if args.data:
            raise UsageError("--data is a folder of GLUE", None, "give --task NAME with it, or --train FILE alone")
        columns = Columns(args.text_column or TEXT_COLUMN, args.label_column, args.pair_column)
        paths = [Path(path) if path else None for path in (args.train, args.dev)]
        return load_own(paths[0], paths[1], columns, () if args.regression else labels, args.split_seed)
    task = task_of(args.task)
    if args.data:
        return load_glue(task, Path(args.data), args.split_seed)
    return load_hub(task, args.split_seed, offline=args.offline)


def data_record(args: argparse.Namespace, data: Splits) -> dict[str, Any]:
    """How the splits were cut: what must be equal for a row to be in the same one."""
    return {"task": data.name, "split_seed": args.split_seed, "cuts_dev": data.cuts_dev}


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `offramp.prepare` for a process that is there for one store."""
    return {**{name: getattr(args, name) for name in ENGINE}, "own_process": True, "warn": warn}


def has_inputs(args: argparse.Namespace) -> bool:
    """Whether any input was named. Raises UsageError for columns of no file."""
    if (args.text_column or args.pair_column) and not args.input:
        raise UsageError("--text-column and --pair-column name columns of a file", None, "give --input FILE")
    return bool(args.text or args.pair or args.input)


def inputs(args: argparse.Namespace) -> Iterable[Any]:
    """The texts, in the order: --text, --pair, --input. A fresh iterator at each call, as long as it is not stdin."""
    from offramp.tasks.inputs import read_inputs

    yield from args.text or ()
    yield from (tuple(pair) for pair in args.pair or ())
    if args.input and _has_images(args.input):
        from offramp.tasks.images import images_at

        yield from images_at(Path(args.input))
    elif args.input and args.input.endswith(".npz"):
        from offramp.tasks.arrays import records_at

        yield from records_at(Path(args.input))
    elif args.input:
        yield from read_inputs(args.input, args.text_column, args.pair_column)


def _has_images(source: str) -> bool:
    """Whether it is a folder, a zip or an image, and no file of texts."""
    from offramp.tasks.images import SUFFIXES

    return source != "-" and (Path(source).is_dir() or source.lower().endswith((".zip", *SUFFIXES)))


def known_inputs(args: argparse.Namespace) -> Iterable[Any] | None:
    """The texts if they can be read twice, so that the plan may look at them first."""
    return (
        None
        if args.input == "-" or (args.input and not (Path(args.input).is_file() or Path(args.input).is_dir()))
        else inputs(args)
    )


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
