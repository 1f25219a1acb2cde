"""Latency and peak memory of a store against the budget, on random inputs: `offramp divide MODEL store` makes it.

STORE=my-store offramp sweep recipes/budgets.py --out results/budgets
"""

import os

from offramp.experiments import Grid


def recipe():
    """Three budgets and resident, five rounds of each: some minutes for a store of the size of BERT-base."""
    store, budgets = os.environ.get("STORE", "store"), ["128MiB", "192MiB", "256MiB", "resident"]
    return Grid(model=store, budget=budgets, backend=["ort", "torch"], passes=10, rounds=5)
