"""List the stages of a store in order with the kernel and size of each shard; for a divided module also the start and
the inputs of each stage. --graph draws them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Tuple

from offramp.cli.options import emit, require_writable, say, table
from offramp.errors import shown

if TYPE_CHECKING:
    from offramp.program.program import Module, Part, Program
    from offramp.store import Manifest


@dataclass(frozen=True)
class Listed:
    """One stage, or one part of a divided module."""

    name: str
    uses: Tuple[Tuple[str, str], ...]
    """(kernel, shard) in order."""
    begins: str
    flows: Tuple[str, ...]
    has_exit: bool
    """An exit stands before it."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ls."""
    parser.add_argument("store")
    parser.add_argument("--graph", metavar="FILE.svg", help="draw the stages, values between them, and shared weights")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each shard")


def main(args: argparse.Namespace) -> int:
    """List the stages and shards."""
    from offramp.store import Store

    if args.graph:
        require_writable(args.graph, (".svg",))
    with Store(args.store, verify="never") as store:
        manifest = store.manifest
    module = manifest.program.module
    stages = _stages(manifest) if module is None else _parts(module, manifest.program)
    used = {shard for stage in stages for _, shard in stage.uses}
    others = tuple(("passed through", name) for name in manifest.shards if name not in used)
    stages.append(Listed("-", others, "", (), False))
    if args.json:
        _emit(manifest, stages)
    elif module is None:
        _print_stages(manifest, stages)
    else:
        _print_parts(manifest, stages)
    if args.graph:
        Path(args.graph).write_text(_drawn(manifest, stages[:-1]), encoding="utf-8")
        say(f"picture: {args.graph}")
    return 0


def _stages(manifest: Manifest) -> List[Listed]:
    """Return the stages of a program; the first also uses the shards of its look-ups."""
    program, tensors, found = manifest.program, manifest.tensors(), []
    tables = dict.fromkeys(tensors[lookup.table][0].name for lookup in program.lookups.values())
    exits = {stage.name for stage in program.stages if stage.exit is not None and manifest.exits is not None}
    previous = ""
    for stage in program.stages:
        uses = [(step.kernel, shard) for step in stage.steps for shard in step.shards]
        if not previous:
            uses = [(stage.name, shard) for shard in tables] + uses
        found.append(Listed(stage.name, tuple(uses), stage.name, ("hidden states",), previous in exits))
        previous = stage.name
    return found


def _parts(module: Module, program: Program) -> List[Listed]:
    """Return the parts of a divided module. If it has steps, each part is one of them."""
    exits = set(accumulate(len(layer.steps) for layer in program.layers[:-1]))
    return [_part(index, part, index in exits) for index, part in enumerate(module.parts)]


def _part(index: int, part: Part, has_exit: bool) -> Listed:
    start = "the inputs" if part.start is None else part.start.module
    again = "" if part.start is None or part.start.number == 1 else f" (call {part.start.number})"
    flows = tuple(shown(f"{value.dtype} {'x'.join(map(str, value.axes)) or 'scalar'}") for value in part.flows)
    return Listed(
        f"{index:03d}", tuple(("module", shard) for shard in part.shards), shown(start) + again, flows, has_exit
    )


def _emit(manifest: Manifest, stages: List[Listed]) -> None:
    for stage in stages:
        about: Dict[str, Any] = {"begins": stage.begins, "flows": stage.flows, "exit": stage.has_exit}
        for kernel, name in stage.uses:
            shard = manifest.shards[name]
            line = {"stage": stage.name, "kind": kernel, "shard": name, "file": shard.file, "bytes": shard.bytes}
            is_part = manifest.program.module is not None and stage.name != "-"
            emit({**line, "num_tensors": len(shard.tensors), **(about if is_part else {})})


def _print_stages(manifest: Manifest, stages: List[Listed]) -> None:
    rows = [(stage.name, kernel, *_file(manifest, shard)) for stage in stages for kernel, shard in stage.uses]
    print(table(("stage", "kind", "file", "tensors", "size"), rows))
    exits = f"exits after layers 1 to {len(manifest.program.layers) - 1}" if manifest.exits else "no exits"
    head, graphs = manifest.program.problem or "no classification head", ", ".join(manifest.graphs) or "none"
    print(f"\n{shown(manifest.source.architecture)}, {head}, {exits}, graphs: {graphs}")


def _print_parts(manifest: Manifest, stages: List[Listed]) -> None:
    rows = []
    for stage in stages:
        files = [_file(manifest, shard) for _, shard in stage.uses] or ([("-", 0, "")] if stage.name != "-" else [])
        for place, file in enumerate(files):
            about = ("exit" if stage.has_exit else "", stage.begins, ", ".join(stage.flows))
            rows.append((stage.name, *file, *(about if not place else ("", "", ""))))
    print(table(("stage", "file", "tensors", "size", "", "begins with", "flows in"), rows))
    graphs = f"{len(manifest.graphs)} ONNX graphs" if manifest.graphs else "no ONNX graphs"
    where = "" if manifest.exits is None else ", exits where marked"
    print(f"\n{shown(manifest.source.architecture)}, method {manifest.source.method}, {graphs}{where}")


def _file(manifest: Manifest, shard: str) -> Tuple[str, int, str]:
    from offramp.units import format_size

    found = manifest.shards[shard]
    return found.file, len(found.tensors), format_size(found.bytes)


def _drawn(manifest: Manifest, stages: List[Listed]) -> str:
    from offramp.reporting.stages import StageBox, draw_stages
    from offramp.units import format_size

    counts = [name for stage in stages for name in {shard for _, shard in stage.uses}]
    boxes = []
    for stage in stages:
        names = [name for _, name in stage.uses]
        shards = [manifest.shards[name] for name in names]
        size = format_size(sum(shard.data_bytes for shard in shards))
        detail = f"{sum(len(shard.tensors) for shard in shards)} tensors, {size}"
        shared = [name for name in names if counts.count(name) > 1]
        boxes.append(StageBox(stage.begins, detail, list(stage.flows), shared, stage.has_exit))
    return draw_stages(f"{shown(manifest.source.architecture)}: {len(boxes)} stages", boxes)
