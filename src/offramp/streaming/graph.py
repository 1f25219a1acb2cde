"""A run of a module as plain data: calls, operations, and the values that live between them. Pure Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from offramp.program.program import Call, Part, Value

LOOK_UP = "aten.embedding.default"
"""Operation that reads only rows of a weight."""


@dataclass(frozen=True)
class Enter:
    """A module call begins. `arguments`: the tensors among its arguments, in order, as they are then, each with the
    number of its value; None for one that is no value: an input of the run, a weight, a constant.
    """

    call: Call
    arguments: tuple[tuple[int | None, Value], ...] = ()


@dataclass(frozen=True)
class Leave:
    """The last module call that began ends."""


@dataclass(frozen=True)
class Op:
    """One operation: the weights that it touched, the values that it read, and those that it made."""

    name: str
    weights: tuple[str, ...] = ()
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """One run. Values are numbered; `values` says what they are and how many bytes they took."""

    events: tuple[Enter | Leave | Op, ...]
    values: Mapping[int, tuple[Value, int]]
    outputs: tuple[int, ...]
    """Values that the run returned: they live to its end."""


@dataclass(frozen=True)
class Place:
    """A place where a stage may begin: before operation number `op`, with `call`, `depth` calls deep."""

    op: int
    call: Call | None
    depth: int
    arguments: tuple[tuple[int | None, Value], ...] = ()


@dataclass(frozen=True)
class Span:
    """A module call, from operation `start` to before operation `end`."""

    call: Call
    start: int
    end: int


class Run:
    """A trace taken apart: operations in order, places to cut before them, and the span of each module call."""

    def __init__(self, trace: Trace) -> None:
        self.ops: list[Op] = []
        self.places = [Place(0, None, 0)]
        self.spans: list[Span] = []
        begun: list[tuple[int, Call, int]] = []
        for event in trace.events:
            if isinstance(event, Op):
                self.ops.append(event)
            elif isinstance(event, Leave):
                index, call, start = begun.pop()
                self.spans[index] = Span(call, start, len(self.ops))
            else:
                here = Place(len(self.ops), event.call, len(begun), event.arguments)
                if here.op > self.places[-1].op:
                    self.places.append(here)
                elif self.places[-1].call is not None and here.depth <= self.places[-1].depth:
                    self.places[-1] = here  # of calls that begin at one operation, the outermost that it is in
                begun.append((len(self.spans), event.call, len(self.ops)))
                self.spans.append(Span(event.call, len(self.ops), len(self.ops)))
        self.places = [place for place in self.places if place.op < len(self.ops) or not place.op]
        self.live = Liveness(self.ops, trace.values, trace.outputs)

    def weights(self, start: int = 0, end: int | None = None) -> dict[str, None]:
        """Return the weights that operations from `start` to before `end` use, in order of first use."""
        return dict.fromkeys(name for op in self.ops[start:end] for name in op.weights)

    def part(self, place: Place, old_before: int) -> Part:
        """Return the part that begins at a place, without shards.

        Its flows leave out values that the run only returns, such as a cache of keys and values. It has a hidden state
        if the first argument of the call is the only flow that was made at operation `old_before` or later.
        """
        if place.call is None:
            return Part((), None, (), None)
        alive, made = self.live.at(place.op), self.live.made
        now = dict(place.arguments)
        values = tuple(now.get(value, self.live.values[value][0]) for value in alive)
        first = place.arguments[0][0] if place.arguments else None
        others = (value for value in self.live.read_at(place.op) if value != first)
        alone = first in alive and all(made[value] < old_before for value in others)
        return Part((), place.call, values, alive.index(first) if first is not None and alone else None)


class Liveness:
    """Lifetimes of values, from the operation that makes a value to the last one that reads it."""

    def __init__(self, ops: Sequence[Op], values: Mapping[int, tuple[Value, int]], outputs: Iterable[int]) -> None:
        self.values = values
        self.made: dict[int, int] = {}
        self.last: dict[int, int] = {}
        for number, op in enumerate(ops):
            for value in op.writes:
                self.made[value] = self.last[value] = number
            for value in op.reads:
                self.last[value] = number
        self._last_read = dict(self.last)
        self.last.update((value, len(ops)) for value in outputs)
        self._across = self._sums(len(ops), 1)
        self.most_bytes = max(self._sums(len(ops), 0))
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
                changes[made + delay] += self.values[value][1]
                changes[self.last[value] + 1] -= self.values[value][1]
        sums, alive = [], 0
        for change in changes:
            alive += change
            sums.append(alive)
        return sums
