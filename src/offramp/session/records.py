"""Records of a classifier: its plan, and what a run has taken, as JSON objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Optional

from offramp import measure
from offramp.errors import OfframpError
from offramp.runtime.run_plan import reads_of
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
    "num_slots", "slot_bytes", "resident_bytes", "limited_by", "reserved_bytes",
)  # fmt: skip


def plan_record(classifier: Classifier) -> Dict[str, Any]:
    """Return the plan, stage by stage. Sizes are in bytes."""
    plan, stages = classifier.plan, []
    for stage in classifier.schedule.stages:
        used = {shard for step in stage.steps for shard in step.shards}
        items = [(item.shard, item.num_bytes) for item in classifier.items if item.shard in used]
        shards = [{"shard": name, "bytes": size, "resident": name in plan.residents} for name, size in items]
        stages.append({"stage": stage.name, "bytes": sum(size for _, size in items), "shards": shards})
    known = {name: getattr(plan, name) for name in _OF_PLAN}
    return {**known, "reads": reads_of(classifier.direct), "stages": stages}


def run_record(classifier: Classifier, first_batch: int) -> Dict[str, Any]:
    """Return what the run since `open` has taken; medians leave out batches before `first_batch`."""
    plan, settings, counts, store = classifier.plan, classifier.settings, classifier.counts, classifier.store
    latencies, costs = classifier.latencies[first_batch:], classifier.costs[first_batch:]
    bounds = [measure.bound_seconds([cost.compute_seconds], [cost.read_seconds], cost.fill_seconds) for cost in costs]
    memory, feed = measure.read_memory(), classifier.feed
    return {
        "model": store.manifest.source.architecture,
        "store_sha256": store.digest,
        "dtype": store.manifest.precision,
        "backend": classifier.backend.name,
        "threads": classifier.backend.num_threads,
        "exit": str(classifier.policy),
        "config": None if settings.config is None else settings.config.to_json(),
        "deadline_seconds": classifier.guard.deadline_seconds,
        "num_cut_by_deadline": counts.num_cut,
        "budget_bytes": plan.budget_bytes,
        "limited_by": plan.limited_by,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "peak_rss_bytes": classifier.peak_rss_bytes,
        "rss_anon_bytes": memory.anon_bytes,
        "rss_file_bytes": memory.file_bytes,
        "page_cache_bytes": page_cache_bytes(store),
        "num_slots": plan.num_slots,
        "num_residents": len(plan.residents),
        "resident_bytes": plan.resident_bytes,
        "reads": reads_of(classifier.direct),
        "verify": store.policy,
        "batch": settings.num_rows * settings.num_batches,
        "is_bulk": settings.is_bulk,
        "num_inputs": counts.num_inputs,
        "seconds_total": counts.seconds,
        "stages_run_total": counts.num_stages,
        "late": counts.num_late,
        "latency_seconds_median": measure.median(latencies) if latencies else None,
        "latency_seconds_p95": measure.percentile(latencies, 95) if latencies else None,
        "latency_seconds_p99": measure.percentile(latencies, 99) if latencies else None,
        "bytes_read_total": feed.bytes_read if feed else 0,
        "bytes_read_idle": feed.bytes_idle if feed else 0,
        "bound_seconds": measure.median(bounds) if bounds else None,
    }


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
