"""Policies that are tuned to a latency, and patience, on held-out rows; docs/results/latency.md has the figures.

RUNS holds a run folder of `offramp train` for each task: `RUNS/sst2`. GLUE holds the tables of the tasks.

RUNS=runs GLUE=glue offramp sweep recipes/latency.py --out results/latency
"""

import os

from offramp.experiments import Grid, patience

RUNS, GLUE = (os.environ.get(name, name.lower()) for name in ("RUNS", "GLUE"))
TASKS = ["sst2", "mrpc", "rte", "qnli", "qqp", "mnli"]


def recipe():
    """On certify, which no policy was tuned on: one text at a time, eight, in bulk, and streamed."""
    rules = ["none", *(f"tune:latency={milliseconds}ms" for milliseconds in (3, 5, 7)), *patience(1, 4)]
    found = []
    for task in TASKS:
        of = {"model": f"{RUNS}/{task}", "task": task, "data": GLUE, "split": "certify", "rows": 480, "threads": 2}
        found.append(Grid(exit=rules, batch=[1, 8], **of))
        found.append(Grid(exit=[rule for rule in rules if not rule.startswith("tune")], batch="bulk", **of))
        found.append(Grid(exit=rules, budget="96MiB", **of))
    return found
