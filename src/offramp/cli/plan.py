"""Show which shards a budget keeps in memory, which it streams, and the predicted peak. Loads everything that `run`
loads except the weights.
"""

from __future__ import annotations

import argparse

from offramp.cli.options import add_columns, add_engine, add_inputs, emit, engine_config, input_source, table, warn


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of plan."""
    parser.add_argument("store")
    add_engine(parser)
    add_inputs(parser)
    add_columns(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Print the plan. Raises BudgetError if no plan fits the budget."""
    from offramp.session import prepare_engine
    from offramp.units import format_size

    texts = input_source(args).known()
    classifier = prepare_engine(args.store, engine_config(args), texts=texts, warn=warn)
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
