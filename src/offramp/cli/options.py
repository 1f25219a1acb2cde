"""Options that several commands share, and the objects that they become.

The options of an engine are derived from the fields of `EngineConfig`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import UsageError
from offramp.units import parse_count, parse_duration, parse_size

if TYPE_CHECKING:
    from offramp.runtime.config import EngineConfig
    from offramp.session.inputs import InputSource
    from offramp.tasks.examples import Splits

TEXT_COLUMN = "sentence"
"""Default name of the text column of a labelled table."""


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Turn a parser that raises ValueError into a type for argparse, which shows the message of the error."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


size, count, duration = argument(parse_size), argument(parse_count), argument(parse_duration)


def add_engine(parser: Any, *names: str, omit: Sequence[str] = ()) -> None:
    """Add the options of `EngineConfig`: all but `omit`, or those called `names`."""
    from offramp.backends import BACKENDS
    from offramp.runtime.config import EngineConfig

    for each in fields(EngineConfig):
        facts = each.metadata
        if not facts["help"] or each.name in omit or (names and each.name not in names):
            continue
        choices = tuple(BACKENDS) if each.name == "backend" else facts["choices"]
        details = {"choices": choices} if choices else {"type": argument(facts["parse"]), "metavar": facts["metavar"]}
        option = "--" + each.name.replace("_", "-")
        parser.add_argument(option, default=each.default, help=facts["help"], **details)


def engine_config(args: argparse.Namespace, **more: Any) -> EngineConfig:
    """Return the options of `add_engine`, and `more`, for a process that serves this engine only."""
    from offramp.runtime.config import EngineConfig

    given = {each.name: getattr(args, each.name) for each in fields(EngineConfig) if hasattr(args, each.name)}
    return EngineConfig(**{**given, "own_process": True, **more})


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name inputs; `add_columns` adds the names of their columns."""
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text; may be given several times")
    parser.add_argument("--pair", action="append", nargs=2, metavar=("A", "B"), help="two texts that form one input")
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="FILE.txt, .tsv or .jsonl; - for one text per line on stdin; a file, folder or zip of images; .npz arrays",
    )


def input_source(args: argparse.Namespace) -> InputSource:
    """Return the inputs that `add_inputs` names, perhaps none. Raises UsageError for columns without a file."""
    from offramp.session.inputs import InputSource

    pairs = tuple((first, second) for first, second in args.pair or ())
    return InputSource(tuple(args.text or ()), pairs, args.input, args.text_column, args.pair_column)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add the names of text columns, in inputs and in labelled tables."""
    parser.add_argument(
        "--text-column", metavar="NAME", help=f"column of a table, or key of a .jsonl (with labels: {TEXT_COLUMN})"
    )
    parser.add_argument("--pair-column", metavar="NAME", help="column or key of the second text, if inputs are pairs")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options that name labelled data: a task of GLUE, or tables with the columns of `add_columns`."""
    group = parser.add_argument_group("data: a task of GLUE, or your own tables")
    group.add_argument("--task", metavar="NAME", help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli")
    group.add_argument("--data", metavar="DIR", help="GLUE's folders or zips (default: the hub)")
    group.add_argument(
        "--train",
        metavar="FILE",
        help="your table: .tsv, .csv, .jsonl or .parquet, a folder or zip of images, or .npz; it is split",
    )
    group.add_argument("--dev", metavar="FILE", help="a table for reporting only (default: a part of --train)")
    group.add_argument("--label-column", default="label", metavar="NAME", help="(default: label)")
    group.add_argument("--regression", action="store_true", help="the labels are numbers to predict")
    group.add_argument("--split-seed", type=int, default=0, metavar="N", help="seed of the split (default: 0)")
    parser.add_argument("--offline", action="store_true", help="read models and data of the hub from the cache only")


def labelled_data(args: argparse.Namespace, labels: Sequence[str] | None = None) -> Splits:
    """Return the splits that `add_data` names. `labels` are those of the model, if there is one; tables use them.

    Raises UsageError for contradictory options, and the errors of the loaders.
    """
    from offramp.session.inputs import has_images
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
    if own and all(has_images(path) for path in (args.train, args.dev) if path):
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
    """Return how the data were split. Equal values put each row into the same split."""
    return {"task": data.name, "split_seed": args.split_seed, "cuts_dev": data.cuts_dev}


def require_writable(path: str, suffixes: tuple[str, ...] = ()) -> None:
    """Raise UsageError for a file that cannot be written, before any work is done."""
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
    """Return the last line of every run: predicted peak, measured peak and budget."""
    from offramp.units import format_size

    keys = ("predicted_peak_bytes", "peak_rss_bytes", "budget_bytes")
    predicted, measured, budget = (format_size(record[key]) for key in keys)
    return f"predicted peak {predicted} / measured peak {measured} / budget {budget}"


def emit(tree: dict[str, Any]) -> None:
    """Print one JSON line on stdout and flush. Lone surrogates, which UTF-8 cannot encode, are escaped as in JSON."""
    line = json.dumps(tree, ensure_ascii=False, allow_nan=False)
    print(line.encode("utf-8", "backslashreplace").decode(), flush=True)


def log(message: str) -> None:
    """Print one line of progress on stderr."""
    print(message, file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print one warning on stderr."""
    log(f"offramp: warning: {message}")


def percents(scores: dict[str, float]) -> dict[str, str]:
    """Format scores for a table; the mean is omitted where there is only one metric."""
    shown = {name: f"{value:.1f}" for name, value in scores.items()}
    return {name: value for name, value in shown.items() if name != "score" or len(shown) > 2}


def table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Return a text table; the first column is aligned to the left, the others to the right."""
    lines = [tuple(str(cell) for cell in row) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
