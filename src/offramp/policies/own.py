"""Policies of the user, named as `FILE.py:CLASS[:ARGUMENTS]`: a subclass of `Policy` in a Python file.

The file is code and is run: only a command line, a recipe or a caller in Python may name one. It is read once for each
content, and its digest is part of the policy's text, `FILE.py@DIGEST:CLASS`, which is refused for another content.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Dict, List, Match, Optional, Tuple

import numpy as np

from offramp.errors import RefusedError, UsageError, innermost_line, missing, said
from offramp.policies.evidence import Evidence
from offramp.policies.policy import Decider, Policy

FORM = "FILE.py:CLASS[:ARGUMENTS]"
_RULE = re.compile(
    r"(?P<file>[^|&>\s][^|&>]*?\.py)(@(?P<digest>[0-9a-f]{16}))?\s*(:(?P<name>[^:]*)(:(?P<given>.*))?)?", re.S
)
_SIGNS = re.compile("([|&>])")
_modules: Dict[Tuple[str, str], ModuleType] = {}
"""Path and digest of a file -> the module that it made."""


@dataclass(frozen=True)
class Own(Policy):
    """A policy that decides as one of the user, and reports what that does wrong with the line of its file."""

    text: str
    path: str = field(compare=False)
    policy: Policy = field(compare=False)

    def __str__(self) -> str:
        return self.text

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError if the user's policy does not fit the model."""
        self.policy.check(num_exits, problem)

    @property
    def lookback(self) -> int:
        """The lookback of the user's policy."""
        return self.policy.lookback

    def earliest_exit(self, num_exits: int) -> int:
        """Return the first exit at which a row may leave by the user's policy."""
        return self.policy.earliest_exit(num_exits)

    def last_exit(self, num_exits: int) -> int:
        """Return the last exit that a row can reach by the user's policy."""
        return self.policy.last_exit(num_exits)

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return a state of the user's policy whose masks are checked."""
        return _Observed(self, self.policy.start(num_rows, num_exits))


class _Observed(Decider):
    """State of a user's policy: checks the masks that it returns."""

    def __init__(self, own: Own, decider: Decider) -> None:
        self.own, self.parts = own, [decider]

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        decider = self.parts[0]
        try:
            mask_B = np.asarray(decider.update(exit_index, evidence))
        except Exception as error:
            raise _wrong(error, self.own.path, 1) from error
        if mask_B.dtype != bool or mask_B.shape != (evidence.num_rows,):
            what = f"{self.own}: update must return a bool for each of {evidence.num_rows} rows"
            line = getattr(getattr(type(decider).update, "__code__", None), "co_firstlineno", 1)
            raise UsageError(
                f"{what}, not {mask_B.dtype} {list(mask_B.shape)}",
                f"{self.own.path}, line {line}",
                "correct the policy",
            )
        return mask_B


def _match(rule: str) -> Optional[Match[str]]:
    return _RULE.fullmatch(rule.lstrip())  # a pattern that skips spaces itself takes the square of their number


def is_own(rule: str) -> bool:
    """Return whether the text of a rule names a Python file."""
    return _match(rule) is not None


def load_own(rule: str) -> Own:
    """Return the policy that a rule of the form FORM names, and run its file.

    Raises UsageError for a missing file or class, wrong arguments, and what the file does wrong, with its line;
    RefusedError for a file with another digest than the rule has.
    """
    found = _match(rule)
    assert found is not None
    path, data = found["file"], _read(found["file"])
    digest = _digest(data)
    if found["digest"] not in (None, digest):
        raise RefusedError("the policy was changed since it was named", path, "run the same command again")
    module, name = _module(path, data, digest), (found["name"] or "").strip()
    kind = vars(module).get(name)
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        own = [key for key, value in vars(module).items() if _is_policy(value, module)]
        there = f"it has {', '.join(own)}" if own else "derive one from offramp.policies.Policy"
        what = f"no class {name}" if kind is None else f"{name} is not a subclass of offramp.policies.Policy"
        where = path if kind is None else f"{path}, line {_line_of(name, data)}"
        raise UsageError(what if name else "no class is named", where, f"write {FORM}: {there}")
    try:
        policy = kind(*_arguments(found["given"]))
    except Exception as error:
        raise _wrong(error, path, _line_of(name, data)) from error
    given = "" if found["given"] is None else f":{found['given'].strip()}"
    return Own(f"{path}@{digest}:{name}{given}", path, policy)


def pinned(text: str) -> str:
    """Return the text of a policy in which each Python file has its digest. Raises UsageError for a missing file."""

    def pin(found: Match[str]) -> str:
        return f"{found['file']}@{found['digest'] or _digest(_read(found['file']))}:{found['name']}" + (
            "" if found["given"] is None else f":{found['given']}"
        )

    parts = [(part, _match(part)) for part in _SIGNS.split(text)]
    return "".join(part if found is None or found["name"] is None else pin(found) for part, found in parts)


def python_files(text: str) -> List[str]:
    """Return the Python files that the text of a policy names."""
    found = map(_match, _SIGNS.split(text))
    return [each["file"] for each in found if each is not None]


def _read(path: str) -> bytes:
    if not os.path.isfile(path):  # noqa: PTH113  # Path.is_file may raise
        raise missing(path, "policy in Python")
    with open(path, "rb") as file:
        return file.read()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _module(path: str, data: bytes, digest: str) -> ModuleType:
    """Return what a file defines. Nothing is written beside it, and a cache of another content is never used."""
    if (path, digest) not in _modules:
        module = ModuleType(f"offramp_policy_{digest}")
        module.__file__ = path
        sys.modules[module.__name__] = module  # dataclasses look for the module of a class
        try:
            exec(compile(data, path, "exec"), vars(module))  # code of the user  # nosec B102
        except (Exception, SystemExit) as error:
            raise _wrong(error, path, 1) from error
        _modules[path, digest] = module
    return _modules[path, digest]


def _is_policy(value: Any, module: ModuleType) -> bool:
    return isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.__name__


def _line_of(name: str, data: bytes) -> int:
    """Return the line at which a class or another name is defined."""
    found = re.search(rf"^(class\s+|def\s+)?{re.escape(name)}\b".encode(), data, re.M)
    return 1 if found is None else data.count(b"\n", 0, found.start()) + 1


def _arguments(text: Optional[str]) -> List[Any]:
    """Return the arguments of a text with commas: integers, other numbers, or texts."""
    return [_value(part.strip()) for part in (text or "").split(",") if part.strip()]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _wrong(error: BaseException, path: str, line: int) -> UsageError:
    where = f"{path}, line {innermost_line(error, path, line)}"
    return UsageError(f"the policy is wrong: {said(error)}", where, "correct the policy")
