"""The first pass of a stream under a budget of the process.

What a pass takes besides weights is known after the first one: libraries load code, and modules import others, when
they first run. The first pass therefore has the fewest weights in memory, and the plan is chosen by what it took.
"""

from __future__ import annotations

from collections.abc import Mapping

from offramp.measure import PeakMeter
from offramp.runtime.memory_model import HEADROOM_BYTES
from offramp.runtime.weight_plan import WeightPlan, resized
from offramp.store import Store
from offramp.streaming.placement import module_of, streamed_shards


class FirstPass:
    """Measures the first pass, and chooses the plan of the next ones."""

    def __init__(self, store: Store, sizes: Mapping[str, int], plan: WeightPlan, process_bytes: int) -> None:
        """`plan` is the one by estimates, and `process_bytes` the most memory of the process."""
        self._stages, self._pinned, self._sizes = streamed_shards(store), module_of(store).pinned, sizes
        self._plan, self._process_bytes = plan, process_bytes
        self._meter = PeakMeter("clear_refs")
        self.smallest = self._resized(0)
        """Plan of the first pass."""
        self.other_bytes = self.excess_bytes = 0
        """Bytes that the measured pass took besides weights, and by which the process exceeded its limit in it."""

    def begin(self) -> None:
        """Begin to measure, or begin again."""
        self._meter.stop()
        self._meter = PeakMeter("clear_refs")
        self._meter.start()

    def next_plan(self, weight_bytes: int) -> WeightPlan:
        """Return the plan of the next passes. `weight_bytes` are in memory at the end of the measured one."""
        self._meter.stop()
        self.other_bytes = self._meter.peak_bytes - weight_bytes
        self.excess_bytes = self._meter.peak_bytes - self._process_bytes
        left_bytes = self._process_bytes - self.other_bytes - HEADROOM_BYTES
        return self._resized(min(_bytes_of(self._plan), left_bytes))

    def stop(self) -> None:
        """Stop measuring."""
        self._meter.stop()

    def _resized(self, limit_bytes: int) -> WeightPlan:
        return resized(self._plan, self._stages, self._sizes, self._pinned, limit_bytes)


def _bytes_of(plan: WeightPlan) -> int:
    return plan.resident_bytes + plan.pool_bytes + plan.slice_bytes
