"""Exit rules on tasks of GLUE, between two bounds: the oracle, and random exits of the depth of a rule.

`offramp train bert-base-uncased --task sst2 --data glue --seed 1,2,3 --out runs/sst2` makes the models, for each task.

RUNS=runs GLUE=glue offramp sweep recipes/glue_bert.py --out results/glue
"""

import os

from offramp.experiments import Grid, patience

TASKS = ("sst2", "mrpc")


def recipe():
    """Each model and seed: full depth, six rules, a tuned policy and two bounds; resident, and under 192 MiB."""
    runs, glue = os.environ.get("RUNS", "runs"), os.environ.get("GLUE", "glue")
    rules = ["none", *patience(1, 5), "confidence:0.9", "tune:drop=1", "oracle", "random:confidence:0.9"]
    of = {"data": glue, "exit": rules, "budget": ["192MiB", "resident"], "seed": [1, 2, 3], "rows": 400, "rounds": 5}
    return [Grid(model=f"{runs}/{task}", task=task, **of) for task in TASKS]
