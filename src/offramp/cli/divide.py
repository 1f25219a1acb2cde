"""Divide a model folder, or a model of the Hugging Face hub, into a store that runs layer by layer and that
transformers can still load, unless its matrices are stored as int8 or cut into blocks.

Text encoders of the BERT family are divided by the names of their tensors and run without PyTorch. Any other model of
transformers is divided by running it once, and runs in PyTorch with offramp.stream.
"""

import argparse
from pathlib import Path

from offramp.cli.options import emit, log, size
from offramp.errors import StoreError, UsageError
from offramp.units import format_size, named_size


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of divide."""
    add = parser.add_argument
    add("model", nargs="?", help="a checkpoint folder, or an id on the hub")
    add("store", help="the folder to create")
    add("--method", choices=("auto", "names", "eager", "export"), default="auto", help="(default: auto)")
    dtype = "dtype that matrices are stored in (default: fp32; fp16 for text encoders, int8 for all with graphs)"
    add("--dtype", choices=("fp32", "fp16", "int8"), default="fp32", help=dtype)
    add("--stage-bytes", type=size, metavar="SIZE", help="target size of the weights of a stage (default: one block)")
    block = "cut the products of a text encoder into blocks of at most SIZE of weights: for the smallest budgets"
    add("--block", type=size, metavar="SIZE", help=block)
    inputs = "example inputs by name, .npz or .safetensors (default: generated from the config)"
    add("--inputs", metavar="FILE", help=inputs)
    add("--force", action="store_true", help="replace an existing store")
    add("--offline", action="store_true", help="read models of the hub from the cache only")
    graphs = "offramp divide --graphs STORE: accepted as in earlier versions; stores of text encoders need no graphs"
    add("--graphs", action="store_true", help=graphs)
    add("--json", action="store_true", help="print one JSON line at the end")


def main(args: argparse.Namespace) -> None:
    """Divide a model, or say that a store needs no graphs."""
    from offramp.division import divide
    from offramp.division.config import LEAST_BLOCK_BYTES
    from offramp.runtime.footprint import tune_allocator
    from offramp.store.folders import retired_folders

    tune_allocator()  # weights are needed only briefly; an untuned heap keeps them, which raises the peak by half
    if (args.model is None) != args.graphs:
        raise UsageError("divide takes MODEL and STORE, or --graphs and STORE")
    if args.block is not None and args.block < LEAST_BLOCK_BYTES:
        what = f"blocks of {format_size(args.block)} would all stay in memory, as small shards do"
        raise UsageError(what, None, f"the smallest block is --block {named_size(LEAST_BLOCK_BYTES)}")
    if args.graphs:
        path = Path(args.store)
        _require_encoder(path)
        log("nothing to add: the graphs of text encoders are derived when the store is run")
    else:
        inputs = None
        if args.inputs:
            from offramp.division.checkpoints import load_inputs

            inputs = load_inputs(Path(args.inputs))
        options = {"method": args.method, "dtype": args.dtype, "stage_bytes": args.stage_bytes, "inputs": inputs}
        options["block_bytes"] = args.block
        path = divide(args.model, args.store, force=args.force, offline=args.offline, say=log, **options)
        for old in retired_folders(path):
            log(f"the store before is still being read; {old} keeps it until this store is divided again")
    if args.json:
        emit({"store": str(path)})
    else:
        log(f"store: {path}")


def _require_encoder(path: Path) -> None:
    """Raise StoreError for a store that was divided by a run: its graphs are written with it."""
    from offramp.program.program import CAPTURED
    from offramp.store import Store

    with Store(path, verify="never") as store:
        program, architecture = store.program, store.manifest.source.architecture
    if any(kernel.template == CAPTURED for kernel in program.kernels.values()) or not program.stages:
        what = f"this is the store of a {architecture} that was divided by a run"
        raise StoreError(what, path, "its graphs are written by divide --method export")
