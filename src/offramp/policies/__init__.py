"""Early-exit policies: decide from the outputs of an exit which rows leave. NumPy only: no torch, clock or model."""

from offramp.policies.combine import AllOf, AnyOf, From
from offramp.policies.evidence import PROBLEMS, Evidence
from offramp.policies.grammar import GRAMMAR, parse
from offramp.policies.policy import Decider, MemorylessPolicy, Policy, replay
from offramp.policies.rules import Confidence, Entropy, FullDepth, Margin, Patience, StopAt, Votes

__all__ = [
    "GRAMMAR", "PROBLEMS", "AllOf", "AnyOf", "Confidence", "Decider", "Entropy", "Evidence", "From", "FullDepth",
    "Margin", "MemorylessPolicy", "Patience", "Policy", "StopAt", "Votes", "parse", "replay",
]  # fmt: skip
