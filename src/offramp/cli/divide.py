"""Cut a model folder, or a model of the Hugging Face hub, into a store that runs layer by layer and that transformers
still loads.

Encoders of texts of the BERT family are divided by the names of their tensors and run without PyTorch. Any other model
that transformers has is divided by a run of it, and runs in PyTorch by offramp.stream.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from offramp.cli.options import emit, say, size


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of divide."""
    parser.add_argument("model", nargs="?", help="a checkpoint folder, or an id on the hub")
    parser.add_argument("store", help="the folder to make")
    parser.add_argument(
        "--method", choices=("auto", "names", "eager", "export"), default="auto", help="(default: auto)"
    )
    parser.add_argument(
        "--stage-bytes", type=size, metavar="SIZE", help="the most that a stage should need (default: one block)"
    )
    parser.add_argument(
        "--inputs",
        metavar="FILE",
        help="example inputs by name, .npz or .safetensors (default: made up from the config)",
    )
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
    from offramp.division import add_graphs, divide
    from offramp.runtime import tune_allocator

    tune_allocator()  # weights only pass through: a heap that keeps them makes the peak half as high again
    if (args.model is None) != args.graphs:
        from offramp.errors import UsageError

        raise UsageError("divide takes MODEL and STORE, or --graphs and STORE")
    if args.graphs:
        path = add_graphs(args.store)
    else:
        inputs = None
        if args.inputs:
            from offramp.division.checkpoints import load_inputs

            inputs = load_inputs(Path(args.inputs))
        options = {"method": args.method, "stage_bytes": args.stage_bytes, "inputs": inputs}
        path = divide(args.model, args.store, force=args.force, offline=args.offline, say=say, **options)
    if args.json:
        emit({"store": str(path)})
    else:
        say(f"store: {path}")
    return 0
