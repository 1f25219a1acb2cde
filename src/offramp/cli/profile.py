"""Measure the device profile of a store: the latency of every exit on this machine, for `--profile` of tune and run.

offramp profile STORE --budget 128MiB --out profile.json
"""

import argparse
from pathlib import Path

from offramp.cli.options import add_engine, emit, engine_config, log, require_writable, table
from offramp.errors import UsageError
from offramp.units import format_duration


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of profile."""
    parser.add_argument("store")
    parser.add_argument("--out", metavar="FILE.json", help="device profile to write")
    add_engine(parser, omit=("exit", "deadline", "profile"))
    parser.add_argument("--json", action="store_true", help="print the profile as one JSON line")


def main(args: argparse.Namespace) -> None:
    """Measure the profile in a process of its own and write it."""
    if args.out is None:
        remedy = "give --out profile.json; the memory of a run is drawn by offramp memory STORE"
        raise UsageError("no file for the device profile", None, remedy)
    if args.out.endswith((".svg", ".png")):
        raise UsageError("profile measures a device profile", args.out, f"offramp memory STORE --out {args.out} draws")
    require_writable(args.out, (".json",), atomic=True)
    from offramp.experiments.children import run_worker
    from offramp.experiments.jobs import WorkerJob
    from offramp.runtime.profile import profile_from_json, save_profile

    tree = run_worker(WorkerJob("profile", args.store, engine_config(args)), log)
    profile = profile_from_json(tree, args.out)
    save_profile(profile, Path(args.out))
    if args.json:
        emit(tree)
        return
    rows = [
        (length, *(format_duration(seconds / profile.batch) for seconds in row))
        for length, row in zip(profile.lengths, profile.seconds)
    ]
    print(table(("tokens", *(f"exit {number}" for number in range(1, profile.num_exits + 1))), rows))
    if profile.batch > 1:
        print(f"per input, for passes of {profile.batch} rows")
