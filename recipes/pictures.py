"""The pictures of reports in the README: MiniLM with exits on MRPC, over budgets and exit rules, and one traced round.

`offramp train MODEL --task mrpc --data GLUE --out RUNS/mrpc` makes the model; GLUE holds the tables of the tasks.

RUNS=runs GLUE=glue offramp sweep recipes/pictures.py --out results/pictures
offramp report results/pictures --assets pictures
"""

import os

from offramp.experiments import Grid, patience

RUNS, GLUE = (os.environ.get(name, name.lower()) for name in ("RUNS", "GLUE"))


def recipe():
    """Return rules under two budgets and resident, and two of them once more with the memory over time."""
    of = {"model": f"{RUNS}/mrpc", "task": "mrpc", "data": GLUE, "rows": 100, "threads": 2}
    rules = ["none", *patience(1, 3), "confidence:0.9", "oracle"]
    plain = Grid(budget=["80MiB", "96MiB", "resident"], exit=rules, rounds=5, **of)
    return [plain, Grid(budget=["80MiB", "96MiB"], exit=["none", "patience:2"], trace=True, rounds=1, **of)]
