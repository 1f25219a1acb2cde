"""Latency and peak memory of a store against the budget, on random inputs: `offramp divide MODEL store` makes it.

STORE=my-store offramp sweep recipes/budgets.py --out results/budgets
"""

import os

from offramp.experiments import Grid


def recipe():
    """Three budgets and resident, five rounds of each: some minutes for a store of the size of BERT-base.

    A process with PyTorch takes 200 MiB before the first weight.
    """
    of = {"model": os.environ.get("STORE", "store"), "passes": 10, "rounds": 5}
    without_torch = Grid(budget=["128MiB", "192MiB", "256MiB", "resident"], backend="ort", **of)
    return [without_torch, Grid(budget=["256MiB", "384MiB", "resident"], backend="torch", **of)]
