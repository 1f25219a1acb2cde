"""Say what a budget would keep in memory and what it would stream, and the peak that follows. Loads what `run` loads,
but no weight.
"""

from __future__ import annotations

import argparse

from offramp.cli.options import (
    add_budget,
    add_columns,
    add_engine,
    add_inputs,
    emit,
    engine_options,
    has_inputs,
    known_inputs,
    table,
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of plan."""
    parser.add_argument("store")
    add_budget(parser)
    add_engine(parser)
    add_inputs(parser)
    add_columns(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")


def main(args: argparse.Namespace) -> int:
    """Plan. Raises BudgetError if the budget is impossible."""
    import offramp
    from offramp.units import format_size

    texts = known_inputs(args) if has_inputs(args) else None
    classifier = offramp.prepare(args.store, args.budget, texts=texts, **engine_options(args))
    plan = classifier.plan
    if args.json:
        emit(classifier.describe_plan())
        plan.require_feasible(classifier.items)
        return 0
    rows = [
        (item.shard, "resident" if item.shard in plan.residents else "streamed", format_size(item.num_bytes))
        for item in classifier.items
    ]
    print(table(("shard", "where", "size"), rows))
    parts = (
        ("process", plan.base_bytes),
        ("activations", plan.activation_bytes),
        (f"{plan.num_slots} slots", plan.num_slots * plan.slot_bytes),
        ("residents", plan.resident_bytes),
    )
    print("\n" + " + ".join(f"{name} {format_size(num_bytes)}" for name, num_bytes in parts))
    print(f"predicted peak {format_size(plan.predicted_peak_bytes)} / budget {format_size(plan.budget_bytes)}")
    print(f"smallest budget {format_size(plan.smallest_budget_bytes)}")
    plan.require_feasible(classifier.items)
    return 0
