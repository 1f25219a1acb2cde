"""Options that several commands share, and the objects that they become.

The options of an engine are derived from the fields of `EngineConfig`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.errors import UsageError, escaped
from offramp.program.program import REGRESSION
from offramp.units import format_size, parse_count, parse_duration, parse_size

if TYPE_CHECKING:
    from offramp.runtime.config import EngineConfig
    from offramp.session.inputs import InputSource
    from offramp.tasks import Splits


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Turn a parser that raises ValueError into a type for argparse, which shows the message of the error."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


class _Once(argparse.Action):
    """An option that is refused if it is given twice; argparse would keep the last, and drop data without a word."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if getattr(namespace, self.dest) is not self.default:
            if self.dest == "exit":
                raise argparse.ArgumentError(self, "given twice: combine policies with | or &")
            raise argparse.ArgumentError(self, "given twice: name one file")
        setattr(namespace, self.dest, values)


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
        details["action"] = _Once if each.name == "exit" else "store"
        if each.default is False:
            details = {"action": "store_true"}
        parser.add_argument("--" + each.name.replace("_", "-"), default=each.default, help=facts["help"], **details)


def engine_config(args: argparse.Namespace, **more: Any) -> EngineConfig:
    """Return the options of `add_engine`, and `more`, for a process that serves this engine only."""
    from offramp.runtime.config import EngineConfig

    given = {each.name: getattr(args, each.name) for each in fields(EngineConfig) if hasattr(args, each.name)}
    return EngineConfig(**{**given, "own_process": True, **more})


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that name inputs; `add_columns` adds the names of their columns."""
    add = parser.add_argument
    file = "FILE.txt, .tsv, .csv, .jsonl or .parquet; - for stdin; a file, folder or zip of images; .npz arrays"
    add("--text", action="append", type=_utf8, metavar="TEXT", help="a text; may be given several times")
    add("--pair", action="append", nargs=2, type=_utf8, metavar=("A", "B"), help="two texts that form one input")
    add("--input", action=_Once, metavar="FILE", help=file)


def _utf8(word: str) -> str:
    """Return an argument as UTF-8, also where the locale is another: ASCII would leave its bytes undecoded."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:  # not UTF-8, or not the bytes of an argument
        return word


