"""Show versions and hardware, as every published figure names them."""

from __future__ import annotations

import argparse

from offramp.cli.options import emit


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of env."""
    parser.add_argument("--json", action="store_true", help="one JSON object")


def main(args: argparse.Namespace) -> int:
    """Show the environment."""
    from offramp.measure.hardware import environment

    found = environment()
    if args.json:
        emit(found)
    else:
        found.update(found.pop("library_versions"))
        print("\n".join(f"{name:<20} {value}" for name, value in found.items()))
    return 0
