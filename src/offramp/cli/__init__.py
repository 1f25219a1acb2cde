"""The command line: one module per command, imported only when it is chosen, so that `--help` loads no NumPy.

It uses argparse instead of a larger library because `run` counts towards the budget that it keeps
(docs/decisions/0001).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import sys
import warnings
from typing import Any, NoReturn

from offramp import __version__
from offramp.backends import thread_variables
from offramp.errors import OfframpError, SystemNotice, UsageError, system_error

COMMANDS = {
    "divide": "divide a model folder into a store of shards",
    "ls": "list the stages and shards of a store",
    "verify": "check every byte of a store",
    "plan": "show what a budget keeps in memory, and the predicted peak",
    "run": "classify inputs under a memory budget",
    "memory": "draw the memory of a run over time",
    "profile": "measure the latency of every exit on this machine",
    "train": "fine-tune a model with an exit after each layer, on a task of GLUE or on your own table",
    "eval": "score every exit of a model or a store, and write transcripts",
    "tune": "find the exit policy for a latency, a loss or a deadline, with a certificate",
    "bench": "measure latency, peak memory and bytes read for several budgets",
    "sweep": "run the experiments of a recipe, and record them",
    "compare": "compare two results folders: faster, slower, or inconclusive",
    "report": "write the results of sweeps as one page, or as tables in Markdown, LaTeX or CSV",
    "demo": "train exits on real text, divide, and run under a budget",
    "env": "show versions and hardware",
}
NEEDS_NEWER_PYTHON = ("divide", "train", "eval", "tune", "bench", "sweep", "compare", "report", "demo")
"""Commands that need Python 3.10; the others run on 3.8, the Python of small devices."""
MOVED = {
    "bench": {"--save-profile": "offramp profile STORE --out FILE"},
    "profile": {"--passes": "offramp memory STORE --passes N", "--trace": "offramp memory STORE --trace FILE"},
}
"""Command -> option of earlier versions -> its replacement."""


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, as all commands do."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        print(f"offramp: error: {message} - see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.platform == "win32":
        print("offramp: error: Windows is not supported - run it on Linux, or in WSL", file=sys.stderr)
        return 1
    debug = "--debug" in argv
    _prepare_output()
    try:
        with warnings.catch_warnings():
            _print_notices()
            code = _dispatch([word for word in argv if word != "--debug"])
        print(end="", flush=True)  # report a full disk now, not when the interpreter ends; stdout may be None
        return code
    except OfframpError as error:
        return _fail(error, str(error), error.exit_code, debug)
    except BrokenPipeError:  # the reader of the output has closed the pipe
        _drop_output()
        return 0
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", 130, debug)
    except Exception as error:
        found = system_error(error)
        if found is not None:
            return _fail(error, str(found), found.exit_code, debug)
        what = f"{type(error).__name__}: {error} - internal error - run again with --debug and report it"
        return _fail(error, what, 1, debug)


def _prepare_output() -> None:
    """Let letters that the encoding of a terminal does not have be printed as escapes.

    Standard descriptors that are closed lead to /dev/null: the next file would get their number, and the messages that
    a library prints.
    """
    for descriptor in range(3):
        with contextlib.suppress(OSError):  # a system without /dev/null
            if not _is_open(descriptor):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            if descriptor == 2 and sys.stderr is None:  # `print` takes None as stdout
                sys.stderr = open(descriptor, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _print_notices() -> None:
    """Print notices about this system as other warnings of the command line, one line each."""
    show = warnings.showwarning

    def print_notice(message: Any, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, SystemNotice):
            print(f"offramp: warning: {message}", file=sys.stderr, flush=True)
        else:
            show(message, category, *rest)

    warnings.showwarning = print_notice


def _drop_output() -> None:
    """Discard the buffer of stdout, which cannot be written; the interpreter would try again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: BaseException, message: str, exit_code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(type(error), error, error.__traceback__)
    try:
        print(end="", flush=True)
    except OSError:  # the error below occurred first
        _drop_output()
    with contextlib.suppress(OSError):  # stderr may be full or closed; the exit code remains
        print("offramp: error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return exit_code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"offramp {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        Parser(prog="offramp").error(f"unknown command {argv[0]!r}, known: {', '.join(COMMANDS)}")
    _require_current(argv)
    command = importlib.import_module(f"offramp.cli.{argv[0]}")
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=f"offramp {argv[0]}", description=command.__doc__, formatter_class=form)
    command.configure(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    try:
        args = parser.parse_args(argv[1:])
        for name, value in vars(args).items():
            if value == "" and not name.endswith("_column"):
                parser.error(f"argument {name} is empty")
    except SystemExit as stop:  # --help, or an error that is printed already; `main` still flushes
        return int(stop.code or 0)
    if getattr(args, "backend", None):
        from offramp.measure import default_threads

        num_threads = args.threads or default_threads().number
        os.environ.update(thread_variables(args.backend, num_threads))  # NumPy is not imported yet
    command.main(args)
    return 0


def _require_current(argv: list[str]) -> None:
    """Raise UsageError for a command that needs a newer Python, and for an option of an earlier version."""
    if argv[0] in NEEDS_NEWER_PYTHON and sys.version_info < (3, 10):
        python = ".".join(map(str, sys.version_info[:3]))
        raise UsageError(f"offramp {argv[0]} needs Python 3.10 or newer", f"this is {python}", "use a newer Python")
    for option, replacement in MOVED.get(argv[0], {}).items():
        if any(word == option or word.startswith(option + "=") for word in argv[1:]):
            raise UsageError(f"offramp {argv[0]} has no {option} any more", None, f"use {replacement}")


def _overview() -> str:
    commands = "\n".join(f"  {name:<8} {what}" for name, what in COMMANDS.items())
    return (
        "usage: offramp COMMAND ... [--json] [--debug]\n\n"
        "Run a model that does not fit in memory: load each layer just in time under a byte budget,\n"
        "and stop at the first exit that is confident.\n\n"
        f"{commands}\n\n"
        "offramp COMMAND --help shows the options. Exit codes: 0 success, 1 internal error or a missing library,\n"
        "2 usage, 3 impossible budget, 4 damaged or refused, 5 disk full, 130 interrupted."
    )
