"""Planning of stages from a run of a module: where each begins, which weights it needs, and what flows into it.

Cuts stand where a module call begins. Which of them is decided by dynamic programming over the bytes that are live
there: wide places are inside blocks, narrow ones between them. That the stages give the same answers is for the builder
to prove.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice, pairwise

from offramp.program.program import Call, Part
from offramp.streaming.graph import LOOK_UP, Place, Run, Span, Trace

BY_ROW = frozenset({LOOK_UP, *(f"aten.{name}.default" for name in ("t", "linear", "mm", "addmm", "addmv"))})
"""Operations on a weight that a linear layer or a look-up consists of."""
DEPTH_PRICE = 0.1
"""Fraction by which a cut must be narrower for each module level that it is deeper."""
FEW_STAGES = 16
"""Number of stages of a model without blocks, if its weights can be cut so."""
TABLE_BYTES = 256 << 10
"""A smaller table is loaded whole."""


@dataclass(frozen=True)
class Sizes:
    """Facts about weights: their bytes, and the full names of the modules that hold each of them."""

    bytes: Mapping[str, int]
    owners: Mapping[str, Set[str]]

    def of(self, names: Set[str] | Mapping[str, None] | Sequence[str]) -> int:
        """Return the bytes of several weights."""
        return sum(self.bytes[name] for name in names)


@dataclass(frozen=True)
class PlannedStage:
    """One stage: `uses` in order of first use, and tables of which only rows are looked up."""

    part: Part
    uses: tuple[str, ...]
    tables: tuple[str, ...]


@dataclass(frozen=True)
class StagePlan:
    """The stages of a module."""

    stages: tuple[PlannedStage, ...]
    adopted: tuple[str, ...]
    """Weights that the run did not use, but another may: they are in the stages of the module that holds them."""
    unused: tuple[str, ...]
    """Weights that only the whole model holds, and that the run did not use: in no stage."""
    sliced: tuple[str, ...]
    """Weights that only linear layers and look-ups use."""
    stage_bytes: int
    """The most that a stage needs, where it can be cut."""
    exits: tuple[int, ...]
    """Stages before which an exit can stand: those requested; otherwise after each consecutive block but the last;
    without blocks, before each stage that begins with a single hidden state."""
    activation_bytes: int


def plan_stages(
    trace: Trace,
    sizes: Sizes,
    stage_bytes: int | None = None,
    table_bytes: int = TABLE_BYTES,
    points: Collection[Call] = (),
) -> StagePlan:
    """Cut a run into stages.

    Args:
        stage_bytes: the most that a stage should need; a single weight, or a call with none inside, may need more.
            None: what the largest of the blocks that follow one another needs, and each of them is a stage.
        table_bytes: a weight of this size or more of which only rows are looked up is not loaded, its rows are.
        points: calls that begin behind an exit; each begins a stage.
    """
    if stage_bytes is not None and stage_bytes <= 0:
        raise ValueError(f"stage_bytes must be more than nothing, not {stage_bytes}")
    run = Run(trace)
    tables = _tables(run, sizes, table_bytes)
    blocks = _blocks(run)
    begins = {span.start for span in blocks}
    limit = stage_bytes or _largest(run, blocks, sizes, tables)
    asked = {place.op for place in run.places if place.call in points}
    cuts = _cut(run, sizes, tables, limit, asked if stage_bytes else begins | asked)
    bounds = [*(place.op for place in cuts), len(run.ops)]
    uses = [run.weights(start, end) for start, end in pairwise(bounds)]
    adopted, unused = _adopt(run, bounds[:-1], uses, sizes)
    first_end = blocks[0].end if blocks else bounds[1]  # what was made by then, like a mask, is no news later
    stages = [
        PlannedStage(
            run.part(place, first_end if place.op >= first_end else bounds[1]),
            tuple(name for name in names if name not in tables),
            tuple(name for name in names if name in tables),
        )
        for place, names in zip(cuts, uses, strict=True)
    ]
    exits = [index for index, place in enumerate(cuts) if place.op in (asked or begins)]
    exits = exits if asked or not exits else exits[1:]
    has_hidden = [index for index, stage in enumerate(stages) if stage.part.hidden is not None]
    by_row = {name for op in run.ops if op.name in BY_ROW for name in op.weights}
    sliced = by_row - {name for op in run.ops if op.name not in BY_ROW for name in op.weights}
    return StagePlan(tuple(stages), adopted, unused, tuple(sorted(sliced)), limit,
                     tuple(exits if begins or asked else has_hidden), run.live.most_bytes)  # fmt: skip


def _tables(run: Run, sizes: Sizes, table_bytes: int) -> frozenset[str]:
    """Return the weights of which only rows are looked up."""
    looked_up = {name for op in run.ops if op.name == LOOK_UP for name in op.weights}
    other = {name for op in run.ops if op.name != LOOK_UP for name in op.weights}
    return frozenset(name for name in looked_up - other if sizes.bytes[name] >= table_bytes)


def _blocks(run: Run) -> list[Span]:
    """Return the calls of consecutive blocks: numbered siblings, each of which takes one hidden state from the previous
    one and has several weighted calls inside. Nested blocks count instead of the outer ones if all of these have some.
    """
    families: dict[str, list[Span]] = defaultdict(list)
    for index, span in enumerate(run.spans):
        parent, _, last = span.call.module.rpartition(".")
        if last.isdigit() and _is_composed(run, index):
            families[parent].append(span)
    places = {place.op: place for place in run.places}
    chains = {parent: spans for parent, spans in families.items() if _is_chain(run, spans, places)}
    kept: list[str] = []
    for parent in sorted(chains, key=lambda parent: parent.count(".") + bool(parent)):
        inner = [span for other in chains if other != parent and _is_within(other, parent) for span in chains[other]]
        is_divided = all(any(_is_inside(span, outer) for span in inner) for outer in chains[parent])
        if not is_divided and not any(_is_within(parent, other) for other in kept):
            kept.append(parent)
    return sorted((span for parent in kept for span in chains[parent]), key=lambda span: span.start)


def _is_within(module: str, parent: str) -> bool:
    return module.startswith(parent + ".") if parent else True


def _is_inside(span: Span, outer: Span) -> bool:
    return _is_within(span.call.module, outer.call.module) and outer.start <= span.start and span.end <= outer.end


def _is_chain(run: Run, spans: Sequence[Span], places: Mapping[int, Place]) -> bool:
    """Return whether one hidden state flows from each to the next. Other live values must be read inside, like a mask:
    what is only read behind them goes round them, like the input of a residual block round its layers.
    """
    if len(spans) < 2 or any(span.start not in places for span in spans):
        return False
    inside = {value for span in spans[1:] for op in run.ops[span.start : span.end] for value in op.reads}
    parts = [run.part(places[span.start], spans[0].end) for span in spans[1:]]
    alive = {value for span in spans[1:] for value in run.live.read_at(span.start)}
    return all(part.hidden is not None for part in parts) and alive <= inside


def _is_composed(run: Run, index: int) -> bool:
    """Return whether several calls within a span use weights of their own."""
    span, found = run.spans[index], None
    for other in islice(run.spans, index + 1, None):  # calls within it begin next
        if other.start >= span.end:
            return False
        touched = tuple(run.weights(other.start, other.end)) if _is_inside(other, span) else ()
        if touched and found not in (None, touched):
            return True
        found = touched or found
    return False


def _largest(run: Run, blocks: Sequence[Span], sizes: Sizes, tables: Set[str]) -> int:
    """Return the bytes of the largest block with what lies between it and the next one; without blocks, an equal share
    of all weights.
    """
    needs = []
    for index, span in enumerate(blocks):
        after = blocks[min(index + 1, len(blocks) - 1)]
        end = after.start if after is not span and _parent(after) == _parent(span) else span.end
        needs.append(sizes.of(run.weights(span.start, end).keys() - tables))
    return max(needs, default=0) or max(sizes.of(run.weights().keys() - tables) // FEW_STAGES, 1)


def _parent(span: Span) -> str:
    return span.call.module.rpartition(".")[0]


def _cut(run: Run, sizes: Sizes, tables: Set[str], limit: int, forced: Set[int]) -> list[Place]:
    """Return the cheapest places for stages to begin such that each needs at most `limit`, or cannot be cut, and that
    none goes over a `forced` place.
    """
    places, live = run.places, run.live
    bounds = [*(place.op for place in places), len(run.ops)]
    needs = [run.weights(start, end).keys() - tables for start, end in pairwise(bounds)]
    price = min((live.bytes_at(place.op) for place in places if live.bytes_at(place.op)), default=1)
    costs = [(live.bytes_at(place.op) + price) * (1 + DEPTH_PRICE * place.depth) for place in places]
    best, begins = [0.0], [0]
    for end in range(1, len(places) + 1):
        best.append(math.inf)
        begins.append(end - 1)
        needed: set[str] = set()
        needed_bytes = 0
        for start in range(end - 1, -1, -1):
            needed_bytes += sizes.of(needs[start] - needed)
            needed |= needs[start]
            if start < end - 1 and (needed_bytes > limit or bounds[start + 1] in forced):
                break
            if best[start] + costs[start] < best[end]:
                best[end], begins[end] = best[start] + costs[start], start
    cuts, end = [], len(places)
    while end:
        end = begins[end]
        cuts.append(places[end])
    return cuts[::-1]


def _adopt(
    run: Run, starts: Sequence[int], uses: list[dict[str, None]], sizes: Sizes
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give weights that were not touched to the stages of the innermost call around them: (adopted, unused).

    Another input may route to them: an expert that this one never asked.
    """
    by_module: dict[str, list[Span]] = defaultdict(list)
    for span in run.spans:
        by_module[span.call.module].append(span)
    touched, adopted, unused = run.weights(), [], []
    for name in sizes.bytes:
        if name in touched:
            continue
        spans = [span for owner in sizes.owners[name] for span in by_module.get(_called(owner, by_module), ())]
        places = sorted({_stage_at(starts, op) for span in spans for op in (span.start, max(span.end - 1, span.start))})
        for index in range(places[0], places[-1] + 1) if places else ():
            uses[index][name] = None
        (adopted if places else unused).append(name)
    return tuple(adopted), tuple(unused)


def _called(module: str, by_module: Mapping[str, object]) -> str:
    """Return the innermost called module around one, itself included; the whole model does not count."""
    while module and module not in by_module:
        module = module.rpartition(".")[0]
    return module or "-"


def _stage_at(starts: Sequence[int], op: int) -> int:
    return max(index for index, start in enumerate(starts) if start <= op)
