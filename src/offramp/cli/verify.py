"""Check every byte of a store against its manifest. Ends with 4 if a file is missing, damaged or not a plain file."""

from __future__ import annotations

import argparse

from offramp.cli.options import emit


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of verify."""
    parser.add_argument("store")
    parser.add_argument("--json", action="store_true", help="one JSON line a file")


def main(args: argparse.Namespace) -> int:
    """Verify."""
    from offramp.errors import DamagedError
    from offramp.store import verify

    checks = []
    for check in verify(args.store):
        checks.append(check)
        if args.json:
            emit({"file": check.file, "bytes": check.bytes, "ok": check.problem is None, "problem": check.problem})
        elif check.problem is not None:
            print(f"{check.file}: {check.problem}")
    bad = [check for check in checks if check.problem is not None]
    if bad:
        raise DamagedError(
            f"{len(bad)} of {len(checks)} files are not what the manifest says", args.store, "divide the model again"
        )
    if not args.json:
        print(f"{len(checks)} files, {sum(check.bytes for check in checks)} bytes: all as the manifest says")
    return 0
