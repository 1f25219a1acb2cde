"""List the stages of a store in order, with the kind and the size of each shard."""

from __future__ import annotations

import argparse

from offramp.cli.options import emit, table


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of ls."""
    parser.add_argument("store")
    parser.add_argument("--json", action="store_true", help="one JSON line a shard")


def main(args: argparse.Namespace) -> int:
    """List."""
    from offramp.runtime.sizes import format_size
    from offramp.store import Store

    with Store(args.store, verify="never") as store:
        manifest = store.manifest
    uses = [
        (stage.name, step.kind, manifest.shards[name])
        for stage in manifest.stages
        for step in stage.steps
        for name in step.shards
    ]
    used = {shard.name for _, _, shard in uses}
    uses += [("-", "passed through", shard) for name, shard in manifest.shards.items() if name not in used]
    if args.json:
        for stage, kind, shard in uses:
            emit(
                {
                    "stage": stage,
                    "kind": kind,
                    "shard": shard.name,
                    "file": shard.file,
                    "bytes": shard.bytes,
                    "num_tensors": len(shard.tensors),
                }
            )
        return 0
    rows = [(stage, kind, shard.file, len(shard.tensors), format_size(shard.bytes)) for stage, kind, shard in uses]
    print(table(("stage", "kind", "file", "tensors", "size"), rows))
    exits = f"exits after layers 1 to {len(manifest.layers) - 1}" if manifest.exits else "no exits"
    head = manifest.encoder.problem or "no classification head"
    print(f"\n{manifest.source.architecture}, {head}, {exits}, graphs: {', '.join(manifest.graphs) or 'none'}")
    return 0
