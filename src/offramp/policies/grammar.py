"""Text form of a policy, used by `--exit` and in records.

    EXPRESSION := [from:K>] ANY          the prefix may occur once, at the start, and applies to the whole expression
    ANY        := ALL { "|" ALL }
    ALL        := RULE { "&" RULE }      & binds tighter than |
    RULE       := none | one of the forms of _RULES | FILE.json | FILE.py:CLASS[:ARGUMENTS]

Policy files are read by a function that the caller passes in. A Python file is code, which is run: it is accepted only
in text that the user wrote (see `own`). Whitespace is allowed around every word, number and operator. `none` cannot be
combined. Whether a policy fits a model is checked by `Policy.check`.
"""

from __future__ import annotations

import math
import re
from typing import Callable, Dict, Optional, Sequence, Type

from offramp.errors import UsageError
from offramp.policies.combine import AbstractJoin, AllOf, AnyOf, From
from offramp.policies.policy import Policy
from offramp.policies.rules import Confidence, Entropy, FullDepth, Margin, Patience, StopAt, Votes

Read = Optional[Callable[[str], Policy]]
"""Function that reads a policy file: from its name to the policy. None where files are not accepted."""

MAX_CHARACTERS = 1 << 14
"""Longest text of a policy. Each rule of it is evaluated for each row at each exit."""
_PREFIX = re.compile(r"\s*from\s*:([^>|&]*)>(.*)", re.DOTALL)
_INTEGER = re.compile(r"[+-]?[0-9]{1,9}")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


def parse(text: str, read: Read = None, *, code: bool = False) -> Policy:
    """Parse a policy. `str` of the result is an equivalent text, unless it names a policy file.

    `code`: the text is of a command line, a recipe or a caller in Python, and may name a Python file, which is run.

    Raises UsageError that names the part that cannot be parsed, and whatever `read` raises.
    """
    try:
        if len(text) > MAX_CHARACTERS:
            raise ValueError(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
        prefix = _PREFIX.fullmatch(text)
        if prefix is None:
            return _joined(text, read, code, (AnyOf, AllOf))
        return From(_integer(prefix[1], "from:K>"), _joined(prefix[2], read, code, (AnyOf, AllOf)))
    except ValueError as error:
        raise UsageError(f"invalid exit policy: {error}", repr(text), f"write {GRAMMAR}") from error


def is_file(text: str) -> bool:
    """Return whether the text of a rule or expression names a policy file."""
    return text.strip().lower().endswith(".json")


def _joined(text: str, read: Read, code: bool, joins: Sequence[Type[AbstractJoin]]) -> Policy:
    """Parse rules that are joined by the signs of `joins`; the first binds least."""
    if not joins:
        return _rule(text.strip(), read, code)
    parts = tuple(_joined(piece, read, code, joins[1:]) for piece in text.split(joins[0].sign))
    return parts[0] if len(parts) == 1 else joins[0](parts)


def _rule(rule: str, read: Read, code: bool) -> Policy:
    if rule == "none":
        return FullDepth()
    if is_file(rule):
        if read is None:
            raise ValueError(f"{rule!r}: a policy file is not accepted here")
        return read(rule)
    if ".py" in rule:
        return _of_python(rule, code)
    word, _, value = rule.partition(":")
    if word.strip() not in _BY_WORD:
        raise ValueError(f"{rule!r} is not a rule")
    return _BY_WORD[word.strip()](value, rule)


def _of_python(rule: str, code: bool) -> Policy:
    from offramp.policies import own  # imported for such rules only: start-up stays as it is

    if not own.is_own(rule):
        raise ValueError(f"{rule!r} is not a rule")
    if not code:
        raise ValueError(f"{rule!r}: a Python file is run, and only a command line or a recipe may name one")
    return own.load_own(rule)


def _patience(text: str, rule: str) -> Policy:
    count, at, tau = text.partition("@")
    patience = math.inf if count.strip() == "inf" else _integer(count, rule)
    return Patience(patience, _number(tau, rule) if at else None)


def _integer(text: str, piece: str) -> int:
    if not _INTEGER.fullmatch(text.strip()):
        raise ValueError(f"{piece!r}: {text.strip()!r} is not an integer")
    return int(text)


def _number(text: str, piece: str) -> float:
    if not _NUMBER.fullmatch(text.strip()):
        raise ValueError(f"{piece!r}: {text.strip()!r} is not a number")
    return float(text)


_RULES: Dict[str, Callable[[str, str], Policy]] = {
    "stage:K": lambda value, rule: StopAt(_integer(value, rule)),
    "patience:P[@TAU]": _patience,
    "votes:V": lambda value, rule: Votes(_integer(value, rule)),
    "entropy:T": lambda value, rule: Entropy(_number(value, rule)),
    "confidence:T": lambda value, rule: Confidence(_number(value, rule)),
    "margin:T": lambda value, rule: Margin(_number(value, rule)),
}
"""Form of a rule -> function of its value and its text. A new rule is one line here."""
_BY_WORD = {form.partition(":")[0]: make for form, make in _RULES.items()}
GRAMMAR = f"[from:K>] RULES, joined by | and &: none, {', '.join(_RULES)}, a policy file, or FILE.py:CLASS[:ARGUMENTS]"
