"""Descriptions of a classifier as JSON objects: its plan, and what a run measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, Optional

from offramp.measure import bound_seconds, cached_bytes, median, read_memory
from offramp.program.program import Stage
from offramp.store import Store

if TYPE_CHECKING:
    from offramp.session.classifier import Classifier


def plan_json(classifier: Classifier) -> Dict[str, Any]:
    """Return the plan of a classifier, stage by stage. Sizes are in bytes."""
    plan = classifier.plan
    names = "feasible budget_bytes predicted_peak_bytes smallest_budget_bytes base_bytes activation_bytes num_slots"
    facts = {name: getattr(plan, name) for name in (*names.split(), "slot_bytes", "resident_bytes")}
    stages = [_stage_json(classifier, stage) for stage in classifier.schedule.stages]
    return {**facts, "reads": _reads(classifier), "stages": stages}


def _stage_json(classifier: Classifier, stage: Stage) -> Dict[str, Any]:
    used = {shard for step in stage.steps for shard in step.shards}
    items = [item for item in classifier.items if item.shard in used]
    residents = classifier.plan.residents
    shards = [{"shard": each.shard, "bytes": each.num_bytes, "resident": each.shard in residents} for each in items]
    return {"stage": stage.name, "bytes": sum(item.num_bytes for item in items), "shards": shards}


def run_json(classifier: Classifier, first_batch: int) -> Dict[str, Any]:
    """Return what the run since `open` measured; medians leave out the batches before `first_batch`."""
    plan, settings, counts, memory = classifier.plan, classifier.settings, classifier.counts, read_memory()
    latencies, costs = classifier.latencies[first_batch:], classifier.costs[first_batch:]
    bounds = [bound_seconds([cost.compute_seconds], [cost.read_seconds], cost.fill_seconds) for cost in costs]
    bytes_read, bytes_idle = classifier.bytes_read
    return {
        "model": classifier.store.manifest.source.architecture,
        "store_sha256": classifier.store.digest,
        "backend": classifier.backend.name,
        "threads": classifier.backend.num_threads,
        "exit": str(classifier.policy),
        "config": None if settings.config is None else settings.config.to_json(),
        "deadline_seconds": classifier.guard.deadline_seconds,
        "num_cut_by_deadline": counts.num_cut,
        "budget_bytes": plan.budget_bytes,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "peak_rss_bytes": classifier.peak_rss_bytes,
        "rss_anon_bytes": memory.anon_bytes,
        "rss_file_bytes": memory.file_bytes,
        "page_cache_bytes": page_cache_bytes(classifier.store),
        "num_slots": plan.num_slots,
        "num_residents": len(plan.residents),
        "resident_bytes": plan.resident_bytes,
        "reads": _reads(classifier),
        "verify": classifier.store.policy,
        "batch": settings.num_rows * settings.num_batches,
        "is_bulk": settings.is_bulk,
        "num_inputs": counts.num_inputs,
        "seconds_total": counts.seconds,
        "latency_seconds_median": median(latencies) if latencies else None,
        "bytes_read_total": bytes_read,
        "bytes_read_idle": bytes_idle,
        "bound_seconds": median(bounds) if bounds else None,
    }


def page_cache_bytes(store: Store) -> Optional[int]:
    """Return the bytes of shards in the page cache, or None if unknown. A memory cgroup is charged for them."""
    parts = [cached_bytes(store.path / shard.file) for shard in store.manifest.shards.values()]
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _reads(classifier: Classifier) -> str:
    return "direct" if classifier.direct else "buffered"
