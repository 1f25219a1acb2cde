"""Two runs of a module, compared call by call: the first call whose result differs."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from offramp.program.program import Call
from offramp.streaming.capture import surround, tensors_of, value_of
from offramp.streaming.placeholders import bits

Log = list[tuple[Call, str]]
"""Calls of modules in the order in which they ended, each with the digest of its result."""


@contextmanager
def logged(module: nn.Module) -> Iterator[Log]:
    """Yield the log of the calls of a module and its parts that are made within."""
    log: Log = []
    counts: Counter[str] = Counter()

    def around(path: str, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        counts[path] += 1
        call = Call(path, counts[path])
        result = forward(*args, **kwargs)
        log.append((call, _digest(result)))
        return result

    with ExitStack() as undo:
        for path, part in module.named_modules():
            undo.callback(surround(part, partial(around, path)))
        yield log


def first_difference(one: Log, other: Log, module: nn.Module) -> str:
    """Return in words where two runs begin to differ."""
    for (call, digest), (its_call, its_digest) in zip(one, other, strict=False):
        if call != its_call:
            return f"one run calls {call.module}, the other {its_call.module}"
        if digest != its_digest:
            kind = type(module.get_submodule(call.module)).__name__
            place = (
                f"{call.module} (call {call.number})" if call.module else "no part of the module, but in its own code"
            )
            return f"they first differ in {place}, a {kind}"
    return f"one run makes {len(one)} calls of modules, the other {len(other)}"


def _digest(result: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors_of(result):
        digest.update(json.dumps([str(tensor.dtype), value_of(tensor).axes]).encode())
        digest.update(bits(tensor))
    return digest.hexdigest()
