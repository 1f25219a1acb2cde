"""offramp: run a model that does not fit in memory, and leave at the first exit that is sure.

    import offramp
    offramp.divide("my-bert", "store")
    with offramp.load("store", budget="128MiB", exit="patience:3") as classifier:
        print(classifier.predict(["a text"]))

This page is the public surface. Everything behind it is imported when it is first used, so that `import offramp`
costs nothing."""

from __future__ import annotations

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any, Callable, Iterable, Optional, Union

if TYPE_CHECKING:
    from offramp.division import divide as divide
    from offramp.errors import OfframpError as OfframpError
    from offramp.policies import Policy
    from offramp.runtime.profile import DeviceProfile
    from offramp.session import Classifier as Classifier
    from offramp.session import Result as Result
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
    "stream": "offramp.streaming",
    "verify": "offramp.store",
}


def load(
    store: Union[str, os.PathLike],
    budget: Union[int, str, None] = None,
    exit: Union[str, Policy] = "none",
    **options: Any,
) -> Classifier:
    """Open a store under a budget; `predict(texts)` then gives one `Result` a text, an image, or a
    record of arrays.

    Args:
        store: the folder that `divide` made.
        budget: the most that the whole process may have resident: bytes, or `"128MiB"`, `"0.3GB"`. None: what the
        machine allows.
        exit: when to leave: `none`, `stage:K`, `patience:P`, `confidence:T`, ..., joined by `|` and `&`; a policy file
            that `offramp tune` wrote (`policy.json`); or a policy.
        options: as for `prepare`.

    Raises BudgetError naming the smallest budget that would do, StoreError and DamagedError for the store, UsageError
    for the policy, RefusedError for a policy file of another model and a profile of another machine."""
    return prepare(store, budget, exit, **options).open()


def prepare(
    store: Union[str, os.PathLike],
    budget: Union[int, str, None] = None,
    exit: Union[str, Policy] = "none",
    *,
    deadline: Union[float, str, None] = None,
    profile: Union[DeviceProfile, str, os.PathLike, None] = None,
    backend: str = "ort",
    threads: Optional[int] = None,
    batch: Union[int, str] = 1,
    max_length: Optional[int] = None,
    longest: Optional[int] = None,
    texts: Optional[Iterable[Any]] = None,
    verify: str = "first",
    reads: str = "auto",
    own_process: bool = False,
    warn: Callable[[str], None] = warnings.warn,
) -> Classifier:
    """Load everything but the weights, and plan; `.plan` says what `open()` will do, feasible or not.

    Args:
        deadline: seconds, or `"60ms"`, for each request from its text to its answer: at that time the best answer so
            far goes out. None: that of the policy file, if it has one.
        profile: what stages take on this machine, or the file of it: for the deadline, and for an `index` policy, which
            then weighs these seconds and not those that it was tuned with. None: of the deadline, what the cache folder
            has, or what is learned while requests come.
        backend: `ort` (ONNX Runtime, no torch) or `torch`.
        threads: of the backend; the processors of this process if None.
        batch: rows that run together; `"bulk"`: as many as the budget holds, by length, for throughput.
        max_length: cut texts to this many tokens.
        longest: tokens of the longest input that will come, if known; plans are smaller for short inputs.
        texts: the inputs themselves, if they are known: they tell `longest`, and of images what decoding takes.
        verify: `first` (hash a file when it is first used, and remember), `always`, `never`.
        reads: `auto`, `direct` (O_DIRECT) or `buffered`.
        own_process: this process serves nothing else, so the budget holds from its start on; else from here on.
        warn: is told once if texts are cut, if direct reads were asked for and are not to be had, and if a policy file
            was tuned on another machine, engine or budget.
    """
    from offramp.backends import open_backend
    from offramp.measure import num_cores
    from offramp.runtime.footprint import trim_memory, tune_allocator
    from offramp.runtime.guard import guard_for
    from offramp.runtime.memory_model import unlimited_bytes
    from offramp.runtime.profile import engine_of
    from offramp.session import Classifier, Settings
    from offramp.session.bulk import BULK, with_most_rows
    from offramp.session.policy_files import bring_here, expect_profile, read_exit
    from offramp.store import Store
    from offramp.store.manifest import require_head
    from offramp.tasks import open_encoder
    from offramp.units import parse_size

    named = read_exit(exit)
    if budget is not None:
        tune_allocator()
    opened = Store(store, verify)
    require_head(opened.manifest, opened.path)
    named.require_model(opened)
    num_exits = len(opened.program.layers)
    named.policy.check(num_exits, opened.program.problem)
    engine = open_backend(backend, opened, threads or num_cores())
    guard = guard_for(named.deadline_seconds if deadline is None else deadline)
    asked_bytes = None if budget is None else parse_size(budget)
    measured = None
    if named.files or profile is not None:
        here = engine_of(opened.digest, engine.name, engine.num_threads, batch if batch == BULK else int(batch))
        here["budget_bytes"] = asked_bytes
        named, measured = bring_here(named, profile, num_exits, here, guard.needs_every_exit, warn)
    trim_memory()  # before the tokenizer takes its own: the start must not be the peak
    for file in opened.manifest.files:
        opened.read_file(file)
    encoder = open_encoder(opened.path, opened.program.inputs, opened.program.texts, max_length, warn)
    encoding_bytes = 0
    if texts is not None:
        longest = None
        for text in texts:
            longest = max(longest or 0, *encoder.lengths([text]))
            encoding_bytes = max(encoding_bytes, encoder.encoding_bytes([text]))
    budget_bytes = asked_bytes or unlimited_bytes()
    # a guard expects the latencies of a profile, whose plan assumes that all rows reach all layers
    reached = () if guard.needs_every_exit else named.reached(num_exits)

    def plan_for(num_rows: int, num_batches: int = 1) -> Classifier:
        is_bulk = batch == BULK
        settings = Settings(
            budget_bytes, num_rows, longest, reads, own_process, is_bulk, num_batches, encoding_bytes, reached
        )
        return Classifier(opened, engine, encoder, named.policy, settings, guard)

    if batch == BULK:
        length, has_deadline = longest or encoder.max_length, guard.needs_every_exit
        classifier = with_most_rows(plan_for, opened, engine, length, budget_bytes, has_deadline=has_deadline)
    else:
        classifier = plan_for(int(batch))
    expect_profile(guard, classifier, measured)
    if reads == "direct" and not classifier.direct:
        warn("this file system has no direct reads: reading through the page cache")
    return classifier


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list:
    return sorted(__all__)
