"""Policies that combine other policies: any of them, all of them, or not before a given exit.

Every part receives the evidence of every exit, independently of the decisions of other parts, so counters miss nothing.
Only combinations that the grammar can express are accepted: `From` outside, then `AnyOf`, then `AllOf`, then rules or
learned policies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, ClassVar, Optional, Sequence, Tuple

import numpy as np

from offramp.policies.evidence import Evidence
from offramp.policies.policy import Decider, Policy
from offramp.policies.rules import FullDepth, refuse_missing_exit, refuse_no_exit


@dataclass(frozen=True)
class AbstractJoin(Policy):
    """Common base of `AllOf` and `AnyOf`."""

    parts: Tuple[Policy, ...]

    sign: ClassVar[str]
    """Operator between the parts in the grammar."""
    join: ClassVar[np.ufunc]
    """Function that joins the masks of two parts."""
    limit: ClassVar[Callable[..., int]]
    """Function that chooses among the earliest, and among the last, exits of the parts."""

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"a combination needs at least two parts, got {len(self.parts)}")
        for part in self.parts:
            if isinstance(part, (FullDepth, From, AnyOf, type(self))):
                raise ValueError(f"{self}: {part} cannot be a part of it")

    def __str__(self) -> str:
        return self.sign.join(map(str, self.parts))

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError if any part does not fit the model."""
        for part in self.parts:
            part.check(num_exits, problem)

    @property
    def lookback(self) -> int:
        """The largest lookback of any part."""
        return max(part.lookback for part in self.parts)

    def earliest_exit(self, num_exits: int) -> int:
        """Return the latest `earliest_exit` of the parts for `AllOf`, the earliest for `AnyOf`."""
        return self.limit(part.earliest_exit(num_exits) for part in self.parts)

    def last_exit(self, num_exits: int) -> int:
        """Return the latest `last_exit` of the parts for `AllOf`, the earliest for `AnyOf`."""
        return self.limit(part.last_exit(num_exits) for part in self.parts)

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return the combined state of all parts."""
        return _Joined(self.join, [part.start(num_rows, num_exits) for part in self.parts])


@dataclass(frozen=True)
class AllOf(AbstractJoin):
    """`A&B`: a row leaves at the first exit where all parts let it leave."""

    sign, join, limit = "&", np.logical_and, max


@dataclass(frozen=True)
class AnyOf(AbstractJoin):
    """`A|B`: a row leaves at the first exit where at least one part lets it leave."""

    sign, join, limit = "|", np.logical_or, min


@dataclass(frozen=True)
class From(Policy):
    """`from:K>A`: no row leaves before exit K, but A receives the evidence of the exits before K."""

    exit_index: int
    policy: Policy

    def __post_init__(self) -> None:
        refuse_no_exit(self, self.exit_index)
        if isinstance(self.policy, (FullDepth, From)):
            raise ValueError(f"{self}: from:K> must precede rules, not {self.policy}")

    def __str__(self) -> str:
        return f"from:{self.exit_index}>{self.policy}"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError if the model has no exit K or the inner policy does not fit."""
        refuse_missing_exit(self, self.exit_index, num_exits)
        self.policy.check(num_exits, problem)

    @property
    def lookback(self) -> int:
        """The lookback of the inner policy."""
        return self.policy.lookback

    def earliest_exit(self, num_exits: int) -> int:
        """Return K or the earliest exit of the inner policy, whichever is later."""
        return max(self.exit_index, self.policy.earliest_exit(num_exits))

    def last_exit(self, num_exits: int) -> int:
        """Return K or the last exit of the inner policy, whichever is later."""
        return max(self.exit_index, self.policy.last_exit(num_exits))

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return the state of the inner policy, whose decisions are ignored before exit K."""
        return _NotBefore(self.exit_index, self.policy.start(num_rows, num_exits))


class _Joined(Decider):
    def __init__(self, join: np.ufunc, parts: Sequence[Decider]) -> None:
        self.join, self.parts = join, parts

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        return self.join.reduce([part.update(exit_index, evidence) for part in self.parts])


class _NotBefore(Decider):
    def __init__(self, exit_index: int, decider: Decider) -> None:
        self.exit_index, self.parts = exit_index, [decider]

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        leaves_B = self.parts[0].update(exit_index, evidence)
        return leaves_B if exit_index >= self.exit_index else np.zeros_like(leaves_B)
