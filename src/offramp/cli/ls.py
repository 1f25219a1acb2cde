"""List the stages of a store in order with the kernel and size of each shard; for a divided module also the start and
the inputs of each stage. --graph draws them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from offramp.cli.options import emit, log, require_writable, table
from offramp.errors import shown
from offramp.units import format_size

if TYPE_CHECKING:
    from offramp.store import Store


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of ls."""
    parser.add_argument("store")
    graph = "draw the stages, the values between them, and shared weights"
    parser.add_argument("--graph", metavar="FILE.svg", help=graph)
    parser.add_argument("--json", action="store_true", help="print one JSON line per shard")


def main(args: argparse.Namespace) -> None:
    """List the stages and shards."""
    from offramp.store import Store

    if args.graph:
        require_writable(args.graph, (".svg",))
    with Store(args.store, verify="never") as store:
        is_module, shards = store.program.module is not None, store.manifest.shards
        rows = _part_rows(store) if is_module else _stage_rows(store)
    used = {name for row in rows for _, name in row.uses}
    rest = Row("-", "", (), False, tuple(("passed through", name) for name in shards if name not in used))
    if args.json:
        for row in [*rows, rest]:
            facts = {"begins": row.begins, "flows": list(row.flows), "exit": row.has_exit} if is_module else {}
            for kernel, name in row.uses:
                shard = shards[name]
                sizes = {"file": shard.file, "bytes": shard.bytes, "num_tensors": len(shard.tensors)}
                sizes["dtypes"] = sorted({tensor.dtype for tensor in shard.tensors})
                emit({"stage": row.name, "kind": kernel, "shard": shard.name, **sizes, **facts})
    else:
        (_print_module if is_module else _print_encoder)(store, [*rows, rest])
    if args.graph:
        Path(args.graph).write_text(_drawn(store, rows), encoding="utf-8")
        log(f"picture: {args.graph}")


@dataclass(frozen=True)
class Row:
    """One stage of a store, or one part of a divided module."""

    name: str
    begins: str
    """The module call that it begins with, or the name of the stage."""
    flows: tuple[str, ...]
    """Descriptions of the values that it reads."""
    has_exit: bool
    """An exit stands before it."""
    uses: tuple[tuple[str, str], ...]
    """Kernel and shard of each use of a shard."""


def _stage_rows(store: Store) -> list[Row]:
    program, homes, rows = store.program, store.manifest.tensors(), []
    tables = dict.fromkeys(homes[lookup.table][0].name for lookup in program.lookups.values())
    exits_before = False
    for stage in program.stages:
        uses = [("rows", name) for name in tables] if not rows else []
        uses += [(step.kernel, shard) for step in stage.steps for shard in step.shards]
        flows = ("hidden states",) if rows else ()
        if uses:
            rows.append(Row(stage.name, stage.name, flows, exits_before, tuple(uses)))
        exits_before = stage.exit is not None and store.manifest.exits is not None
    return rows


def _part_rows(store: Store) -> list[Row]:
    program, rows = store.program, []
    assert program.module is not None
    ends = accumulate(len(stage.steps) for stage in program.stages)
    exits = {end for end, stage in zip(ends, program.stages) if stage.exit is not None}
    for index, part in enumerate(program.module.parts):
        start = "the inputs" if part.start is None else part.start.module
        again = "" if part.start is None or part.start.number == 1 else f" (call {part.start.number})"
        flows = [f"{value.dtype} {'x'.join(map(str, value.axes)) or 'scalar'}" for value in part.flows]
        uses = tuple(("module", name) for name in part.shards)
        rows.append(Row(f"{index:03d}", shown(start) + again, tuple(map(shown, flows)), index in exits, uses))
    return rows


def _print_encoder(store: Store, rows: list[Row]) -> None:
    manifest, program, lines = store.manifest, store.program, []
    for row in rows:
        for kernel, name in row.uses:
            shard = manifest.shards[name]
            lines.append((row.name, kernel, shard.file, len(shard.tensors), format_size(shard.bytes)))
    print(table(("stage", "kernel", "file", "tensors", "size"), lines))
    exits = f"exits after layers 1 to {len(program.layers) - 1}" if manifest.exits else "no exits"
    head = program.problem or "no classification head"
    print(f"\n{shown(manifest.source.architecture)}, {head}, {exits}, stored as {manifest.precision}")


def _print_module(store: Store, rows: list[Row]) -> None:
    manifest, lines = store.manifest, []
    for row in rows:
        shards = [manifest.shards[name] for _, name in row.uses]
        sizes = [(each.file, len(each.tensors), format_size(each.bytes)) for each in shards]
        for number, size in enumerate(sizes or ([("-", 0, "")] if row.name != "-" else [])):
            about = ("exit" if row.has_exit else "", row.begins, ", ".join(row.flows)) if not number else ("", "", "")
            lines.append((row.name, *size, *about))
    print(table(("stage", "file", "tensors", "size", "", "begins with", "flows in"), lines))
    graphs = f"{len(manifest.graphs)} ONNX graphs" if manifest.graphs else "no ONNX graphs"
    where = "" if manifest.exits is None else ", exits where marked"
    made = f"{shown(manifest.source.architecture)}, method {shown(manifest.source.method)}"
    print(f"\n{made}, stored as {manifest.precision}, {graphs}{where}")


def _drawn(store: Store, rows: list[Row]) -> str:
    from offramp.reporting.stages import StageBox, draw_stages

    shards, boxes = store.manifest.shards, []
    needs = [[name for _, name in row.uses] for row in rows]
    shared = {name for name in shards if sum(name in names for names in needs) > 1}
    for row, names in zip(rows, needs):
        size = format_size(sum(shards[name].data_bytes for name in names))
        detail = f"{sum(len(shards[name].tensors) for name in names)} tensors, {size}"
        boxes.append(StageBox(row.begins, detail, row.flows, [name for name in names if name in shared], row.has_exit))
    return draw_stages(f"{shown(store.manifest.source.architecture)}: {len(boxes)} stages", boxes)
