"""List the stages of a store in order with the kernel and size of each shard; for a divided module also the start and
the inputs of each stage. --graph draws them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.cli.options import emit, require_writable, say, table
from offramp.errors import shown

if TYPE_CHECKING:
    from offramp.store import Manifest, Shard


@dataclass
class _Listed:
    """One stage as it is shown."""

    name: str
    shards: list[tuple[str, Shard]] = field(default_factory=list)
    """(kernel, shard) in order of use."""
    begins: str = ""
    flows: list[str] = field(default_factory=list)
    has_exit: bool = False
    """An exit stands before the stage."""


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

    if args.graph:
        require_writable(args.graph, (".svg",))
    with Store(args.store, verify="never") as store:
        manifest = store.manifest
    stages = _stages(manifest) if manifest.program.module is None else _parts(manifest)
    if args.json:
        _print_lines(manifest, stages)
    else:
        _print_table(manifest, stages)
    if args.graph:
        Path(args.graph).write_text(_drawn(manifest, stages), encoding="utf-8")
        say(f"picture: {args.graph}")
    return 0


def _stages(manifest: Manifest) -> list[_Listed]:
    """Return the stages of a program; rows of tables are gathered before the first one."""
    found, had_exit = [], False
    tables = {manifest.tensors()[lookup.table][0].name for lookup in manifest.program.lookups.values()}
    for stage in manifest.program.stages:
        uses = [(step.kernel, manifest.shards[name]) for step in stage.steps for name in step.shards]
        if not found:
            uses = [("look-up", manifest.shards[name]) for name in sorted(tables)] + uses
        found.append(_Listed(stage.name, uses, stage.name, ["hidden states"] if found else [], had_exit))
        had_exit = stage.exit is not None and manifest.exits is not None
    return found


def _parts(manifest: Manifest) -> list[_Listed]:
    """Return the parts of a divided module, with the kernels that run them if they are graphs."""
    module, program = manifest.program.module, manifest.program
    assert module is not None
    kernels = [step.kernel for step in program.steps()] or ["module"] * len(module.parts)
    exits, place = set(), 0
    for layer in program.layers:
        place += len(layer.steps)
        if layer.exit is not None:
            exits.add(place)
    found = []
    for index, part in enumerate(module.parts):
        start = "the inputs" if part.start is None else part.start.module
        again = "" if part.start is None or part.start.number == 1 else f" (call {part.start.number})"
        flows = [shown(f"{value.dtype} {'x'.join(map(str, value.axes)) or 'scalar'}") for value in part.flows]
        uses = [(kernels[index], manifest.shards[name]) for name in part.shards]
        found.append(_Listed(f"{index:03d}", uses, shown(start) + again, flows, index in exits))
    return found


def _unused(manifest: Manifest, stages: list[_Listed]) -> list[Shard]:
    used = {shard.name for stage in stages for _, shard in stage.shards}
    return [shard for name, shard in manifest.shards.items() if name not in used]


def _print_lines(manifest: Manifest, stages: list[_Listed]) -> None:
    passed = _Listed("-", [("passed through", shard) for shard in _unused(manifest, stages)])
    for stage in (*stages, passed):
        about: dict[str, object] = {}
        if manifest.program.module is not None and stage is not passed:
            about = {"begins": stage.begins, "flows": stage.flows, "exit": stage.has_exit}
        for kernel, shard in stage.shards:
            line = {"stage": stage.name, "kernel": kernel, "shard": shard.name, "file": shard.file}
            emit({**line, "bytes": shard.bytes, "num_tensors": len(shard.tensors), **about})


def _print_table(manifest: Manifest, stages: list[_Listed]) -> None:
    from offramp.units import format_size

    rows = []
    for stage in stages:
        mark = ("exit" if stage.has_exit else "", stage.begins, ", ".join(stage.flows))
        for kernel, shard in stage.shards or [("", None)]:
            about = ("-", 0, "") if shard is None else (shard.file, len(shard.tensors), format_size(shard.bytes))
            rows.append((stage.name, kernel, *about, *mark))
            mark = ("", "", "")
    for shard in _unused(manifest, stages):
        rows.append(("-", "passed through", shard.file, len(shard.tensors), format_size(shard.bytes), "", "", ""))
    columns = ("stage", "kernel", "file", "tensors", "size", "", "begins with", "flows in")
    num_columns = 5 if manifest.program.module is None else len(columns)
    print(table(columns[:num_columns], [row[:num_columns] for row in rows]))
    num_exits = len(manifest.program.layers) - 1
    exits = "no exits" if manifest.exits is None else f"exits after layers 1 to {num_exits}"
    head = manifest.program.problem or "no classification head"
    graphs = f"{len(manifest.graphs)} ONNX graphs" if manifest.graphs else "no ONNX graphs"
    print(f"\n{shown(manifest.source.architecture)}, method {shown(manifest.source.method)}, {head}, {exits}, {graphs}")


def _drawn(manifest: Manifest, stages: list[_Listed]) -> str:
    from offramp.reporting.stages import StageBox, draw_stages
    from offramp.units import format_size

    needs = [{shard.name for _, shard in stage.shards} for stage in stages]
    shared = {name for name in manifest.shards if sum(name in names for names in needs) > 1}
    boxes = []
    for stage in stages:
        shards = [shard for _, shard in stage.shards]
        size = format_size(sum(shard.data_bytes for shard in shards))
        detail = f"{sum(len(shard.tensors) for shard in shards)} tensors, {size}"
        names = [shard.name for shard in shards if shard.name in shared]
        boxes.append(StageBox(stage.begins, detail, stage.flows, names, stage.has_exit))
    return draw_stages(f"{shown(manifest.source.architecture)}: {len(boxes)} stages", boxes)
