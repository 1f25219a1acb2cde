"""Exit policies by name, including policy files, and their checks against the store and this machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Tuple, Union

from offramp.errors import BudgetError, RefusedError, StoreError, UsageError
from offramp.policies import Policy, parse
from offramp.policies.grammar import is_file
from offramp.program.program import CAPTURED
from offramp.runtime import profile as profiles
from offramp.runtime.config import BULK
from offramp.runtime.guard import DeadlineGuard, Guard
from offramp.runtime.memory_model import SMALL_LENGTH
from offramp.runtime.profile import DeviceProfile
from offramp.session.classifier import Classifier
from offramp.store import Store
from offramp.store.policy_file import MeasuredOn, PolicyFile, read_policy
from offramp.units import format_duration, named_duration

_WARM_UPS = 3
"""Passes without weights of which the fastest tells what the first exit takes at least."""


@dataclass(frozen=True)
class NamedPolicy:
    """The policy that an exit option names, and the policy files that it consists of, by name."""

    policy: Policy
    files: Mapping[str, PolicyFile] = field(default_factory=dict)

    @property
    def deadline_seconds(self) -> Optional[float]:
        """The shortest deadline of the files in seconds, or None."""
        given = (file.deadline_seconds for file in self.files.values())
        return min((each for each in given if each is not None), default=None)

    def reached(self, num_layers: int) -> Tuple[float, ...]:
        """Return the share of rows that reach each layer, or () where it is unknown: only whole files record it."""
        for name, file in self.files.items():
            shares = file.predicted.reached
            if self.policy == policy_of(file, name) and len(shares) == num_layers:
                return shares
        return ()

    def require_model(self, store: Store) -> None:
        """Raise RefusedError if a file was tuned for the exits of another model."""
        for name, file in self.files.items():
            if store.manifest.precision_of(file.model_sha256) is None:
                what = "the policy was tuned for another model, or before its exits were trained again"
                raise RefusedError(what, name, "tune it on a transcript of this store")

    def rounding(self, store: Store) -> List[str]:
        """Return one line for each file that was tuned on the same model with otherwise rounded weights."""
        manifest, lines = store.manifest, []
        for name, file in self.files.items():
            there = manifest.precision_of(file.model_sha256)
            if file.model_sha256 == manifest.answering:
                continue
            what = f"those of this store are {manifest.precision}"
            if there == manifest.precision:
                what = "those of this store were rounded by another version of offramp"
            what = f"{name} was tuned on the answers of {there} weights, {what}"
            lines.append(f"{what}: its scores and its certificate are of the other - tune it again")
        return lines

    def lengths(self, max_length: int, longest: int) -> List[str]:
        """Return one line for each file that was tuned on texts that were truncated to another length than here.

        Texts are truncated to `max_length` tokens here, and the longest is expected to have `longest` tokens then.
        """
        lines = []
        for name, file in self.files.items():
            there = file.tuned_on.get("max_length")
            if type(there) is not int or there == max_length or longest < min(there + 1, max_length):
                continue
            these = f"are truncated to {max_length}" if max_length < there else f"have up to {longest}"
            what = f"{name} was tuned on texts of at most {there} tokens, and these {these}"
            lines.append(f"{what}: its scores and its certificate do not hold here - give --max-length {there}")
        return lines

    def warnings(self, here: MeasuredOn, profile: Optional[DeviceProfile], has_deadline: bool) -> List[str]:
        """Return one line for each claim of a file that does not hold under the conditions `here`.

        Latencies do not hold on another machine, engine or budget. Certificates do not hold under a deadline, nor where
        `profile` changes the latencies that the policy uses.
        """
        from offramp.policies.learned import with_costs

        lines = []
        for name, file in self.files.items():
            own = policy_of(file, name)
            is_changed = profile is not None and with_costs(own, profile.costs_from) != own
            if file.certificate is not None and (is_changed or has_deadline):
                what = "--profile" if is_changed else "a deadline"
                lines.append(f"the certificate of {name} does not hold under {what}, which changes the exits")
            if is_changed:
                continue
            comparable = MeasuredOn(**{name: getattr(here, name) for name in file.measured_on.to_json()})
            differing = profiles.differences(file.measured_on, comparable)
            if differing:
                what = f"{name} was tuned under other conditions ({differing})"
                lines.append(f"{what}: its latency does not hold here - tune it again")
        return lines


def read_exit(exit: Union[str, Policy]) -> NamedPolicy:
    """Return the policy and the files that it consists of.

    Raises UsageError for a text that is no policy, and for files of two models; StoreError for an invalid file.
    """
    if isinstance(exit, Policy):
        return NamedPolicy(exit)
    files: Dict[str, PolicyFile] = {}

    def read(name: str) -> Policy:
        files[name] = read_policy(Path(name))
        return policy_of(files[name], name)

    stands_alone = is_file(exit) and os.path.exists(exit.strip())  # noqa: PTH110  # Path.exists may raise
    # A whole file may hold a policy that cannot be combined.
    policy = read(exit.strip()) if stands_alone else parse(exit, read, code=True)
    if len({file.model_sha256 for file in files.values()}) > 1:
        raise UsageError("the policy files are of two models", repr(exit), "combine policies of one model")
    return NamedPolicy(policy, files)


def policy_of(file: PolicyFile, where: object) -> Policy:
    """Return the policy that a file describes. Raises StoreError for an invalid one, UsageError for an invalid rule."""
    from offramp.policies.codec import from_json  # imported for files only: learned policies make start-up slower

    try:
        return from_json(file.policy)
    except (ValueError, OverflowError, RecursionError) as error:
        raise StoreError(f"no policy ({error})", where, "make it again: offramp tune") from None


def rebase_policy(
    named: NamedPolicy,
    given: Union[DeviceProfile, str, None],
    num_exits: int,
    here: MeasuredOn,
    has_deadline: bool,
    warn: Callable[[str], None],
) -> Tuple[NamedPolicy, Optional[DeviceProfile]]:
    """Return the policy with the latencies of the device profile, if one is given, and that profile.

    `here` are the conditions of this engine; `warn` receives each claim of the policy files that does not hold here.

    Raises UsageError for a profile in bulk mode, RefusedError for one measured under other conditions, and what
    `load_profile` raises.
    """
    if here.batch == BULK:  # bulk mode is for throughput, so latencies are not used
        if given is not None:
            raise UsageError("a profile is of a fixed number of rows", None, "omit it, or give --batch that number")
        return named, None
    profile, where, required = None, None, here
    if isinstance(given, DeviceProfile):
        profile, required = given, MeasuredOn(batch=here.batch)  # the caller vouches for its machine
    elif given is not None:
        profile, where = profiles.load_profile(Path(given)), given
    if profile is not None:
        profiles.require_here(profile, required, where)
        if profile.num_exits != num_exits:
            what = f"the profile has {profile.num_exits} exits, the model {num_exits}"
            raise RefusedError(what, where, "take a profile of this store")
    for line in named.warnings(here, profile, has_deadline):
        warn(line)
    if profile is None:
        return named, None
    from offramp.policies.learned import with_costs

    return replace(named, policy=with_costs(named.policy, profile.costs_from)), profile


def expect_profile(
    guard: Guard, classifier: Classifier, profile: Optional[DeviceProfile], warn: Callable[[str], None]
) -> None:
    """Give the guard the latencies of this profile, or of one in the cache folder; without one the guard learns them.

    Raises BudgetError if the first exit takes longer than the deadline. Without a profile, `warn` receives one line if
    computing the first exit alone takes longer.
    """
    if not isinstance(guard, DeadlineGuard):
        return
    profile = profile or profiles.cached_profile(profiles.fingerprint_of(classifier), 1)
    if profile is None:
        least = _least_seconds(classifier)
        if least > guard.deadline_seconds:
            deadline, exit = format_duration(guard.deadline_seconds), format_duration(least)
            what = f"no input meets a deadline of {deadline}: the first exit takes {exit} or more"
            warn(f"{what} - offramp profile measures what is possible")
        return
    guard.expected = profile.step_p99
    first = profile.seconds[0][0]
    if first > guard.deadline_seconds:
        what = f"a deadline of {format_duration(guard.deadline_seconds)} is below the first exit"
        where = f"which takes {format_duration(first)} for {profile.lengths[0]} tokens"
        raise BudgetError(what, where, f"--deadline {named_duration(1.2 * first)} works for such inputs")


def _least_seconds(classifier: Classifier) -> float:
    """Return the seconds of computing the first exit for a short input, without reading weights.

    A warm-up runs each kernel once, which is about one layer and its head; where each step has a kernel of its own, it
    runs all layers.
    """
    backend, program, seconds = classifier.backend, classifier.store.program, []
    for _ in range(_WARM_UPS):
        began = time.perf_counter()
        backend.warm_up(1, min(SMALL_LENGTH, classifier.length))
        seconds.append(time.perf_counter() - began)
    is_whole = any(kernel.template == CAPTURED for kernel in program.kernels.values())
    return min(seconds) / (len(program.layers) if is_whole else 1)
