"""Run: the budget, the plan, the ring and the loop.

Decides whether a weight is in memory and when it is read; multiplies nothing, opens no texts.
"""

from offramp.runtime.backend import Backend, State
from offramp.runtime.footprint import tune_allocator
from offramp.runtime.planner import Item, Memory, Plan, make_plan

__all__ = [
    "Backend",
    "Item",
    "Memory",
    "Plan",
    "State",
    "make_plan",
    "tune_allocator",
]
