"""Replacement of the latencies that a policy was tuned with by those of another device."""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

from offramp.policies.combine import AbstractJoin, From
from offramp.policies.costs import Costs
from offramp.policies.learned import Index, Starting
from offramp.policies.policy import Policy


def with_costs(policy: Policy, costs_from: Callable[[int], Costs], first: int = 1) -> Policy:
    """Return the policy with new costs wherever this needs no new fit.

    This is the case for `Index` policies. Other policies are unchanged.

    Args:
        policy: the policy.
        costs_from: returns the costs of the exits from a given exit on, for a policy whose first head is that exit.
        first: index of the first exit of `policy`.
    """
    if isinstance(policy, Index):
        return replace(policy, costs=costs_from(first))
    if isinstance(policy, Starting):
        return replace(policy, policy=with_costs(policy.policy, costs_from, policy.first))
    if isinstance(policy, From):
        return replace(policy, policy=with_costs(policy.policy, costs_from))
    if isinstance(policy, AbstractJoin):
        return replace(policy, parts=tuple(with_costs(part, costs_from) for part in policy.parts))
    return policy
