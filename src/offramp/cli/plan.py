"""Show which shards a budget keeps in memory, which it streams, and the predicted peak. Loads everything that `run`
loads except the weights.
"""

import argparse

from offramp.cli import options
from offramp.units import format_size

LARGE_SHARE = 0.05
"""Share of the peak that texts of half the length must save, for the length to be named as what costs."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of plan."""
    parser.add_argument("store")
    options.add_engine(parser)
    options.add_inputs(parser)
    options.add_columns(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> None:
    """Print the plan. Raises BudgetError if no plan fits the budget."""
    from offramp.session import prepare_engine
    from offramp.session.lengths import activation_bytes_of, require_feasible

    texts = options.input_source(args).known(options.log)
    classifier = prepare_engine(args.store, options.engine_config(args), texts=texts, warn=options.warn)
    plan, items = classifier.plan, classifier.items
    if args.json:
        options.emit(classifier.describe_plan())
    else:
        columns = {
            "shard": lambda item: item.shard,
            "where": lambda item: "resident" if item.shard in plan.residents else "streamed",
            "size": lambda item: format_size(item.num_bytes),
        }
        print(options.table_of(items, columns))
        slots = f"{plan.num_slots} slots {format_size(plan.num_slots * plan.slot_bytes)}"
        base, activations = format_size(plan.base_bytes), format_size(plan.activation_bytes)
        print(f"\nprocess {base} + activations {activations} + {slots} + residents {format_size(plan.resident_bytes)}")
        limit = f"{plan.limited_by} {format_size(plan.budget_bytes)}"
        print(f"predicted peak {format_size(plan.predicted_peak_bytes)} / {limit}")
        print(f"smallest budget {format_size(plan.smallest_budget_bytes)}")
        length, shorter = classifier.length, classifier.length // 2
        saved_bytes = plan.activation_bytes - activation_bytes_of(classifier, max(shorter, 1))
        if saved_bytes >= LARGE_SHARE * plan.predicted_peak_bytes:
            what = f"activations are those of {length} tokens a text"
            print(f"{what}: --max-length {shorter} would save {format_size(saved_bytes)}")
    require_feasible(classifier)
