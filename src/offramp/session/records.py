"""Records of a classifier: its plan, and what a run has taken, as JSON objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Optional, Sequence

from offramp import measure
from offramp.errors import OfframpError
from offramp.runtime.config import EngineConfig
from offramp.runtime.run_plan import Reads, reads_by_now
from offramp.store import Store

if TYPE_CHECKING:
    from offramp.session.classifier import Classifier

SUMS = (
    "num_inputs", "seconds_total", "stages_run_total", "bytes_read_total", "bytes_read_idle", "late",
    "num_cut_by_deadline",
)  # fmt: skip
"""Keys of a record of a run whose values are sums."""
_OF_PLAN = (
    "feasible", "budget_bytes", "predicted_peak_bytes", "smallest_budget_bytes", "base_bytes", "activation_bytes",
    "num_slots", "slot_bytes", "resident_bytes", "limited_by", "reserved_bytes", "margin_bytes",
)  # fmt: skip


def plan_record(classifier: Classifier) -> Dict[str, Any]:
    """Return the plan, stage by stage. Sizes are in bytes."""
    plan, stages = classifier.plan, []
    for stage in classifier.schedule.stages:
        used = {shard for step in stage.steps for shard in step.shards}
        items = [(item.shard, item.num_bytes) for item in classifier.items if item.shard in used]
        shards = [{"shard": name, "bytes": size, "resident": name in plan.residents} for name, size in items]
        stages.append({"stage": stage.name, "bytes": sum(size for _, size in items), "shards": shards})
    known, reads = {name: getattr(plan, name) for name in _OF_PLAN}, _reads_of(classifier)
    dtype = classifier.store.manifest.precision
    return {**known, "dtype": dtype, "reads": reads.name, "reads_because": reads.because, "stages": stages}


def run_record(classifier: Classifier, first_batch: int) -> Dict[str, Any]:
    """Return what the run since `open` has taken; medians leave out batches before `first_batch`."""
    plan, settings, counts, store = classifier.plan, classifier.settings, classifier.counts, classifier.store
    latencies, costs = classifier.latencies[first_batch:], classifier.costs[first_batch:]
    bounds = [measure.bound_seconds([cost.compute_seconds], [cost.read_seconds], cost.fill_seconds) for cost in costs]
    memory, feed, reads = measure.read_memory(), classifier.feed, _reads_of(classifier)
    return {
        "model": store.manifest.source.architecture,
        "store_sha256": store.digest,
        "dtype": store.manifest.precision,
        "backend": classifier.backend.name,
        "threads": classifier.backend.num_threads,
        "threads_by": _threads_by(settings.config),
        "exit": str(classifier.policy),
        "config": None if settings.config is None else settings.config.to_json(),
        "deadline_seconds": classifier.guard.deadline_seconds,
        "num_cut_by_deadline": counts.num_cut,
        "budget_bytes": plan.budget_bytes,
        "limited_by": plan.limited_by,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "peak_rss_bytes": classifier.peak_rss_bytes,
        **_of_group(),
        "rss_anon_bytes": memory.anon_bytes,
        "rss_file_bytes": memory.file_bytes,
        "page_cache_bytes": page_cache_bytes(store),
        "num_slots": plan.num_slots,
        "num_residents": len(plan.residents),
        "resident_bytes": plan.resident_bytes,
        "reads": reads.name,
        "reads_because": reads.because,
        "verify": store.policy,
        "batch": settings.num_rows * settings.num_batches,
        "is_bulk": settings.is_bulk,
        "num_inputs": counts.num_inputs,
        "seconds_total": counts.seconds,
        "stages_run_total": counts.num_stages,
        "late": counts.num_late,
        **_of_latencies(latencies),
        "bytes_read_total": feed.bytes_read if feed else 0,
        "bytes_read_idle": feed.bytes_idle if feed else 0,
        "bound_seconds": measure.median(bounds) if bounds else None,
    }


def _of_latencies(latencies: Sequence[float]) -> Dict[str, Optional[float]]:
    """Return the median and two percentiles; None without batches."""
    return {
        "latency_seconds_median": measure.median(latencies) if latencies else None,
        "latency_seconds_p95": measure.percentile(latencies, 95) if latencies else None,
        "latency_seconds_p99": measure.percentile(latencies, 99) if latencies else None,
    }


def _of_group() -> Dict[str, Optional[int]]:
    """Return the limit of the container and the most that was charged to it; None outside of one."""
    group = measure.tightest_group()
    limit_bytes, peak_bytes = (None, None) if group is None else (group.limit_bytes, group.peak_bytes)
    return {"group_limit_bytes": limit_bytes, "group_peak_bytes": peak_bytes}


def _threads_by(config: Optional[EngineConfig]) -> Optional[str]:
    """Return what sets the number of threads: an option, or what the default follows."""
    return None if config is None else "option" if config.threads else measure.default_threads().source


def _reads_of(classifier: Classifier) -> Reads:
    """Return how streamed shards are read by now: mapping them may have become impossible."""
    return reads_by_now(classifier.planned_reads, classifier.feed)


def page_cache_bytes(store: Store) -> Optional[int]:
    """Return the bytes of shards in the page cache, or None if unknown. A memory cgroup is charged for them."""
    known = 0
    try:
        for name in store.manifest.shards:
            with store.opened(name, direct=None) as descriptor:
                part = measure.cached_bytes(descriptor)
            if part is None:
                return None
            known += part
    except (OSError, OfframpError):  # a shard that no input needed was removed or replaced
        return None
    return known
