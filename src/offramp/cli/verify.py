"""Check every byte of a store against its manifest. Exit code 4: a file is missing, damaged or not a plain file."""

import argparse

from offramp.cli.options import emit
from offramp.errors import DamagedError
from offramp.units import format_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of verify."""
    parser.add_argument("store")
    parser.add_argument("--json", action="store_true", help="print one JSON line per file")


def main(args: argparse.Namespace) -> None:
    """Verify a store. Raises DamagedError if any file is damaged."""
    from offramp.store import verify

    checks = []
    for check in verify(args.store):
        checks.append(check)
        if args.json:
            emit({"file": check.file, "bytes": check.bytes, "ok": check.problem is None, "problem": check.problem})
        elif check.problem is not None:
            print(f"{check.file}: {check.problem}")
    num_bad = sum(check.problem is not None for check in checks)
    if num_bad:
        what = f"{num_bad} of {len(checks)} files do not match the manifest"
        raise DamagedError(what, args.store, "divide the model again")
    if not args.json:
        print(f"{len(checks)} files, {format_size(sum(check.bytes for check in checks))}: all match the manifest")
