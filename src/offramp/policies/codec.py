"""Conversion of policies to JSON and back. Rules are stored as their text, learned policies as their parameters."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Callable, Dict, Type

from offramp.policies.combine import AbstractJoin, AllOf, AnyOf, From
from offramp.policies.costs import Costs, as_tuples
from offramp.policies.evidence import FEATURES
from offramp.policies.grammar import parse
from offramp.policies.learned import Halting, Index, LearnedPolicy, ScoredPolicy, Starting, Stopping, Thresholds
from offramp.policies.policy import Policy

RULE = "rule"
"""Value of `kind` for a policy that the grammar can express."""
KINDS: Dict[str, Type[Any]] = {
    "starting": Starting, "from": From, "any": AnyOf, "all": AllOf,
    **{kind.word: kind for kind in (Thresholds, Halting, Stopping, Index)},
}  # fmt: skip
"""Value of `kind` -> class of the policy, whose fields are the other members of the object."""
_MAX_PARTS = 1024
"""Most parts of a combination. Each is evaluated for each row at each exit."""
FIRST_FEATURE_NAMES = ["one", "sureness", "entropy", "change", "streak", "log_length"]  # prose: as old files spell it
"""Feature names in policy files of offramp 0.1; the features are those of FEATURES, in the same order."""


def to_json(policy: Policy) -> Dict[str, Any]:
    """Return the JSON object that represents a policy in a policy file."""
    if isinstance(policy, LearnedPolicy):
        return policy.to_json()
    if not _has_learned(policy):
        return {"kind": RULE, "text": str(policy)}
    word = next(word for word, kind in KINDS.items() if isinstance(policy, kind))
    if isinstance(policy, AbstractJoin):
        return {"kind": word, "parts": [to_json(part) for part in policy.parts]}
    assert isinstance(policy, (From, Starting))
    return {"kind": word, **vars(policy), "policy": to_json(policy.policy)}


def from_json(tree: Any) -> Policy:
    """Return the policy of an object written by `to_json`.

    Raises ValueError for any other object, UsageError for a rule that cannot be parsed.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"a policy must be an object, got {tree!r}")
    found = dict(tree)
    word = found.pop("kind", None)
    if word == RULE and isinstance(found.get("text"), str) and len(found) == 1:
        return parse(found["text"])
    kind = KINDS.get(word) if isinstance(word, str) else None
    if kind is None:
        raise ValueError(f"kind must be one of {', '.join((RULE, *KINDS))}, got {word!r}")
    features = found.pop("features", None) if issubclass(kind, LearnedPolicy) else None
    if issubclass(kind, ScoredPolicy) and features not in (list(FEATURES), FIRST_FEATURE_NAMES):
        raise ValueError(f"features must be {', '.join(FEATURES)}, got {features!r}")
    names = [field.name for field in fields(kind)]
    if set(found) != set(names):
        raise ValueError(f"{word}: expected {', '.join(names)}, got {', '.join(sorted(found))}")
    flags = [field.name for field in fields(kind) if field.type == "bool"]
    for name in flags:
        if not isinstance(found[name], bool):
            raise ValueError(f"{word}: {name} must be true or false, got {found[name]!r}")
    try:
        return kind(**{name: _READERS.get(name, as_tuples)(value) for name, value in found.items()})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{word}: invalid value ({error})") from None


def _few(trees: Any) -> Any:
    """Return the parts of a combination. Raises ValueError for more than a text has room for."""
    if len(trees) > _MAX_PARTS:
        raise ValueError(f"{len(trees)} parts, at most {_MAX_PARTS} are read")
    return trees


_READERS: Dict[str, Callable[[Any], Any]] = {
    "costs": lambda tree: Costs(as_tuples(tree["lengths"]), as_tuples(tree["seconds"])),
    "policy": from_json,
    "parts": lambda trees: tuple(map(from_json, _few(trees))),
}
"""Functions that read the fields of policies that are neither numbers nor arrays of numbers."""


def _has_learned(policy: Policy) -> bool:
    if isinstance(policy, AbstractJoin):
        return any(map(_has_learned, policy.parts))
    return _has_learned(policy.policy) if isinstance(policy, From) else isinstance(policy, (LearnedPolicy, Starting))
