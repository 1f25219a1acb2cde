"""What `--exit` names, policy files included, and whether it is for this store and this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, List, Optional, Tuple, Union

from offramp.errors import BudgetError, RefusedError, StoreError, UsageError
from offramp.policies import Policy, parse
from offramp.policies.codec import from_json
from offramp.policies.grammar import is_file
from offramp.runtime.classifier import Classifier
from offramp.runtime.durations import format_duration
from offramp.runtime.guard import DeadlineGuard
from offramp.runtime.profile import DeviceProfile, cached_profile, fingerprint_of, load_profile, require_here
from offramp.store import Store
from offramp.store.policy_file import PolicyFile, read_policy


def read_exit(exit: Union[str, Policy]) -> Tuple[Policy, Optional[str], Optional[float]]:
    """The policy; of a policy file, also the fingerprint of its model and its deadline in seconds, if it has one; of
    several files, the shortest.

    Raises UsageError for a text that is none, and for files of two models; StoreError for a file that is none.
    """
    if isinstance(exit, Policy):
        return exit, None, None
    files: List[PolicyFile] = []

    def read(name: str) -> Policy:
        files.append(read_policy(Path(name)))
        return policy_of(files[-1], name)

    stands_alone = is_file(exit) and os.path.exists(exit.strip())  # noqa: PTH110  # Path.exists may raise
    policy = read(exit.strip()) if stands_alone else parse(exit, read)  # a file may hold what cannot be a part
    models, deadlines = {file.model_sha256 for file in files}, [file.deadline_seconds for file in files]
    if len(models) > 1:
        raise UsageError("the policy files are of two models", repr(exit), "join policies of one")
    return policy, next(iter(models), None), min((each for each in deadlines if each is not None), default=None)


def policy_of(file: PolicyFile, where: object) -> Policy:
    """The policy that a file describes. Raises StoreError for something else, UsageError for a rule that is none."""
    try:
        return from_json(file.policy)
    except ValueError as error:
        raise StoreError(f"no policy ({error})", where, "make it again: offramp tune") from None


def require_model(model_sha256: Optional[str], store: Store, where: Any) -> None:
    """Raise RefusedError if a policy file was tuned for the exits of another model."""
    if model_sha256 is not None and model_sha256 != store.contents.source.fingerprint:
        what = "the policy was tuned for another model, or before its exits were trained again"
        raise RefusedError(what, where, "tune it on a transcript of this store")


def expect_profile(
    guard: DeadlineGuard, classifier: Classifier, given: Union[DeviceProfile, str, os.PathLike, None]
) -> None:
    """Tell the guard what stages take, if that is known; else it learns.

    Raises BudgetError if no answer is in time, and, for a file, what `load_profile` raises, and RefusedError if it was
    measured on another machine, store or plan.
    """
    fingerprint = fingerprint_of(classifier)
    if given is None:
        profile = cached_profile(fingerprint, 1)
    elif isinstance(given, DeviceProfile):
        profile = given
    else:
        profile = load_profile(Path(given))
        require_here(profile, fingerprint, given)
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
