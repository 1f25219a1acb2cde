"""Classes, attributes and hooks of the parts of a module, which decide its answer beside its tensors.

A store of a module that was in memory has a digest of each, with which a module is compared that a class builds again:
built with other arguments, it has weights of the same shapes and gives other answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offramp.errors import DamagedError, StageError
from offramp.program.checks import WrongError, parse
from offramp.store import Store

FILE_NAME = "attributes.json"
_DESCRIBED: Any = dict[str, tuple[str, dict[str, str]]]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SKIPPED = frozenset(vars(nn.Module())) - {*_HOOKS}
"""Attributes of a module that hold its tensors and parts, or that PyTorch keeps for itself."""
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Path, torch.dtype, torch.device, torch.Size)
_DEEPEST = 8
"""Nested containers after which an attribute is not compared."""


def described(module: nn.Module) -> dict[str, tuple[str, dict[str, str]]]:
    """Return part -> its class, and attribute -> digest of its value. Objects of other classes are left out."""
    found = {}
    for path, part in module.named_modules():
        texts = {name: _text(value) for name, value in vars(part).items() if name not in (*_SKIPPED, *_HOOKS)}
        for name in _HOOKS:
            texts[name] = ", ".join(_text(hook) or _name(type(hook)) for hook in vars(part)[name].values())
        found[path] = _name(type(part)), {name: _digest(text) for name, text in texts.items() if text is not None}
    return found


def dumps(module: nn.Module) -> bytes:
    """Return the content of `attributes.json`."""
    return json.dumps(described(module), sort_keys=True).encode()


def require_equal(module: nn.Module, store: Store) -> None:
    """Raise StageError where a module that was built again is another one than that of the store, and DamagedError."""
    file = next((file for file in store.manifest.files if file.file == FILE_NAME), None)
    if file is None:
        return
    try:
        expected: Mapping[str, tuple[str, dict[str, str]]] = parse(_DESCRIBED, store.read_file(file))
    except WrongError as wrong:
        raise DamagedError(f"no attributes of a module ({wrong})", store.path / FILE_NAME, "divide again") from None
    found, parts = described(module), dict(module.named_modules())
    for path in (*expected, *(path for path in found if path not in expected)):
        kind, attributes = found.get(path, ("missing", {}))
        its_kind, its_attributes = expected.get(path, ("missing", {}))
        names = {*its_attributes, *attributes}
        if type(parts.get(path)).__module__.startswith("torch."):  # other versions have others beside these
            names = its_attributes.keys() & attributes.keys()
        differ = sorted(name for name in names if attributes.get(name) != its_attributes.get(name))
        if kind == its_kind and not differ:
            continue
        part = path or "the module"
        what = f"{part} has another attribute {differ[0]}" if kind == its_kind else f"{part} is {kind}, not {its_kind}"
        remedy = "give a function that builds it as it was, such as lambda: Net(width=64)"
        raise StageError(f"the class builds another module than the one that was divided: {what}", store.path, remedy)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _text(value: Any, depth: int = 0) -> str | None:
    """Return a text that is equal for equal values in every process, or None for an object of another class."""
    if isinstance(value, Enum):
        return f"{_name(type(value))}.{value.name}"
    if type(value) in _PLAIN or isinstance(value, Path):
        return repr(value)
    if isinstance(value, partial):
        value = [value.func, value.args, value.keywords]
    if callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    if depth == _DEEPEST or not isinstance(value, (list, tuple, set, frozenset, dict)):
        return None
    each = [_text(part, depth + 1) for part in (value.items() if isinstance(value, dict) else value)]
    if None in each:
        return None
    parts = [part for part in each if part is not None]
    return f"{_name(type(value))}({', '.join(sorted(parts) if isinstance(value, (set, frozenset)) else parts)})"


def _name(each: Any) -> str:
    """Return the name of a class or function without its file, which is another one where it is run as a script."""
    return str(each.__qualname__)
