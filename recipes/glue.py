"""Exits trained on the tasks of GLUE: losses, forms of heads, and exit rules; docs/results/glue.md has the figures.

MODELS holds `minilm` and `distil-minilm`, a DistilBERT filled from it (bench/shapes.py makes them); GLUE the tables of
the tasks.

MODELS=models GLUE=glue offramp sweep recipes/glue.py --out results/glue --jobs 2
"""

import os

from offramp.experiments import Grid, patience

MODELS, GLUE = (os.environ.get(name, name.lower()) for name in ("MODELS", "GLUE"))
TASKS = ["cola", "sst2", "mrpc", "rte", "stsb", "qnli", "qqp", "mnli"]
RULES = ["none", *patience(1, 5), "confidence:0.9", "entropy:0.4", "from:2>confidence:0.7", "stage:4"]


def recipe():
    """Plain fine-tuning and exits of three seeds; then other losses and heads, with and without their second stage."""
    found = []
    for task in TASKS:
        of = {"task": task, "data": GLUE, "epochs": 3, "batch_size": 32, "learning_rate": 1e-4}
        of |= {"precision": "bfloat16", "max_length": 128, "threads": 2, "rounds": 3}
        models = [f"{MODELS}/minilm", f"{MODELS}/distil-minilm"]
        rules = [rule for rule in RULES if task != "stsb" or rule == "none" or rule.startswith("stage")]
        found.append(Grid(model=models, loss="last", seed=[0, 1, 2], **of))
        found.append(Grid(model=models, loss="pabee", exit=rules, seed=[0, 1, 2], **of))
        found.append(Grid(model=models[0], loss=["mixed", "distill"], heads_epochs=[0, 20], seed=0, **of))
        heads = ["mean-linear", "cls-linear", "own", "own-shared"]
        found.append(Grid(model=models[0], loss="pabee", heads=heads, heads_epochs=0, seed=0, **of))
    return found
