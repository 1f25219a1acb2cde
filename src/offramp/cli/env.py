"""Show the versions and the hardware that published figures state."""

import argparse

from offramp.cli.options import emit


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of env."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> None:
    """Print the environment."""
    from offramp.measure.hardware import environment

    found = environment()
    if args.json:
        emit(found)
        return
    found.update(found.pop("library_versions"))
    print("\n".join(f"{name:<20} {value}" for name, value in found.items()))
