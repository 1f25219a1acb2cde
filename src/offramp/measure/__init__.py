"""Measurement: memory of this process, timed events of a run, summary statistics, facts about the machine.

Independent of stores, models and the runtime. Full support on Linux; on other systems fewer numbers are available, and
missing ones do not raise.
"""

from offramp.measure.cached import cached_bytes, resident_bytes
from offramp.measure.groups import tightest_group
from offramp.measure.hardware import address_space_bytes, available_bytes, container_bytes, default_threads, num_cores
from offramp.measure.memory import (
    Memory,
    MemorySample,
    MemorySampler,
    PeakMeter,
    major_faults,
    read_memory,
    reset_peak,
)
from offramp.measure.summary import median, percentile, wilson_interval
from offramp.measure.trace import MOST_SPANS, TRACED_PASSES, Span, Trace, bound_seconds

__all__ = [
    "MOST_SPANS", "TRACED_PASSES", "Memory", "MemorySample", "MemorySampler", "PeakMeter", "Span", "Trace",
    "address_space_bytes", "available_bytes", "bound_seconds", "cached_bytes", "container_bytes", "default_threads",
    "major_faults", "median", "num_cores", "percentile", "read_memory", "reset_peak", "resident_bytes",
    "tightest_group", "wilson_interval",
]  # fmt: skip
