"""Planning of a classifier from a store and an engine configuration.

`prepare` takes the options by name, `prepare_engine` as an `EngineConfig`.
"""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Iterable, Optional, Union

from offramp.backends import open_backend
from offramp.errors import BudgetError, UsageError
from offramp.measure import default_threads
from offramp.policies import Policy
from offramp.program.inputs import InputEncoder
from offramp.runtime.config import BULK, RESIDENT, EngineConfig
from offramp.runtime.footprint import trim_memory, tune_allocator
from offramp.runtime.guard import guard_for
from offramp.runtime.ledger import CONTAINER, LEDGER, MEMORY, Limit, least_limit
from offramp.runtime.planner import SPREAD_BYTES, page_rounded
from offramp.runtime.profile import DeviceProfile, conditions_of
from offramp.session.bulk import with_most_rows
from offramp.session.classifier import Classifier, Settings
from offramp.session.containers import require_start
from offramp.session.policy_files import NamedPolicy, expect_profile, read_exit, rebase_policy
from offramp.store import Store
from offramp.store.manifest import require_head
from offramp.tasks import open_encoder
from offramp.tasks.model_files import ModelFiles
from offramp.units import format_size, named_budget


def prepare(
    store: Union[str, os.PathLike],
    budget: Union[int, str, None] = None,
    exit: Union[str, Policy] = "none",
    *,
    profile: Union[str, os.PathLike, DeviceProfile, None] = None,
    texts: Optional[Iterable[Any]] = None,
    warn: Callable[[str], None] = warnings.warn,
    **options: Any,
) -> Classifier:
    """Load everything except the weights, and plan. `.plan` describes what `open()` will do, feasible or not.

    Args:
        store: the folder that `divide` made.
        budget: maximum resident memory of the whole process: bytes, or a text such as `"128MiB"` or `"0.3GB"`; None:
            what the machine allows; `"auto"`: what its container allows; `"resident"`: what the machine allows, refused
            unless all weights stay in memory.
        exit: exit policy: `none`, `stage:K`, `patience:P`, `confidence:T`, ..., joined by `|` and `&`; the path of a
            policy file that `offramp tune` wrote; or a policy object.
        profile: device profile, or its path: for the deadline, and for an `index` policy, which then uses its latencies
            instead of those of the machine where it was tuned.
        texts: the inputs themselves, if they are known: they determine `longest`, and the memory that decoding takes.
        warn: receives one line each time texts are truncated, direct reads are not available although requested, or a
            policy file was tuned under other conditions.
        options: the other fields of `EngineConfig`: deadline, backend, threads, batch, max_length, reads, verify,
            longest, own_process, trust_kernels.

    Raises ValueError for an unknown option or value, StoreError and DamagedError for the store, UsageError for the
    policy, RefusedError for a policy file of another model or a device profile of another machine."""
    policy = exit if isinstance(exit, Policy) else None
    device_profile = profile if isinstance(profile, DeviceProfile) else None
    named = {"exit": exit if policy is None else str(policy), "profile": None if device_profile else profile}
    config = EngineConfig.from_json({"budget": budget, **named, **options})
    return prepare_engine(store, config, policy=policy, profile=device_profile, texts=texts, warn=warn)


