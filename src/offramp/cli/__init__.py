"""argv, progress, exit codes. The one list of commands; only the chosen one is imported, so that `--help` costs no
NumPy.

argparse and not a larger library: `run` counts itself towards the budget that it keeps (docs/decisions/0001).
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from typing import NoReturn

from offramp import __version__
from offramp.backends import thread_variables
from offramp.errors import OfframpError

COMMANDS = {
    "divide": "cut a model folder into a store, one file for each third of a layer",
    "ls": "list the stages and shards of a store",
    "verify": "check every byte of a store",
    "plan": "say what a budget would keep in memory, and the peak that follows",
    "run": "classify texts under a budget",
    "profile": "draw the memory of a run over time",
    "train": "fine-tune a model with an exit after each layer, on a task of GLUE or on your own table",
    "eval": "score every exit of a model or a store, and keep what they say",
    "tune": "find the exit policy for a latency, a loss or a deadline, with a certificate",
    "bench": "measure latency, peak and bytes read for several budgets",
    "demo": "train exits on real text, divide, and run under a budget",
    "env": "show versions and hardware",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all errors of offramp."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        print(f"offramp: error: {message} - {self.prog} --help shows how", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.platform == "win32":
        print("offramp: error: Windows is not supported - run it on Linux, or in WSL", file=sys.stderr)
        return 1
    debug = "--debug" in argv
    try:
        code = _dispatch([word for word in argv if word != "--debug"])
        print(end="", flush=True)  # a full disk must show now, not when the interpreter ends; stdout may be None
        return code
    except OfframpError as error:
        return _fail(error, str(error), error.exit_code, debug)
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say
        _drop_output()
        return 0
    except KeyboardInterrupt as error:
        return _fail(error, "interrupted", 130, debug)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_output()
            return _fail(error, "no space left for the output - free some space and run again", 5, debug)
        return _fail(
            error,
            f"{type(error).__name__}: {error} - this is a fault of ours - run again with --debug and report it",
            1,
            debug,
        )


def _drop_output() -> None:
    """What is still in the buffer of stdout has nowhere to go; the interpreter would try once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: BaseException, message: str, exit_code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    try:
        print(end="", flush=True)
    except OSError:  # the error that is told came first
        _drop_output()
    print("offramp: error: " + " ".join(message.split()), file=sys.stderr)
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
    command = importlib.import_module(f"offramp.cli.{argv[0]}")
    parser = Parser(
        prog=f"offramp {argv[0]}", description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.configure(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    try:
        args = parser.parse_args(argv[1:])
    except SystemExit as stop:  # --help, or an error that was told: `main` has yet to flush
        return int(stop.code or 0)
    if getattr(args, "threads", None):
        os.environ.update(thread_variables(args.backend, args.threads))  # NumPy is not imported yet
    return command.main(args)


def _overview() -> str:
    commands = "\n".join(f"  {name:<8} {what}" for name, what in COMMANDS.items())
    return (
        "usage: offramp COMMAND ... [--json] [--debug]\n\n"
        "Run a model that does not fit in memory: each layer just in time under a byte budget,\n"
        "and out at the first exit that is sure.\n\n"
        f"{commands}\n\n"
        "offramp COMMAND --help says more. Exit codes: 0 ok, 1 our fault, 2 usage, 3 budget impossible,\n"
        "4 damaged or refused, 5 disk full, 130 Ctrl-C."
    )
