"""Run: the budget, the plan, the ring and the loop.

Decides whether a weight is in memory and when it is read; multiplies nothing, opens no texts.
"""

from offramp.runtime.backend import Backend, State
from offramp.runtime.classifier import Classifier, Result, Settings
from offramp.runtime.footprint import tune_allocator
from offramp.runtime.planner import Item, Memory, Plan, make_plan
from offramp.runtime.sizes import format_size, parse_size

__all__ = [
    "Backend",
    "Classifier",
    "Item",
    "Memory",
    "Plan",
    "Result",
    "Settings",
    "State",
    "format_size",
    "make_plan",
    "parse_size",
    "tune_allocator",
]
