"""Conversion of policies to JSON and back. Rules are stored as their text, learned policies as their parameters."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Dict, Type

from offramp.policies.combine import AbstractJoin, AllOf, AnyOf, From
from offramp.policies.costs import Costs, as_tuples
from offramp.policies.features import FEATURES
from offramp.policies.grammar import parse
from offramp.policies.learned import Halting, Index, LearnedPolicy, ScoredPolicy, Starting, Stopping, Thresholds
from offramp.policies.policy import Policy

RULE = "rule"
"""Value of `kind` for a policy that the grammar can express."""
KINDS = {kind.word: kind for kind in (Thresholds, Halting, Stopping, Index)}
JOINS: Dict[str, Type[AbstractJoin]] = {"any": AnyOf, "all": AllOf}
FROM = "from"
FIRST_FEATURE_NAMES = ["one", "sureness", "entropy", "change", "streak", "log_length"]  # prose: as old files spell it
"""Feature names in policy files of offramp 0.1; the features are those of FEATURES, in the same order."""


def to_json(policy: Policy) -> Dict[str, Any]:
    """Return the JSON object that represents a policy in a policy file."""
    if isinstance(policy, LearnedPolicy):
        return policy.to_json()
    if isinstance(policy, Starting):
        return {"kind": policy.word, "first": policy.first, "policy": to_json(policy.policy)}
    if not _has_learned(policy):
        return {"kind": RULE, "text": str(policy)}
    if isinstance(policy, From):
        return {"kind": FROM, "exit_index": policy.exit_index, "policy": to_json(policy.policy)}
    assert isinstance(policy, AbstractJoin)
    word = next(word for word, join in JOINS.items() if isinstance(policy, join))
    return {"kind": word, "parts": [to_json(part) for part in policy.parts]}


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
    if word == Starting.word and set(found) == {"first", "policy"}:
        inner = from_json(found["policy"])
        if not isinstance(inner, LearnedPolicy):
            raise ValueError(f"{word}: expected a learned policy inside, got {inner}")
        return Starting(found["first"], inner)
    if word == FROM and set(found) == {"exit_index", "policy"}:
        if type(found["exit_index"]) is not int:
            raise ValueError(f"{FROM}: exit_index must be an integer, got {found['exit_index']!r}")
        return From(found["exit_index"], from_json(found["policy"]))
    if isinstance(word, str) and word in JOINS and set(found) == {"parts"} and isinstance(found["parts"], list):
        return JOINS[word](tuple(from_json(part) for part in found["parts"]))
    return _learned(word, found)


def _learned(word: Any, found: Dict[str, Any]) -> LearnedPolicy:
    kind = KINDS.get(word) if isinstance(word, str) else None
    if kind is None:
        known = ", ".join((RULE, Starting.word, FROM, *JOINS, *KINDS))
        raise ValueError(f"kind must be one of {known}, got {word!r}")
    features = found.pop("features", None)
    if issubclass(kind, ScoredPolicy) and features not in (list(FEATURES), FIRST_FEATURE_NAMES):
        raise ValueError(f"features must be {', '.join(FEATURES)}, got {features!r}")
    names = [field.name for field in fields(kind)]
    if set(found) != set(names):
        raise ValueError(f"{kind.word}: expected {', '.join(names)}, got {', '.join(sorted(found))}")
    try:
        if "costs" in found:
            costs = found["costs"]
            found["costs"] = Costs(as_tuples(costs["lengths"]), as_tuples(costs["seconds"]))
        return kind(**{name: as_tuples(value) for name, value in found.items()})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{kind.word}: invalid value ({error})") from None


def _has_learned(policy: Policy) -> bool:
    if isinstance(policy, AbstractJoin):
        return any(_has_learned(part) for part in policy.parts)
    if isinstance(policy, From):
        return _has_learned(policy.policy)
    return isinstance(policy, (LearnedPolicy, Starting))
