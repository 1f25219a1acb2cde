"""List the stages of a store in order with the kernel and size of each shard; for a divided module also the start and
the inputs of each stage. --graph draws them.
"""

from __future__ import annotations

import argparse
<<<<<<< HEAD
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Tuple
=======
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
>>>>>>> store

from offramp.cli.options import emit, log, require_writable, table
from offramp.errors import shown
from offramp.units import format_size

if TYPE_CHECKING:
    from offramp.store import Shard, Store

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
<<<<<<< HEAD
        rows, shards = _rows(store), store.manifest.shards
    used = {name for row in rows for _, name in row.uses}
    rest = Row("-", "", (), False, tuple(("passed through", name) for name in shards if name not in used))
    if args.json:
        for row in [*rows, rest]:
            for kernel, name in row.uses:
                emit({**_json(row, kernel, shards[name]), **(row.facts if store.program.module else {})})
    elif store.program.module is None:
        _print_encoder(store, [*rows, rest])
    else:
        _print_module(store, [*rows, rest])
    if args.graph:
        Path(args.graph).write_text(_drawn(store, rows), encoding="utf-8")
        log(f"picture: {args.graph}")
    return 0


@dataclass(frozen=True)
class Row:
    """One stage of a store, or one part of a divided module."""

    name: str
    begins: str
    """The module call that it begins with, or the name of the stage."""
    flows: Tuple[str, ...]
    """Descriptions of the values that it reads."""
    has_exit: bool
    """An exit stands before it."""
    uses: Tuple[Tuple[str, str], ...]
    """Kernel and shard of each use of a shard."""

    @property
    def facts(self) -> Dict[str, Any]:
        """What a line of JSON says of a part of a module."""
        return {"begins": self.begins, "flows": list(self.flows), "exit": self.has_exit}


def _rows(store: Store) -> List[Row]:
    return _stage_rows(store) if store.program.module is None else _part_rows(store)


def _stage_rows(store: Store) -> List[Row]:
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


def _part_rows(store: Store) -> List[Row]:
    program, rows = store.program, []
    assert program.module is not None
    exits, count = set(), 0
    for stage in program.stages:
        count += len(stage.steps)
        if stage.exit is not None:
            exits.add(count)
    for index, part in enumerate(program.module.parts):
        start = "the inputs" if part.start is None else part.start.module
        again = "" if part.start is None or part.start.number == 1 else f" (call {part.start.number})"
        flows = [f"{value.dtype} {'x'.join(map(str, value.axes)) or 'scalar'}" for value in part.flows]
        uses = tuple(("module", name) for name in part.shards)
        rows.append(Row(f"{index:03d}", shown(start) + again, tuple(map(shown, flows)), index in exits, uses))
    return rows


def _json(row: Row, kernel: str, shard: Shard) -> Dict[str, Any]:
    line = {"stage": row.name, "kind": kernel, "shard": shard.name, "file": shard.file, "bytes": shard.bytes}
    return {**line, "num_tensors": len(shard.tensors)}


def _print_encoder(store: Store, rows: List[Row]) -> None:
    manifest, program = store.manifest, store.program
    lines = [
        (row.name, kernel, shard.file, len(shard.tensors), format_size(shard.bytes))
        for row in rows
        for kernel, name in row.uses
        for shard in (manifest.shards[name],)
    ]
    print(table(("stage", "kernel", "file", "tensors", "size"), lines))
    exits = f"exits after layers 1 to {len(program.layers) - 1}" if manifest.exits else "no exits"
    head, graphs = program.problem or "no classification head", ", ".join(manifest.graphs) or "none"
    print(f"\n{shown(manifest.source.architecture)}, {head}, {exits}, graphs: {graphs}")


def _print_module(store: Store, rows: List[Row]) -> None:
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
    print(f"\n{shown(manifest.source.architecture)}, method {manifest.source.method}, {graphs}{where}")


def _drawn(store: Store, rows: List[Row]) -> str:
=======
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
>>>>>>> store
    from offramp.reporting.stages import StageBox, draw_stages

<<<<<<< HEAD
    shards, boxes = store.manifest.shards, []
    needs = [[name for _, name in row.uses] for row in rows]
    shared = {name for name in shards if sum(name in names for names in needs) > 1}
    for row, names in zip(rows, needs):
        size = format_size(sum(shards[name].data_bytes for name in names))
        detail = f"{sum(len(shards[name].tensors) for name in names)} tensors, {size}"
        boxes.append(StageBox(row.begins, detail, row.flows, [name for name in names if name in shared], row.has_exit))
    return draw_stages(f"{shown(store.manifest.source.architecture)}: {len(boxes)} stages", boxes)
=======
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
>>>>>>> store