def prepare_engine(
    store: Union[str, os.PathLike],
    config: EngineConfig,
    *,
    policy: Optional[Policy] = None,
    profile: Optional[DeviceProfile] = None,
    texts: Optional[Iterable[Any]] = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Classifier:
    """Plan an engine with the options of `config`, as `prepare` does.

    `policy` and `profile` replace those that `config` names.
    """
    with ExitStack() as closing:  # the threads of a backend that is not closed stay until it is collected
        classifier = _prepared(closing, store, config, policy, profile, texts, warn)
        closing.pop_all()
    return classifier


def _prepared(
    closing: ExitStack,
    store: Union[str, os.PathLike],
    config: EngineConfig,
    policy: Optional[Policy],
    profile: Optional[DeviceProfile],
    texts: Optional[Iterable[Any]],
    warn: Callable[[str], None],
) -> Classifier:
    """Return a planned classifier. What is to be closed if that fails is added to `closing`."""
    named = read_exit(config.exit if policy is None else policy)
    limit = least_limit(config.budget_bytes)
    if config.budget not in (None, RESIDENT) or limit.source != MEMORY:
        tune_allocator()
    opened = _opened(store, config, named)
    closing.callback(opened.close)
    num_exits = len(opened.program.layers)
    LEDGER.process_bytes = config.budget_bytes if config.own_process else None
    trim_memory()  # before the backend maps its library: start-up must not set the peak
    is_said = _report_container(opened, config, limit, warn)
    require_start(opened, config, limit, named.policy.last_exit(num_exits))
    backend = open_backend(config.backend, opened, config.threads or default_threads().number, config.trust_kernels)
    closing.callback(backend.close)
    guard = guard_for(named.deadline_seconds if config.deadline is None else config.deadline)
    given = profile or config.profile
    measured = None
    for line in named.rounding(opened):
        warn(line)
    if named.files or given is not None:
        here = conditions_of(opened.digest, config)
        named, measured = rebase_policy(named, given, num_exits, here, guard.needs_every_exit, warn)
    trim_memory()  # before the tokenizer allocates, for the same reason
    encoder = _encoder(opened, config.max_length, warn)
    # The plan of a device profile assumes that all rows reach all layers, so a guard that relies on one needs the same.
    reached = () if guard.needs_every_exit else named.reached(num_exits)
    settings = replace(_settings(config, encoder, texts), reached=reached)
    _report_lengths(opened, named, encoder, settings.length or config.max_length, warn)

    def plan_for(num_rows: int, num_batches: int) -> Classifier:
        sized = replace(settings, num_rows=num_rows, num_batches=num_batches)
        return Classifier(opened, backend, encoder, named.policy, sized, guard)

    if settings.is_bulk:
        classifier = with_most_rows(plan_for, has_deadline=guard.needs_every_exit)
    else:
        classifier = plan_for(settings.num_rows, 1)
    expect_profile(guard, classifier, measured, warn)
    if config.budget == RESIDENT:
        _require_resident(classifier)
    known = replace(config, longest=settings.length)
    classifier.recipe = partial(prepare_engine, opened.path, known, policy=policy, profile=profile)
    _report_limits(classifier, config, warn, is_said)
    return classifier


def _report_lengths(
    store: Store, named: NamedPolicy, encoder: InputEncoder, longest: Optional[int], warn: Callable[[str], None]
) -> None:
    """Report policies that were tuned on texts of another length. `longest` is None where texts are not known yet."""
    if store.program.texts is not None and longest is not None:
        for line in named.lengths(encoder.max_length, longest):
            warn(line)


def _encoder(store: Store, max_length: Optional[int], warn: Callable[[str], None]) -> InputEncoder:
    """Return what encodes the inputs of a store, from its verified files."""
    for file in store.manifest.files:
        store.read_file(file)  # verified before a library reads it
    listed = ModelFiles(store.path, store.manifest, store.folder)
    return open_encoder(listed, store.program.inputs, store.program.texts, max_length, warn)


def _opened(store: Union[str, os.PathLike], config: EngineConfig, named: NamedPolicy) -> Store:
    """Open a store, and raise an error where options or policy do not suit its model."""
    opened = Store(store, config.verify)
    require_head(opened.manifest, opened.path)
    _require_padding(opened, config)
    named.require_model(opened)
    named.policy.check(len(opened.program.layers), opened.program.problem)
    return opened


def _report_container(store: Store, config: EngineConfig, limit: Limit, warn: Callable[[str], None]) -> bool:
    """Report a container that gives less than was asked for, before anything is loaded. Return whether it does.

    One that holds all weights is not reported here.
    """
    asked, weights = config.budget_bytes or 0, sum(shard.bytes for shard in store.manifest.shards.values())
    if limit.source != CONTAINER or asked <= limit.num_bytes or weights < limit.num_bytes:
        return False
    size, kernel, planned = map(
        format_size, (limit.num_bytes + limit.margin_bytes, limit.margin_bytes, limit.num_bytes)
    )
    warn(
        f"container of {size}, with {kernel} for the kernel, is less than the budget of {format_size(asked)}:"
        f" planned for {planned}"
    )
    return True


def _report_limits(
    classifier: Classifier, config: EngineConfig, warn: Callable[[str], None], is_said: bool = False
) -> None:
    """Report a system that gives less than was asked for: memory, unless that `is_said`, or direct reads."""
    asked, settings = config.budget_bytes or 0, classifier.settings
    if asked > settings.budget_bytes and classifier.plan.num_slots and not is_said:
        what, size = settings.limited_by, format_size(settings.budget_bytes)
        warn(f"{what} of {size} is less than the budget of {format_size(asked)}: planned for {size}")
    reads, is_streamed = classifier.planned_reads, classifier.plan.num_slots > 0
    if reads.name == "buffered" and (config.reads == "direct" or (config.reads == "mapped" and is_streamed)):
        warn(f"{reads.because}: reading through the page cache")


def _require_resident(classifier: Classifier) -> None:
    """Raise BudgetError unless the plan keeps all weights in memory."""
    plan = classifier.plan
    if plan.feasible and not plan.num_slots:
        return
    weights = sum({item.shard: page_rounded(item.num_bytes) for item in classifier.items}.values())
    need, have = plan.base_bytes + plan.activation_bytes + weights, format_size(plan.budget_bytes)
    what = f"the process takes {format_size(need)} with all weights in memory, and {have} are available"
    least = named_budget(plan.smallest_budget_bytes + SPREAD_BYTES)
    remedy = f"stream the weights: --budget {least} is the smallest that works"
    raise BudgetError(what, classifier.store.path, remedy)


def _require_padding(store: Store, config: EngineConfig) -> None:
    """Raise UsageError if texts that run together cannot be padded to one length."""
    texts = store.program.texts
    if texts is not None and texts.pad_token is None and config.batch != 1:
        what = "texts of this model cannot be padded, so that each runs alone"
        remedy = "use batch 1; if config.json names no pad_token_id, set it and divide again for batches"
        raise UsageError(what, store.path, remedy)


def _settings(config: EngineConfig, encoder: InputEncoder, texts: Optional[Iterable[Any]]) -> Settings:
    """Return the settings of a classifier that runs one row at a time in bulk mode, `config.batch` rows otherwise."""
    longest, encoding_bytes, num_inputs = config.longest, 0, None
    if texts is not None:
        longest, num_inputs = None, 0
        for text in texts:
            num_inputs += 1
            longest = max(longest or 0, *encoder.lengths([text]))
            encoding_bytes = max(encoding_bytes, encoder.encoding_bytes([text]))
    limit, is_bulk = least_limit(config.budget_bytes), config.batch == BULK
    num_rows, own = 1 if is_bulk else int(config.batch), config.own_process
    settings = Settings(limit.num_bytes, num_rows, longest, config.reads, own, is_bulk, limited_by=limit.source)
    settings = replace(settings, encoding_bytes=encoding_bytes, num_inputs=num_inputs)
    return replace(settings, config=config, margin_bytes=limit.margin_bytes)
