"""Regular expressions of tokenizers, bounded before they are compiled.

The library searches with backtracking: a pattern such as `(a+)+b` takes time that doubles with each letter, and nothing
can interrupt it. Patterns of real tokenizers are alternatives of few parts each. What they need is allowed, and
everything else is refused.
"""

from __future__ import annotations

import re
from typing import Tuple

from offramp.program.checks import WrongError

MAX_CHARACTERS = 4096
_MAX_DEGREE, _MAX_COUNT, _MAX_DEPTH = 2, 256, 16
_MAX_WAYS, _MAX_WAYS_IN_A_ROW = 4096, 64
Cost = Tuple[int, int]
"""Ways in which a part can match at one place, each of them as often as the length of the text to this power: a product
for parts in a row, a sum for alternatives."""
_ONE: Cost = (1, 0)
_OPEN = re.compile(r"\((?:\?(?:[im]*(?:-[im]+)?:|=|!|<=|<!|>))?")
_ESCAPE = re.compile(
    r"\\(?:[pP]\{\^?\w+\}|x\{[0-9A-Fa-f]{1,6}\}|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[sSdDwWhHbBAzZnrtfv]|\W)"
)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d{1,4})\}|\{(\d{0,4}),(\d{0,4})\})([?+]?)")


def require_bounded(pattern: str) -> None:
    """Raise WrongError for a pattern that may take more than the square of the length of a text."""
    if not 0 < len(pattern) <= MAX_CHARACTERS:
        raise WrongError(f"a pattern of {len(pattern)} characters, expected 1 to {MAX_CHARACTERS}")
    parser = _Parser(pattern)
    parser.alternatives(0)
    if parser.at < len(pattern):
        raise parser.wrong("')' without '('")


class _Parser:
    """Reader of one pattern, at a place in it."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at = pattern, 0

    def wrong(self, what: str) -> WrongError:
        return WrongError(f"pattern {self.pattern!r:.100}: {what} at {self.at}")

    def alternatives(self, depth: int) -> Cost:
        """Read up to the end of a group, or of the pattern, and return the cost."""
        if depth > _MAX_DEPTH:
            raise self.wrong(f"more than {_MAX_DEPTH} groups in one another")
        ways, degree = self._row(depth)
        while self._next() == "|":
            self.at += 1
            more, other = self._row(depth)
            ways, degree = ways + more, max(degree, other)
        return self._bounded(ways, degree, _MAX_WAYS)

    def _row(self, depth: int) -> Cost:
        ways, degree = _ONE
        while self._next() not in ("", "|", ")"):
            more, other = self._repeated(self._atom(depth))
            ways, degree = self._bounded(ways * more, degree + other)
        return ways, degree

    def _atom(self, depth: int) -> Cost:
        letter = self._next()
        if letter == "(":
            self._take(_OPEN, "a group of an unknown kind")
            found = self.alternatives(depth + 1)
            if self._next() != ")":
                raise self.wrong("'(' without ')'")
            self.at += 1
            return found
        if letter == "[":
            self._class(depth)
        elif letter == "\\":
            self._take(_ESCAPE, "an unknown escape")
        elif letter in "*+?":
            raise self.wrong(f"{letter!r} repeats nothing")
        else:
            self.at += 1
        return _ONE

    def _class(self, depth: int) -> None:
        """Skip a set of characters, which may contain others: `[^\\s[a-z]&&[^b]]`."""
        if depth > _MAX_DEPTH:
            raise self.wrong(f"more than {_MAX_DEPTH} sets in one another")
        self.at += 2 if self.pattern.startswith("[^", self.at) else 1
        first = self.at
        while self._next() != "]" or self.at == first:
            if self._next() == "":
                raise self.wrong("'[' without ']'")
            if self._next() == "[":
                self._class(depth + 1)
            elif self._next() == "\\":
                self._take(_ESCAPE, "an unknown escape")
            else:
                self.at += 1
        self.at += 1

    def _repeated(self, part: Cost) -> Cost:
        """Read what repeats a part, if anything does, and return the cost of all of it."""
        found = _QUANTIFIER.match(self.pattern, self.at)
        if found is None:
            return part
        self.at = found.end()
        exact, low, high, suffix = found.groups()
        if (found[0][0] == "{" and suffix == "+") or self._next() in ("*", "+", "?"):
            raise self.wrong("a repeated repetition")
        if max(int(each or 0) for each in (exact, low, high)) > _MAX_COUNT:
            raise self.wrong(f"more than {_MAX_COUNT} repetitions")
        if exact is not None:
            ways, degree = part[0] ** int(exact), part[1] * int(exact)
            return self._bounded(ways + (suffix == "?"), degree)
        if found[0][0] == "?":
            return part[0] + 1, part[1]
        if part != _ONE:
            raise self.wrong("a repetition of a part that can match in several ways")
        return (1, 1) if found[0][0] in "*+" or not high else (max(int(high) - int(low or 0) + 1, 1), 0)

    def _bounded(self, ways: int, degree: int, most: int = _MAX_WAYS_IN_A_ROW) -> Cost:
        if ways > most or degree > _MAX_DEGREE:
            raise self.wrong("too many ways to match")
        return ways, degree

    def _take(self, expected: "re.Pattern[str]", what: str) -> None:
        found = expected.match(self.pattern, self.at)
        if found is None:
            raise self.wrong(what)
        self.at = found.end()

    def _next(self) -> str:
        return self.pattern[self.at : self.at + 1]