def input_source(args: argparse.Namespace) -> InputSource:
    """Return the inputs that `add_inputs` names, perhaps none. Raises UsageError for columns without a file."""
    from offramp.session.inputs import InputSource

    pairs = tuple((first, second) for first, second in args.pair or ())
    columns = args.text_column, args.pair_column
    return InputSource(tuple(args.text or ()), pairs, args.input, *columns, args.input_format, args.header, args.quotes)


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Add the names of text columns, and how a table is written: of inputs and of labelled tables alike."""
    add, yes_or_no = parser.add_argument, {"type": argument(_parse_choice), "metavar": "yes|no"}
    formats = ("txt", "tsv", "csv", "jsonl", "parquet")
    header = "whether the first line names the columns; without a header they are 1, 2, ... (default: a reported guess)"
    quotes = "whether fields of a .tsv are in double quotes (default: the first lines tell)"
    add("--text-column", metavar="NAME", help="column of the text (default: sentence, or text)")
    add("--pair-column", metavar="NAME", help="column of the second text of a pair (default: pair, if there is one)")
    add("--input-format", choices=formats, help="format of a file whose name does not tell it (stdin: txt)")
    add("--header", help=header, **yes_or_no)
    add("--quotes", help=quotes, **yes_or_no)


def _parse_choice(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"yes or no, not {text!r}")
    return text == "yes"


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options of `tasks.DataSpec`, beside the columns that `add_columns` names."""
    add = parser.add_argument_group("data: a task of GLUE, or your own tables").add_argument
    train = "your data, cut into parts: .tsv, .csv, .jsonl or .parquet, a folder or zip of images, or .npz"
    add("--task", metavar="NAME", help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli")
    add("--data", metavar="DIR", help="GLUE's folders or zips (default: the hub)")
    add("--train", action=_Once, metavar="FILE", help=train)
    add("--dev", action=_Once, metavar="FILE", help="data that are only reported (default: a part of --train)")
    add("--label-column", default="label", metavar="NAME", help="(default: label)")
    add("--regression", action="store_true", help="labels are numbers to be predicted")
    add("--split-seed", type=int, default=0, metavar="N", help="seed of the cutting (default: 0)")
    parser.add_argument("--offline", action="store_true", help="read models and data of the hub from the cache only")


def add_training_rows(parser: argparse.ArgumentParser) -> None:
    """Add the option to evaluate rows that the model was trained on."""
    what = "also evaluate rows that were trained on (default: left out, and refused where they are many)"
    parser.add_argument("--include-training-rows", action="store_true", help=what)


def labelled_data(args: argparse.Namespace, problem: str | None = None, labels: Sequence[str] | None = None) -> Splits:
    """Load the data that `add_data` and `add_columns` name, and warn of the parts that have no score.

    `problem` and `labels` are those of the model, where one is given. Raises UsageError for options that contradict
    each other, and the errors of `tasks.load`.
    """
    from offramp.tasks import DataSpec, load

    is_regression = args.regression or problem == REGRESSION or (labels is not None and not labels)
    names = ("task", "data", "train", "dev", "text_column", "pair_column", "label_column", "header", "quotes")
    own_labels = None if is_regression or labels is None else tuple(labels)
    options = {name: getattr(args, name) for name in (*names, "split_seed", "offline")}
    data = load(DataSpec(**options, format=args.input_format, labels=own_labels, regression=is_regression), log)
    for sentence in data.partial:
        warn(f"no score of {data.name}: {sentence}")
    return data


def data_record(args: argparse.Namespace, data: Splits) -> dict[str, Any]:
    """Return how the data were cut. Equal records assign an example to the same split."""
    return {"task": data.name, "split_seed": args.split_seed, "cuts_dev": data.cuts_dev}


def require_writable(path: str, suffixes: tuple[str, ...] = (), *, atomic: bool = False) -> None:
    """Raise UsageError or OSError for a file that cannot be written, before any work is done.

    `atomic`: the file will be replaced by one that is written beside it. What is replaced, or has one of `suffixes`,
    must be a regular file.
    """
    target = Path(os.path.realpath(path) if atomic else path)
    if suffixes and Path(path).suffix.lower() not in suffixes:
        what = f"cannot write a {Path(path).suffix or 'file without a suffix'}"
        raise UsageError(what, path, f"use {' or '.join(suffixes)}")
    if target.is_dir() or not target.parent.is_dir():
        what = "is a folder" if target.is_dir() else "no such folder"
        raise UsageError(what, path, "name a file in a folder that exists")
    is_new = not os.path.lexists(target)
    exists = not is_new if atomic else bool(suffixes) and target.exists()
    if exists and not target.is_file():
        raise UsageError("is a pipe, a device or a folder", target, "name another file")
    if atomic:
        from offramp.store.files import NewFile

        with NewFile(target):
            pass
    if target.is_file() or (is_new and not atomic):  # opening a pipe would wait for its reader
        with open(target, "ab"):
            pass
    if is_new and not atomic:
        target.unlink()


def require_apart(outputs: Mapping[str, str | None], inputs: Mapping[str, str | None]) -> None:
    """Raise UsageError for a file, by the option that names it, that would replace an input or another output."""
    taken = {os.path.realpath(path): name for name, path in inputs.items() if path and path != "-"}
    for name, path in outputs.items():
        if not path:
            continue
        other = taken.setdefault(os.path.realpath(path), name)
        if other != name and not Path(path).is_char_device():  # /dev/null takes all
            raise UsageError(f"{name} and {other} are the same file", path, "name another file")


def peak_line(record: dict[str, Any]) -> str:
    """Return the last line of a run: predicted peak, measured peak and the limit that was kept."""
    predicted, measured = format_size(record["predicted_peak_bytes"]), format_size(record["peak_rss_bytes"])
    limit = f"{record['limited_by']} {format_size(record['budget_bytes'])}"
    return f"predicted peak {predicted} / measured peak {measured} / {limit}"


def emit(tree: dict[str, Any]) -> None:
    """Print one JSON line on stdout and flush. What is not printable, or not in its encoding, is escaped as in JSON."""
    line = json.dumps(tree, ensure_ascii=False, allow_nan=False)
    if not line.isprintable():  # JSON itself escapes the first 32 characters only
        line = "".join(each if each.isprintable() else _json_escape(each) for each in line)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(tree, allow_nan=False)
    print(line, flush=True)


def _json_escape(letter: str) -> str:
    units = letter.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2))


def log(message: str) -> None:
    """Print one line of progress on stderr. It may quote names from files of anybody."""
    print(escaped(message), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """Print one warning on stderr."""
    log(f"offramp: warning: {message}")


def percents(scores: dict[str, float]) -> dict[str, str]:
    """Format scores for a table; the mean is omitted where there is only one metric."""
    shown = {name: f"{value:.1f}" for name, value in scores.items()}
    return {name: value for name, value in shown.items() if name != "score" or len(shown) > 2}


def table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Return a text table; the first column is aligned to the left, the others to the right."""
    lines = [tuple(escaped(str(cell)) for cell in row) for row in (head, *rows)]
    first, *others = (max(map(len, column)) for column in zip(*lines))
    form = "  ".join([f"{{:<{first}}}", *(f"{{:>{width}}}" for width in others)])
    return "\n".join(form.format(*line).rstrip() for line in lines)


def _markdown(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Return a table in Markdown; the first column is aligned to the left, the others to the right."""
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _csv(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Return comma-separated values with a header."""
    import csv
    import io

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue().rstrip("\n")


TABLES = {"table": table, "md": _markdown, "csv": _csv}
"""Format -> function that returns a table from its heading and its rows."""


def table_of(items: Iterable[Any], columns: Mapping[str, Callable[[Any], object]]) -> str:
    """Return a text table with a row per item; `columns` maps each heading to the function of its cells."""
    return table(tuple(columns), [tuple(cell(item) for cell in columns.values()) for item in items])
