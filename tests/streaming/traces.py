"""Runs of modules that never were: a small language for traces, and random ones.

`trace("a( w1 w2 ) b( w3 )")`: module `a` is called and touches two weights in two operations, then `b`. Each operation
reads what the last one made, and makes one value of `VALUE_BYTES` bytes.
"""

from __future__ import annotations

import random
from collections import defaultdict

from hypothesis import strategies as st

from offramp.program.program import Call, Value
from offramp.streaming.stages import Op, Sizes, Span, Trace

VALUE_BYTES = 8


class Tracer:
    """Writes a trace. Values are numbers; `now` is the last one made."""

    def __init__(self):
        self.ops, self.spans, self.values, self.now = [], [], {}, None
        self._calls, self._open = defaultdict(int), []

    def enter(self, module, *arguments):
        """A call with these values as arguments, else the last one made."""
        self._calls[module] += 1
        given = arguments or (self.now,)
        taken = tuple((value, Value("float32", (2,))) for value in given)
        call = Call(module, self._calls[module])
        self.spans.append(Span(call, len(self.ops), -1, len(self._open), taken))
        self._open.append(self.spans[-1])

    def leave(self):
        self._open.pop().end = len(self.ops)

    def op(self, *weights, name="aten.mm.default", reads=None, num_bytes=VALUE_BYTES):
        """One operation. Returns the number of what it makes."""
        made = len(self.values)
        read = ((self.now,) if self.now is not None else ()) if reads is None else reads
        self.values[made] = Value("float32", (2,)), num_bytes
        self.ops.append(Op(name, weights, tuple(read), (made,)))
        self.now = made
        return made

    def done(self, *outputs):
        while self._open:
            self.leave()
        kept = outputs or (() if self.now is None else (self.now,))
        return Trace(self.ops, self.spans, self.values, tuple(kept))


def trace(text):
    """The trace that a text tells: `name(` a call, `)` its end, `.` an operation without weights, else one with them,
    joined by `+`; `name:w` for an operation of that name.
    """
    tracer = Tracer()
    for word in text.split():
        if word.endswith("("):
            tracer.enter(word[:-1])
        elif word == ")":
            tracer.leave()
        else:
            name, _, weights = word.rpartition(":")
            tracer.op(*(weights.split("+") if weights != "." else ()), name=name or "aten.mm.default")
    return tracer.done()


def sizes(of, owners=None):
    """`Sizes` of weights that are held by the module before the last dot of their names."""
    held = {name: frozenset({name.rpartition(".")[0]}) for name in of}
    return Sizes(dict(of), {**held, **(owners or {})})


WEIGHTS = {f"m{i}.w{j}": 1 + (7 * i + 3 * j) % 20 for i in range(4) for j in range(3)}


def random_trace(length, seed):
    """A nest of calls, of modules that are called again and again, with operations on random weights and values, some
    of which live long.
    """
    rng, tracer, depth = random.Random(seed), Tracer(), 0
    for _ in range(length):
        what, values = rng.choice(["enter", "leave", "op", "op"]), list(tracer.values)
        if what == "enter" and depth < 4:
            tracer.enter(f"m{rng.randrange(4)}" + ".x" * depth, *rng.choices([*values, None], k=rng.randint(0, 2)))
            depth += 1
        elif what == "leave" and depth:
            tracer.leave()
            depth -= 1
        elif what == "op":
            weights = rng.sample(sorted(WEIGHTS), rng.randint(0, 2))
            reads = rng.choices(values, k=rng.randint(0, 2)) if values else []
            name = rng.choice(["aten.embedding.default", "aten.mm.default", "aten.add.Tensor"])
            tracer.op(*weights, name=name, reads=reads, num_bytes=rng.randint(0, 50))
    return tracer.done(*rng.choices(list(tracer.values), k=rng.randint(0, 3)) if tracer.values else ())


traces = st.builds(random_trace, st.integers(1, 40), st.integers(0, 10**6))
