"""Bytes and times of each stage of a program, of the passes that a trace holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.measure import Span

_COLUMN = {"read": "read_ms", "idle_read": "read_ms", "wait": "wait_ms"}
"""Kind of a span -> column that its time is added to; the time of other kinds is computation."""


@dataclass
class StageCost:
    """One stage. Times, and the bytes read, are means over the passes."""

    stage: str
    weight_bytes: int
    """Weights that the stage uses."""
    resident_bytes: int
    """Part of the weights that stays in memory between passes."""
    read_bytes: float = 0.0
    read_ms: float = 0.0
    """Time of reads, most of which passes while earlier stages are computed."""
    wait_ms: float = 0.0
    """Time that the engine waits for reads."""
    compute_ms: float = 0.0
    """Time of computation, with the exit after the stage."""


def add_passes(stages: Sequence[StageCost], spans: Sequence[Span]) -> None:
    """Add the means of the bytes read and of the times of traced passes to the stages that they belong to."""
    num_passes = len({span.pass_index for span in spans if span.kind == "compute"}) or 1
    for span in spans:
        stage, column = stages[span.stage], _COLUMN.get(span.kind, "compute_ms")
        milliseconds = (span.end_seconds - span.start_seconds) * 1e3 / num_passes
        setattr(stage, column, getattr(stage, column) + milliseconds)
        if column == "read_ms":
            stage.read_bytes += span.bytes / num_passes


def total(stages: Sequence[StageCost]) -> StageCost:
    """Return the sums over all stages."""
    names = [name for name in StageCost.__dataclass_fields__ if name != "stage"]
    return StageCost("all", **{name: sum(getattr(stage, name) for stage in stages) for name in names})


def stage_names(spans: Sequence[Span]) -> dict[int, str]:
    """Return the name of each stage that computed: the word that the names of its steps begin with.

    Layers of text encoders count from 1, as their exits do: `layer.0 attention` and `layer.0 up` are `layer 1`.
    """
    steps: dict[int, list[str]] = {}
    for kind in ("compute", "head"):
        known = set(steps)  # exits of a layer do not name it
        for span in spans:
            if span.kind == kind and span.stage not in known:
                steps.setdefault(span.stage, []).append(span.name)
    return {stage: _shared_name(names, stage) for stage, names in steps.items()}


def _shared_name(names: Sequence[str], stage: int) -> str:
    first = {name.partition(" ")[0] for name in names}
    found = first.pop() if len(first) == 1 else names[0]
    layer = re.fullmatch(r"layer\.(\d{1,4})", found)
    return f"layer {stage}" if layer and int(layer[1]) + 1 == stage else found
