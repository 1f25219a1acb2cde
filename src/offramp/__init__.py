"""offramp: run a model that does not fit in memory, and stop at the first exit that is confident.

    import offramp
    offramp.divide("my-bert", "store")
    with offramp.load("store", budget="128MiB", exit="patience:3") as classifier:
        print(classifier.predict(["a text"]))

This module is the public surface. Each name is imported on first access, so `import offramp` is cheap."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, Union

if TYPE_CHECKING:
    from offramp.division import divide as divide
    from offramp.errors import OfframpError as OfframpError
    from offramp.policies import Policy
    from offramp.session import Classifier as Classifier
    from offramp.session import Result as Result
    from offramp.session import prepare as prepare
    from offramp.store import Store as Store
    from offramp.store import verify as verify
    from offramp.streaming import stream as stream

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "OfframpError",
    "Result",
    "Store",
    "__version__",
    "divide",
    "load",
    "prepare",
    "stream",
    "verify",
]

_HOMES = {
    "Classifier": "offramp.session",
    "OfframpError": "offramp.errors",
    "Result": "offramp.session",
    "Store": "offramp.store",
    "divide": "offramp.division",
    "prepare": "offramp.session",
    "stream": "offramp.streaming",
    "verify": "offramp.store",
}


def load(
    store: Union[str, os.PathLike],
    budget: Union[int, str, None] = None,
    exit: Union[str, Policy] = "none",
    **options: Any,
) -> Classifier:
    """Open a store under a memory budget; `predict(inputs)` then returns one `Result` for each text, image or record
    of arrays.

    The arguments are those of `prepare`, which plans without opening.

    Raises BudgetError naming the smallest budget that works, and the errors of `prepare`."""
    from offramp.session import prepare

    return prepare(store, budget, exit, **options).open()


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list:
    return sorted(__all__)
