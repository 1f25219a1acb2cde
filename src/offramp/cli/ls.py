"""List the stages of a store in order with the kind and size of each shard; for a divided module also the start and the
inputs of each stage. --graph draws them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from offramp.cli.options import emit, log, require_writable, table
from offramp.errors import shown


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ls."""
    parser.add_argument("store")
    parser.add_argument(
        "--graph", metavar="FILE.svg", help="draw the stages, the values between them, and shared weights"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line per shard")


def main(args: argparse.Namespace) -> int:
    """List the stages and shards."""
    from offramp.store import Store
    from offramp.store.manifest import Manifest

    if args.graph:
        require_writable(args.graph, (".svg",))
    with Store(args.store, verify="never") as store:
        contents = store.contents
    begins = {} if isinstance(contents, Manifest) else _begins(contents)
    uses = [
        (stage.name, step.kind, contents.shards[name])
        for stage in contents.stages
        for step in stage.steps
        for name in step.shards
    ]
    used = {shard.name for _, _, shard in uses}
    uses += [("-", "passed through", shard) for name, shard in contents.shards.items() if name not in used]
    if args.json:
        for stage, kind, shard in uses:
            line = {"stage": stage, "kind": kind, "shard": shard.name, "file": shard.file, "bytes": shard.bytes}
            emit({**line, "num_tensors": len(shard.tensors), **begins.get(stage, {})})
    else:
        _print(contents, uses, begins)
    if args.graph:
        Path(args.graph).write_text(_drawn(contents, begins), encoding="utf-8")
        log(f"picture: {args.graph}")
    return 0


def _begins(contents: Any) -> dict[str, dict[str, Any]]:
    """Return for each stage of a divided module its start, its inputs, and whether an exit precedes it."""
    program, found = contents.program, {}
    exits = program.segments.exits if program.segments is not None else ()
    for index, (stage, flow) in enumerate(zip(contents.stages, program.flows)):
        start = "the inputs" if flow.start is None else flow.start.module
        again = "" if flow.start is None or flow.start.number == 1 else f" (call {flow.start.number})"
        flows = [f"{value.dtype} {'x'.join(map(str, value.shape)) or 'scalar'}" for value in flow.values]
        found[stage.name] = {
            "begins": shown(start) + again, "flows": [shown(flow) for flow in flows], "exit": index in exits,
        }  # fmt: skip
    return found


def _print(contents: Any, uses: list[tuple[str, str, Any]], begins: dict[str, dict[str, Any]]) -> None:
    from offramp.units import format_size

    sizes = [(stage, kind, shard.file, len(shard.tensors), format_size(shard.bytes)) for stage, kind, shard in uses]
    if not begins:
        print(table(("stage", "kind", "file", "tensors", "size"), sizes))
        exits = f"exits after layers 1 to {len(contents.layers) - 1}" if contents.exits else "no exits"
        head = contents.encoder.problem or "no classification head"
        graphs = ", ".join(contents.graphs) or "none"
        print(f"\n{shown(contents.source.architecture)}, {head}, {exits}, graphs: {graphs}")
        return
    empty = [(stage.name, "", "-", 0, "") for stage in contents.stages if not any(s == stage.name for s, *_ in sizes)]
    rows, seen = [], set()
    for stage, _, file, tensors, size in sorted([*sizes, *empty], key=lambda row: (row[0] == "-", row[0])):
        about = begins.get(stage, {"begins": "", "flows": [], "exit": False})
        first = stage not in seen
        seen.add(stage)
        flows = ", ".join(about["flows"]) if first else ""
        mark = "exit" if about["exit"] and first else ""
        rows.append((stage, file, tensors, size, mark, about["begins"] if first else "", flows))
    print(table(("stage", "file", "tensors", "size", "", "begins with", "flows in"), rows))
    graphs = f"{len(contents.graphs)} ONNX graphs" if contents.graphs else "no ONNX graphs"
    where = "" if contents.exits is None else ", exits where marked"
    print(f"\n{shown(contents.source.architecture)}, method {contents.source.method}, {graphs}{where}")


def _drawn(contents: Any, begins: dict[str, dict[str, Any]]) -> str:
    from offramp.reporting.stages import StageBox, draw_stages
    from offramp.units import format_size

    needs = {stage.name: [name for step in stage.steps for name in step.shards] for stage in contents.stages}
    shared = {name for name in contents.shards if sum(name in shards for shards in needs.values()) > 1}
    num_layers = sum(stage.role == "layer" for stage in contents.stages)
    boxes = []
    for place, stage in enumerate(contents.stages):
        shards = [contents.shards[name] for name in needs[stage.name]]
        about = begins.get(stage.name, {"begins": stage.name, "flows": ["hidden states"], "exit": False})
        has_exit = about["exit"] or (not begins and contents.exits is not None and 1 < place <= num_layers)
        size = format_size(sum(shard.data_bytes for shard in shards))
        detail = f"{sum(len(shard.tensors) for shard in shards)} tensors, {size}"
        names = [name for name in needs[stage.name] if name in shared]
        boxes.append(StageBox(about["begins"], detail, about["flows"], names, has_exit))
    return draw_stages(f"{shown(contents.source.architecture)}: {len(boxes)} stages", boxes)
