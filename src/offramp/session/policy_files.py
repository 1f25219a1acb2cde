"""What `--exit` names, policy files included, and whether it is for this store and this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

from offramp.errors import BudgetError, RefusedError, StoreError, UsageError
from offramp.policies import Policy, parse
from offramp.policies.codec import from_json
from offramp.policies.grammar import is_file
from offramp.policies.recosting import with_costs
from offramp.runtime.guard import DeadlineGuard, Guard
from offramp.runtime.profile import (
    DeviceProfile,
    cached_profile,
    differences,
    fingerprint_of,
    load_profile,
    require_here,
)
from offramp.session.bulk import BULK
from offramp.session.classifier import Classifier
from offramp.store import Store
from offramp.store.policy_file import PolicyFile, read_policy
from offramp.units import format_duration


@dataclass(frozen=True)
class Named:
    """What `--exit` names: a policy, and the files that are part of it, by their names."""

    policy: Policy
    files: Mapping[str, PolicyFile] = field(default_factory=dict)

    @property
    def deadline_seconds(self) -> Optional[float]:
        """The shortest, if there is one."""
        given = (file.deadline_seconds for file in self.files.values())
        return min((each for each in given if each is not None), default=None)

    def reached(self, num_layers: int) -> Tuple[float, ...]:
        """The share of rows that come to each layer, if the policy is that of a file; of others nothing is known.

        Raises StoreError for shares that are none.
        """
        for name, file in self.files.items():
            shares = file.predicted.get("reached", [])
            if not isinstance(shares, list) or not all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in shares):
                raise StoreError("no shares of rows that come to each layer", name, "make it again: offramp tune")
            if self.policy == policy_of(file, name) and len(shares) == num_layers:
                return tuple(shares)
        return ()

    def require_model(self, store: Store) -> None:
        """Raise RefusedError if a file was tuned for the exits of another model."""
        for name, file in self.files.items():
            if file.model_sha256 != store.manifest.source.fingerprint:
                what = "the policy was tuned for another model, or before its exits were trained again"
                raise RefusedError(what, name, "tune it on a transcript of this store")

    def under(self, profile: DeviceProfile) -> Named:
        """The policy, weighing the seconds of a device profile where that needs no new fit."""
        return replace(self, policy=with_costs(self.policy, profile.costs_from))

    def doubts(self, here: Mapping[str, Any], profile: Optional[DeviceProfile], has_deadline: bool) -> List[str]:
        """What files say that does not hold here, a line each: latencies of another machine, engine or budget, and
        certificates of what a deadline cuts, or what weighs other seconds under `profile`. `here`: as `engine_of` says
        it, and the budget.
        """
        lines = []
        for name, file in self.files.items():
            own = policy_of(file, name)
            is_changed = profile is not None and with_costs(own, profile.costs_from) != own
            if file.certificate is not None and (is_changed or has_deadline):
                what = "--profile" if is_changed else "a deadline"
                lines.append(f"the certificate of {name} does not hold under {what}: it leaves at other exits")
            if is_changed:
                continue
            told = differences(file.measured_on, {key: here[key] for key in here if key in file.measured_on})
            if told:
                lines.append(f"{name} was tuned elsewhere ({told}): its latency does not hold here - tune it again")
        return lines


def read_exit(exit: Union[str, Policy]) -> Named:
    """The policy, and of what files it is.

    Raises UsageError for a text that is none, and for files of two models; StoreError for a file that is none.
    """
    if isinstance(exit, Policy):
        return Named(exit)
    files: Dict[str, PolicyFile] = {}

    def read(name: str) -> Policy:
        files[name] = read_policy(Path(name))
        return policy_of(files[name], name)

    stands_alone = is_file(exit) and os.path.exists(exit.strip())  # noqa: PTH110  # Path.exists may raise
    policy = read(exit.strip()) if stands_alone else parse(exit, read)  # a file may hold what cannot be a part
    if len({file.model_sha256 for file in files.values()}) > 1:
        raise UsageError("the policy files are of two models", repr(exit), "join policies of one")
    return Named(policy, files)


def policy_of(file: PolicyFile, where: object) -> Policy:
    """The policy that a file describes. Raises StoreError for something else, UsageError for a rule that is none."""
    try:
        return from_json(file.policy)
    except (ValueError, OverflowError, RecursionError) as error:
        raise StoreError(f"no policy ({error})", where, "make it again: offramp tune") from None


def bring_here(
    named: Named,
    given: Union[DeviceProfile, str, os.PathLike, None],
    num_exits: int,
    here: Mapping[str, Any],
    has_deadline: bool,
    warn: Callable[[str], None],
) -> Tuple[Named, Optional[DeviceProfile]]:
    """The policy, weighing the seconds of the device profile if one was given, and that profile. What does not hold
    here, `warn` is told. `here`: as `engine_of` says it, and the budget.

    Raises UsageError for a profile of bulk mode, RefusedError for one that was not measured here, and, for a file, what
    `load_profile` raises.
    """
    if here["batch"] == BULK:  # for throughput: nobody counts the seconds of a text
        if given is not None:
            raise UsageError("a profile is of a fixed number of rows", None, "leave it away, or run a batch of so many")
        return named, None
    profile = None if given is None else _read_profile(given, num_exits, here)
    for line in named.doubts(here, profile, has_deadline):
        warn(line)
    return named if profile is None else named.under(profile), profile


def _read_profile(
    given: Union[DeviceProfile, str, os.PathLike], num_exits: int, here: Mapping[str, Any]
) -> DeviceProfile:
    """Who gives no file answers for the machine that it is of."""
    if isinstance(given, DeviceProfile):
        profile, where, here = given, None, {"batch": here["batch"]}
    else:
        profile, where = load_profile(Path(given)), given
    require_here(profile, here, where)
    if profile.num_exits != num_exits:
        what = f"the profile has {profile.num_exits} exits, the model {num_exits}"
        raise RefusedError(what, where, "take a profile of this store")
    return profile


def expect_profile(guard: Guard, classifier: Classifier, profile: Optional[DeviceProfile]) -> None:
    """Give a deadline guard the latencies of a profile, or of one in the cache folder; without either it learns them.

    Raises BudgetError if no answer is in time.
    """
    if not isinstance(guard, DeadlineGuard):
        return
    profile = profile or cached_profile(fingerprint_of(classifier), 1)
    if profile is None:
        return
    guard.expected = profile.step_p99
    first = profile.seconds[0][0]
    if first > guard.deadline_seconds:
        raise BudgetError(
            f"a deadline of {format_duration(guard.deadline_seconds)} is below the first exit",
            f"which takes {format_duration(first)} for {profile.lengths[0]} tokens",
            f"--deadline {first * 1.2e3:.3g}ms would do for such inputs",
        )
