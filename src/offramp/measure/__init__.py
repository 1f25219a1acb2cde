"""Weigh and time: memory of this process, spans of a run, summaries of numbers, facts about the machine.

Knows no store, no model and no runtime: others hand it their numbers. Linux first; elsewhere it says less and does
not fail.
"""

from offramp.measure.available import available_bytes
from offramp.measure.cached import cached_bytes
from offramp.measure.hardware import num_cores
from offramp.measure.memory import Memory, MemorySample, MemorySampler, PeakMeter, read_memory, reset_peak
from offramp.measure.summary import median, percentile, wilson_interval
from offramp.measure.trace import TRACED_PASSES, Span, Trace, bound_seconds

__all__ = [
    "TRACED_PASSES",
    "Memory",
    "MemorySample",
    "MemorySampler",
    "PeakMeter",
    "Span",
    "Trace",
    "available_bytes",
    "bound_seconds",
    "cached_bytes",
    "median",
    "num_cores",
    "percentile",
    "read_memory",
    "reset_peak",
    "wilson_interval",
]
