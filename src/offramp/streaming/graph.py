"""A run of a module as plain data: calls, operations, and the values that live between them. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from offramp.program.program import Call, Part, Value

LOOK_UP = "aten.embedding.default"
"""Operation that reads only rows of a weight."""


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
