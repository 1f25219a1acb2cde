"""Policies under other seconds than those that they were tuned with."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

from offramp.policies.combine import AbstractJoin, From
from offramp.policies.costs import Costs
from offramp.policies.learned import Index, Starting
from offramp.policies.policy import Policy


def recosted(policy: Policy, costs_from: Callable[[int], Costs], first: int = 1) -> Policy:
    """The policy, weighing other seconds wherever that needs no new fit, which is in the index form of the cost
    function; all else stays as it was tuned. `costs_from(first)`: to the exits from `first` on, of a policy whose first
    head that is.
    """
    if isinstance(policy, Index):
        return replace(policy, costs=costs_from(first))
    if isinstance(policy, Starting):
        return replace(policy, policy=recosted(policy.policy, costs_from, policy.first))
    if isinstance(policy, From):
        return replace(policy, policy=recosted(policy.policy, costs_from))
    if isinstance(policy, AbstractJoin):
        return replace(policy, parts=tuple(recosted(part, costs_from) for part in policy.parts))
    return policy
