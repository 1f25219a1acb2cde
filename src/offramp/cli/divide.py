"""Cut a model folder, or a model of the Hugging Face hub, into a store that runs layer by layer and that transformers
still loads.
"""

from __future__ import annotations

import argparse

from offramp.cli.options import emit, say


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of divide."""
    parser.add_argument("model", nargs="?", help="a checkpoint folder, or an id on the hub")
    parser.add_argument("store", help="the folder to make")
    parser.add_argument("--force", action="store_true", help="replace an existing store")
    parser.add_argument("--offline", action="store_true", help="take hub models from the cache alone")
    parser.add_argument(
        "--graphs",
        action="store_true",
        help="only add the graphs to a store that has none: offramp divide --graphs STORE",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line at the end")


def main(args: argparse.Namespace) -> int:
    """Divide."""
    from offramp.export import add_graphs, divide

    if (args.model is None) != args.graphs:
        from offramp.errors import UsageError

        raise UsageError("divide takes MODEL and STORE, or --graphs and STORE")
    path = (
        add_graphs(args.store)
        if args.graphs
        else divide(args.model, args.store, force=args.force, offline=args.offline, say=say)
    )
    if args.json:
        emit({"store": str(path)})
    else:
        say(f"store: {path}")
    return 0
