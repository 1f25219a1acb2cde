"""A run of a module as plain data, and the planning of stages from it. Pure Python.

A run is calls, operations, and the values that live between them. Cuts stand where a module call begins. Which of them
is decided by dynamic programming over the bytes that are live there: wide places are inside blocks, narrow ones between
them. That the stages give the same answers is for the builder to prove.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice, pairwise, zip_longest

from offramp.program.program import Call, Part, Value

LOOK_UP = "aten.embedding.default"
"""Operation that reads only rows of a weight."""
BY_ROW = frozenset({LOOK_UP, *(f"aten.{name}.default" for name in ("t", "linear", "mm", "addmm", "addmv"))})
"""Operations on a weight that a linear layer or a look-up consists of."""
DEPTH_PRICE = 0.1
"""Fraction by which a cut must be narrower for each module level that it is deeper."""
FEW_STAGES = 16
"""Number of stages of a model without blocks, if its weights can be cut so."""
TABLE_BYTES = 256 << 10
"""A smaller table is loaded whole."""
Calls = Collection[Call]


@dataclass(frozen=True)
class Op:
    """One operation: the weights that it touched, the values that it read, and those that it made."""

    name: str
    weights: tuple[str, ...] = ()
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()


@dataclass
class Span:
    """A module call, `depth` calls deep, from operation `start` to before operation `end`."""

    call: Call | None
    """None: the whole run."""
    start: int
    end: int
    depth: int = 0
    arguments: tuple[tuple[int | None, Value], ...] = ()
    """Tensors among its arguments, in order, as they are when it begins, each with the number of its value; None for
    one that is no value: an input of the run, a weight, a constant."""

    @property
    def module(self) -> str:
        """Name of the module; "" for the whole run."""
        return "" if self.call is None else self.call.module


@dataclass(frozen=True)
class Trace:
    """One run. Calls are in the order in which they begin. Values are numbered; `values` says what they are and how
    many bytes they took.
    """

    ops: Sequence[Op]
    spans: Sequence[Span]
    values: Mapping[int, tuple[Value, int]]
    outputs: tuple[int, ...]
    """Values that the run returned: they live to its end."""

    @cached_property
    def places(self) -> list[Span]:
        """Calls before which a stage may begin, at most one for each operation; the first place is the whole run."""
        places = [Span(None, 0, len(self.ops))]
        for span in self.spans:
            if span.start > places[-1].start:
                places.append(span)
            elif places[-1].call is not None and span.depth <= places[-1].depth:
                places[-1] = span  # of calls that begin at one operation, the outermost that it is in
        return [place for place in places if place.start < len(self.ops) or not place.start]

    @cached_property
    def live(self) -> Liveness:
        """Lifetimes of the values."""
        return Liveness(self)

    def weights(self, start: int = 0, end: int | None = None) -> dict[str, None]:
        """Return the weights that operations from `start` to before `end` use, in order of first use."""
        return dict.fromkeys(name for op in self.ops[start:end] for name in op.weights)

    def used_only_by(self, operations: Set[str]) -> set[str]:
        """Return the weights that these operations use and no others."""
        used = {name for op in self.ops if op.name in operations for name in op.weights}
        return used - {name for op in self.ops if op.name not in operations for name in op.weights}

    def part(self, place: Span, old_before: int) -> Part:
        """Return the part that begins at a place, without shards.

        Its flows leave out values that the run only returns, such as a cache of keys and values. It has a hidden state
        if the first argument of the call is the only flow that was made at operation `old_before` or later.
        """
        if place.call is None:
            return Part((), None, (), None)
        alive, made = self.live.at(place.start), self.live.made
        now = dict(place.arguments)
        values = tuple(now.get(value, self.values[value][0]) for value in alive)
        first = place.arguments[0][0] if place.arguments else None
        others = (value for value in self.live.read_at(place.start) if value != first)
        alone = first in alive and all(made[value] < old_before for value in others)
        return Part((), place.call, values, alive.index(first) if first is not None and alone else None)


class Liveness:
    """Lifetimes of values, from the operation that makes a value to the last one that reads it."""

    def __init__(self, trace: Trace) -> None:
        self._values = trace.values
        self.made: dict[int, int] = {}
        self._last_read: dict[int, int] = {}
        for number, op in enumerate(trace.ops):
            self.made.update(dict.fromkeys(op.writes, number))
            self._last_read.update(dict.fromkeys((*op.writes, *op.reads), number))
        self.last = self._last_read | dict.fromkeys(trace.outputs, len(trace.ops))
        self._across = self._sums(len(trace.ops), 1)
        self.most_bytes = max(self._sums(len(trace.ops), 0))
        """Most bytes that live at once."""

    def at(self, op: int) -> list[int]:
        """Return the values that were made before operation `op`, and that it or a later one reads."""
        return [value for value, made in self.made.items() if made < op <= self.last[value]]

    def read_at(self, op: int) -> list[int]:
        """Return those values of `at(op)` that an operation still reads."""
        return [value for value in self.at(op) if self._last_read[value] >= op]

    def bytes_at(self, op: int) -> int:
        """Return the bytes of the values of `at(op)`."""
        return self._across[op]

    def _sums(self, num_ops: int, delay: int) -> list[int]:
        """Return the bytes of the values alive at each operation, from `delay` operations after they are made."""
        changes = [0] * (num_ops + 2)
        for value, made in self.made.items():
            if made + delay <= self.last[value]:
                changes[made + delay] += self._values[value][1]
                changes[self.last[value] + 1] -= self._values[value][1]
        return list(accumulate(changes))


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
    trace: Trace, sizes: Sizes, stage_bytes: int | None = None, table_bytes: int = TABLE_BYTES, points: Calls = ()
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
    looked_up = trace.used_only_by({LOOK_UP})
    tables = frozenset(name for name in looked_up if sizes.bytes[name] >= table_bytes)
    blocks = _blocks(trace)
    begins = {span.start for span in blocks}
    limit = stage_bytes or _largest(trace, blocks, sizes, tables)
    asked = {place.start for place in trace.places if place.call in points}
    cuts = _cut(trace, sizes, tables, limit, asked if stage_bytes else begins | asked)
    bounds = [*(place.start for place in cuts), len(trace.ops)]
    uses = [trace.weights(start, end) for start, end in pairwise(bounds)]
    adopted, unused = _adopt(trace, bounds[:-1], uses, sizes)
    first_end = blocks[0].end if blocks else bounds[1]  # what was made by then, like a mask, is no news later
    parts = [trace.part(place, first_end if place.start >= first_end else bounds[1]) for place in cuts]
    stages = tuple(
        PlannedStage(part, tuple(n for n in names if n not in tables), tuple(n for n in names if n in tables))
        for part, names in zip(parts, uses, strict=True)
    )
    if asked or begins:
        exits = [index for index, place in enumerate(cuts) if place.start in (asked or begins)][0 if asked else 1 :]
    else:
        exits = [index for index, part in enumerate(parts) if part.hidden is not None]
    sliced = tuple(sorted(trace.used_only_by(BY_ROW)))
    return StagePlan(stages, adopted, unused, sliced, limit, tuple(exits), trace.live.most_bytes)


def _blocks(trace: Trace) -> list[Span]:
    """Return the calls of consecutive blocks: numbered siblings, each of which takes one hidden state from the previous
    one and has several weighted calls inside. Nested blocks count instead of the outer ones if all of these have some.
    """
    families: dict[str, list[Span]] = defaultdict(list)
    for index, span in enumerate(trace.spans):
        parent, _, last = span.module.rpartition(".")
        if last.isdigit() and _is_composed(trace, index):
            families[parent].append(span)
    places = {place.start: place for place in trace.places}
    chains = {parent: spans for parent, spans in families.items() if _is_chain(trace, spans, places)}
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
    return _is_within(span.module, outer.module) and outer.start <= span.start and span.end <= outer.end


def _is_chain(trace: Trace, spans: Sequence[Span], places: Mapping[int, Span]) -> bool:
    """Return whether one hidden state flows from each to the next. Other live values must be read inside, like a mask:
    what is only read behind them goes round them, like the input of a residual block round its layers.
    """
    if len(spans) < 2 or any(span.start not in places for span in spans):
        return False
    inside = {value for span in spans[1:] for op in trace.ops[span.start : span.end] for value in op.reads}
    parts = [trace.part(places[span.start], spans[0].end) for span in spans[1:]]
    alive = {value for span in spans[1:] for value in trace.live.read_at(span.start)}
    return all(part.hidden is not None for part in parts) and alive <= inside


def _is_composed(trace: Trace, index: int) -> bool:
    """Return whether several calls within a span use weights of their own."""
    span, found = trace.spans[index], None
    for other in islice(trace.spans, index + 1, None):  # calls within it begin next
        if other.start >= span.end:
            return False
        touched = tuple(trace.weights(other.start, other.end)) if _is_inside(other, span) else ()
        if touched and found not in (None, touched):
            return True
        found = touched or found
    return False


def _largest(trace: Trace, blocks: Sequence[Span], sizes: Sizes, tables: Set[str]) -> int:
    """Return the bytes of the largest block with what lies between it and the next one; without blocks, an equal share
    of all weights.
    """
    needs = []
    for span, after in zip_longest(blocks, blocks[1:]):
        end = after.start if after and _parent(after) == _parent(span) else span.end
        needs.append(sizes.of(trace.weights(span.start, end).keys() - tables))
    return max(needs, default=0) or max(sizes.of(trace.weights().keys() - tables) // FEW_STAGES, 1)


def _parent(span: Span) -> str:
    return span.module.rpartition(".")[0]


def _cut(trace: Trace, sizes: Sizes, tables: Set[str], limit: int, forced: Set[int]) -> list[Span]:
    """Return the cheapest places for stages to begin such that each needs at most `limit`, or cannot be cut, and that
    none goes over a `forced` place.
    """
    places, live = trace.places, trace.live
    bounds = [*(place.start for place in places), len(trace.ops)]
    needs = [trace.weights(start, end).keys() - tables for start, end in pairwise(bounds)]
    price = min((live.bytes_at(place.start) for place in places if live.bytes_at(place.start)), default=1)
    costs = [(live.bytes_at(place.start) + price) * (1 + DEPTH_PRICE * place.depth) for place in places]
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
    trace: Trace, starts: Sequence[int], uses: list[dict[str, None]], sizes: Sizes
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give weights that were not touched to the stages of the innermost call around them: (adopted, unused).

    Another input may route to them: an expert that this one never asked. The whole model is no call.
    """
    by_module: dict[str, list[Span]] = defaultdict(list)
    for span in trace.spans:
        by_module[span.module].append(span)
    touched, adopted, unused = trace.weights(), [], []
    for name in (name for name in sizes.bytes if name not in touched):
        spans: list[Span] = []
        for module in sizes.owners[name]:
            while module and module not in by_module:
                module = module.rpartition(".")[0]
            spans.extend(by_module.get(module, ()))
        ops = {op for span in spans for op in (span.start, max(span.end - 1, span.start))}
        places = [bisect_right(starts, op) - 1 for op in ops]
        for index in range(min(places), max(places) + 1) if places else ():
            uses[index][name] = None
        (adopted if places else unused).append(name)
    return tuple(adopted), tuple(unused)
